"""The report of a run: a self-contained HTML page, its charts as PNG, and its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from canvastune import lazy_attributes

if TYPE_CHECKING:
    from canvastune.report.build import build_report
    from canvastune.report.summary import RunArtifacts

__all__ = ["RunArtifacts", "build_report"]
# They load matplotlib and Jinja.
__getattr__ = lazy_attributes(__name__, RunArtifacts="summary", build_report="build")

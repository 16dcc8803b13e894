"""The report of a run: a self-contained HTML page, its charts as PNG, and its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from canvastune.report.summary import RunArtifacts

if TYPE_CHECKING:
    from canvastune.report.build import build_report

__all__ = ["RunArtifacts", "build_report"]


def __getattr__(attribute: str) -> Any:
    """Import `build_report` on first use: it loads matplotlib and Jinja."""
    if attribute == "build_report":
        from canvastune.report.build import build_report

        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

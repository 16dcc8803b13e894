"""The report of a run: a self-contained HTML page, its charts as PNG, and its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.report.build import build_report
    from canvastune.report.summary import RunArtifacts

__all__ = ["RunArtifacts", "build_report"]


def __getattr__(attribute: str) -> Any:
    """Import a public name on first use: the page loads matplotlib and Jinja."""
    if attribute == "build_report":
        from canvastune.report.build import build_report

        return build_report
    if attribute == "RunArtifacts":
        from canvastune.report.summary import RunArtifacts

        return RunArtifacts
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

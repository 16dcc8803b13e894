"""The report of a run: one HTML page that needs nothing else, and its curves as PNG."""

from canvastune.report.page import write_report
from canvastune.report.run import Run

__all__ = ["Run", "write_report"]

"""The report of a run: one HTML page that needs nothing else, and its curves as PNG."""

from canvastune.report.build import write_report
from canvastune.report.summary import RunArtifacts

__all__ = ["RunArtifacts", "write_report"]

"""Findings of `canvastune doctor`."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.doctor.finding import Finding


def only(findings: Iterator[Finding]) -> Finding:
    """Return the finding of a check that has one."""
    (found,) = findings
    return found

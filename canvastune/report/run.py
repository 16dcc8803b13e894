"""A run as the report reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from canvastune.config import RunConfig


@dataclass(frozen=True)
class Run:
    """Where the steps of a run left what is told of it; None: the step was not made, or its files are not at hand."""

    name: str
    config: RunConfig
    metrics: Path  # metrics.jsonl, or the folder that holds it
    data: Path | None = None  # the prepared data set, of which card.json is read
    plan: Path | None = None
    evaluation: Path | None = None
    merge: Path | None = None

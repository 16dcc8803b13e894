"""Several runs beside each other: their figures, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from canvastune.report.curves import Record, series
from canvastune.report.facts import exact_match, file_in, median, read_json
from canvastune.report.run import Run
from canvastune.section import leaves

_OF_NO_INTEREST = ("name", "tracking.")  # a setting that changes nothing in a run


def named(runs: Sequence[Run]) -> list[str]:
    """Each run's name, with a number behind it where an earlier one has the same."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 2
        while name in names:
            name, number = f"{run.name} ({number})", number + 1
        names.append(name)
    return names


def figures(name: str, run: Run, records: list[Record]) -> dict[str, Any]:
    """What a run is compared by; None where it is not known."""
    losses, validation = series(records, "train", "loss")[1], series(records, "validation", "loss")[1]
    ends = max(1, len(losses) // 30)
    match = exact_match(read_json(file_in(run.evaluation, "evaluation.json"))) if run.evaluation else None
    return {
        "name": name,
        "steps": len(losses),
        "loss": sum(losses[-ends:]) / ends if losses else None,
        "validation": validation[-1] if validation else None,
        "match": match["after"] if match else None,
        "tokens_per_second": median(series(records, "train", "tokens_per_second")[1]),
        "seconds": sum(series(records, "train", "seconds")[1]),
    }


def differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs: {"key", "values"} each, None where a run has no such setting."""
    found = [leaves(run.config.model_dump(mode="json")) for run in runs]
    rows = []
    for key in dict.fromkeys(key for each in found for key in each):
        values = [each.get(key) for each in found]
        if not key.startswith(_OF_NO_INTEREST) and any(value != values[0] for value in values):
            rows.append({"key": key, "values": values})
    return rows

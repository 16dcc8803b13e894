"""What the page says of a run: figures, their uncertainty, and what a reader must not overlook."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig
from canvastune.config.strict import flatten
from canvastune.errors import UserError
from canvastune.evaluation.scoring import SIGNIFICANCE_LEVEL, mcnemar, wilson
from canvastune.report.charts import Record, is_number, series

_RESTARTS = ("resumed", "restarted")
_ROUTINE = ("checkpoint", "started")  # events that are not listed; of the former the number is told
_CLEARLY_WORSE = 1.01  # the last validation loss over the lowest: below this is noise


def file_in(path: Path, name: str) -> Path:
    """`path` itself, or the file `name` in it if it is a folder."""
    return path / name if path.is_dir() else path


def read_json(path: Path) -> dict[str, Any]:
    """A step's JSON file.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Give the output folder of the step that writes {path.name}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a {type(found).__name__}, expected a JSON object")
    return found


def exact_match(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Exact match on both sides with intervals, and what changed; None if no row was scored.

    "paired" compares row by row where the evaluation says how many were gained and lost: sharper than two intervals side by side.
    """
    rows = evaluation.get("scored", evaluation.get("rows"))
    if not rows:
        return None
    sides = {}
    for side in ("before", "after"):
        share = evaluation[f"exact_match_{side}"]
        correct = evaluation.get(f"correct_{side}", round(share * rows))
        low, high = wilson(correct, rows)
        sides[side] = {"share": correct / rows, "correct": correct, "low": low, "high": high}
    before, after = sides["before"], sides["after"]
    paired = None
    if "gained" in evaluation and "lost" in evaluation:
        gained, lost = evaluation["gained"], evaluation["lost"]
        paired = {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    clear = paired["p"] < SIGNIFICANCE_LEVEL if paired else after["low"] > before["high"] or after["high"] < before["low"]
    direction = "rose" if after["correct"] > before["correct"] else "fell" if after["correct"] < before["correct"] else "stayed"
    return {"rows": rows, **sides, "paired": paired, "clear": clear, "direction": direction}


def cost_of(records: list[Record], config: RunConfig) -> dict[str, Any]:
    """What steps and validations occupied: {"hours", "unit", "place"}, by the ranks and the device that each attempt recorded.

    A GPU-hour is one GPU's, a CPU-hour one thread's. A run that recorded no device is counted over the recipe's processes.
    """
    place: Record = {"ranks": config.world_size}
    hours = 0.0
    for record in records:
        if "ranks" in record:
            place = record
        elif record["kind"] in ("train", "validation") and is_number(record.get("seconds")):
            hours += record["seconds"] * place["ranks"] * place.get("threads", 1) / 3600
    ranks = place["ranks"]
    if place.get("device") == "cuda":
        return {"hours": hours, "unit": "GPU-hours", "place": f"{ranks} × {place['device_name']}"}
    where = _count(ranks, "process", "processes")
    if "threads" in place:
        return {"hours": hours, "unit": "CPU-hours", "place": f"{where} of {_count(place['threads'], 'thread', 'threads')}"}
    return {"hours": hours, "unit": "process-hours", "place": where}


def training(records: list[Record], config: RunConfig) -> dict[str, Any]:
    """Steps, time, tokens and losses of the training itself."""
    train = [record for record in records if record["kind"] == "train"]
    validation_steps, validation = series(records, "validation", "loss")
    _, losses = series(records, "train", "loss")
    _, speeds = series(records, "train", "tokens_per_second")
    _, seconds = series(records, "train", "seconds")
    _, memory = series(records, "train", "memory_bytes")
    _, tokens = series(records, "train", "tokens")
    ends = max(1, len(losses) // 30)  # the loss of one step is noise: its ends are means
    return {
        "steps": train[-1]["step"] if train else 0,
        "planned_steps": config.train.steps,
        "seconds": sum(seconds) + sum(series(records, "validation", "seconds")[1]),
        "step_seconds": median(seconds),
        "tokens": int(sum(tokens)),
        "tokens_per_second": median(speeds),
        "mfu": median(series(records, "train", "mfu")[1]),
        "tflops": median(series(records, "train", "tflops")[1]),
        "memory_bytes": max(memory, default=None),
        "loss": (sum(losses[:ends]) / ends, sum(losses[-ends:]) / ends) if losses else None,
        "validation": (validation[0], validation[-1]) if validation else None,
        "validation_at": (validation_steps[0], validation_steps[-1]) if validation else None,
        "best_validation": min(zip(validation, validation_steps, strict=True), default=None),
    }


def median(values: list[float]) -> float | None:
    """The middle value; None of nothing."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 if ordered else None


def events_of(records: list[Record]) -> tuple[list[Record], int]:
    """Events that are told one by one, and the number of checkpoints."""
    events = [record for record in records if record["kind"] == "event"]
    told = [event for event in events if event.get("event") not in _ROUTINE]
    return told, sum(event.get("event") == "checkpoint" for event in events)


def warnings_of(
    config: RunConfig,
    facts: Mapping[str, Any],
    records: list[Record],
    *,
    evaluation: Mapping[str, Any] | None,
    merge: Mapping[str, Any] | None,
    card: Mapping[str, Any],
) -> list[str]:
    """What a reader must not overlook, most serious first."""
    found = []
    told, _ = events_of(records)
    if merge is not None and not merge.get("passed", False):
        found.append("The merge proof failed: merged and adapted model disagree. Do not use the merged model.")
    skipped = [event["step"] for event in told if "skip" in str(event.get("event"))]
    if skipped:
        found.append(f"{_count(len(skipped), 'step was', 'steps were')} skipped: {', '.join(map(str, skipped[:10]))}.")
    lacking = sorted({name for record in records for name, value in record.items() if value is None})
    if lacking:
        found.append(f"Some recorded values were not finite and are missing in the curves: {', '.join(lacking)}.")
    if 0 < facts["steps"] < facts["planned_steps"]:
        found.append(f"Training reached step {facts['steps']} of {facts['planned_steps']}.")
    match = exact_match(evaluation) if evaluation else None
    if match and match["direction"] == "fell":
        found.append(f"Exact match fell from {match['before']['correct']} to {match['after']['correct']} of {match['rows']} rows.")
    elif match and not match["clear"] and match["direction"] != "stayed":
        pair = match["paired"]
        why = f"{pair['gained']} gained, {pair['lost']} lost, p = {pair['p']:.2f}" if pair else "the 95% intervals overlap"
        found.append(f"{match['rows']} rows are too few to be sure of the change in exact match: {why}.")
    if evaluation is None:
        found.append("Not evaluated: nothing here says whether the tuned model answers better.")
    elif match is None:
        found.append("No row could be scored: no reference answer matches the recipe's answer pattern.")
    best, last = facts["best_validation"], facts["validation"]
    if best and last[1] > _CLEARLY_WORSE * best[0]:
        found.append(f"Validation loss was lowest at step {best[1]} ({best[0]:.3f}) and ended at {last[1]:.3f}: trained too long.")
    found += _interruptions(told)
    if config.train.method == "lora" and merge is None:
        found.append("The adapter was not merged, so nothing is proved about a merged model.")
    bad = card.get("bad", 0)
    if bad:
        found.append(f"{_count(bad, 'row', 'rows')} of the data could not be read and {'was' if bad == 1 else 'were'} left out.")
    return found


def _interruptions(told: list[Record]) -> list[str]:
    found = []
    restarts = [event["step"] for event in told if event.get("event") in _RESTARTS]
    if restarts:
        times = "once" if len(restarts) == 1 else f"{len(restarts)} times"
        found.append(f"Training was interrupted and went on {times}, from step {', '.join(map(str, restarts[:10]))}.")
    damaged = [event["step"] for event in told if event.get("event") == "damaged_checkpoint"]
    if damaged:
        found.append(f"{_count(len(damaged), 'checkpoint was', 'checkpoints were')} damaged and passed over; see the events.")
    return found


def plan_rows(plan: Mapping[str, Any], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Planned and measured side by side, for what both name; values in the unit given."""
    pairs = (
        ("Step time", "s", "step_seconds", facts["step_seconds"]),
        ("Model FLOPs utilisation", "share", "model_flops_utilisation", facts["mfu"]),
        ("Memory per accelerator, peak", "bytes", "memory_bytes", facts["memory_bytes"]),
    )
    return [
        {"title": title, "unit": unit, "planned": plan[name], "measured": measured, "ratio": measured / plan[name]}
        for title, unit, name, measured in pairs
        if measured is not None and plan.get(name)
    ]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


_OF_NO_INTEREST = ("name", "tracking.")  # a setting that changes nothing in a run


def named(runs: Sequence[RunArtifacts]) -> list[str]:
    """Each run's name, with a number behind it where an earlier one has the same."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 2
        while name in names:
            name, number = f"{run.name} ({number})", number + 1
        names.append(name)
    return names


def figures(name: str, run: RunArtifacts, records: list[Record]) -> dict[str, Any]:
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


def differing(runs: Sequence[RunArtifacts]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs: {"key", "values"} each, None where a run has no such setting."""
    found = [flatten(run.config.model_dump(mode="json")) for run in runs]
    rows = []
    for key in dict.fromkeys(key for each in found for key in each):
        values = [each.get(key) for each in found]
        if not key.startswith(_OF_NO_INTEREST) and any(value != values[0] for value in values):
            rows.append({"key": key, "values": values})
    return rows


@dataclass(frozen=True)
class RunArtifacts:
    """Where the steps of a run left what is told of it; None: the step was not made, or its files are not at hand."""

    name: str
    config: RunConfig
    metrics: Path  # metrics.jsonl, or the folder that holds it
    data: Path | None = None  # the prepared data set, of which card.json is read
    plan: Path | None = None
    evaluation: Path | None = None
    merge: Path | None = None

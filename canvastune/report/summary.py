"""The figures of a run, each defined once, and the warnings that go with them.

No plotting library is imported here: steps that only read or compare runs stay light.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from canvastune.config import RunConfig
from canvastune.config.strict import flatten
from canvastune.errors import UserError, type_of
from canvastune.evaluation.degenerate import describe_degenerate
from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.scoring import too_few
from canvastune.io.json_text import finite, write_json
from canvastune.tracking.metrics_file import sum_energy

Record = dict[str, Any]  # a line of metrics.jsonl

LAST_STEPS = 10  # every step draws new corruption levels, so the last training loss is a mean
_RESTARTS = ("resumed", "restarted")
_ROUTINE_EVENTS = ("checkpoint", "started")  # not listed on the page
_MANY_CUT = 0.01  # share of the data's responses without their end, above which it is reported
_CLEARLY_WORSE = 1.01  # ratio of the last to the lowest validation loss; smaller ones are noise
_NOT_COMPARED = ("name", "tracking.")  # settings that change nothing in a run


@dataclass(frozen=True)
class RunArtifacts:
    """Where the steps of a run left their outputs; None: no output of the step was found."""

    name: str
    config: RunConfig
    metrics: Path  # metrics.jsonl, or the folder that holds it
    data: Path | None = None  # the prepared dataset, of which card.json is read
    plan: Path | None = None
    evaluation: Path | None = None
    merge: Path | None = None
    folder: Path | None = None  # of a pipeline run
    pages: tuple[tuple[str, str], ...] = ()  # of the run elsewhere: title and address
    step_seconds: tuple[tuple[str, float], ...] = ()  # that each step took, over all attempts

    @property
    def model(self) -> Path | None:
        """The tuned model's folder: merged, or fully trained."""
        made = "model" if self.config.train.method == "lora" else "train/model"
        return None if self.folder is None else self.folder / made


@dataclass(frozen=True)
class RunSummary:
    """The figures that a run is judged by; None where a run has no such figure.

    summary.json, the command line, Kubeflow, MLflow, the report and its comparison table all show
    these. Losses are in nats per token, exact match is a share of the scored rows (0 to 1), strict
    and without typography; scores are means from 0 to 1, where a judge gives more than right and
    wrong.
    """

    train_loss_first: float | None = None  # of the first step
    train_loss_last: float | None = None  # mean of the last `LAST_STEPS` steps
    validation_loss_first: float | None = None
    validation_loss_last: float | None = None
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    exact_match_normalized_before: float | None = None
    exact_match_normalized_after: float | None = None
    score_before: float | None = None
    score_after: float | None = None
    train_energy_kwh: float | None = None  # of all GPUs, over all attempts

    @classmethod
    def from_records(cls, records: list[Record], evaluation: EvaluationResult | None) -> RunSummary:
        """Summarize the records of metrics.jsonl and, if there is one, an evaluation."""
        losses = loss_ends(series(records, "train", "loss")[1])
        validation = series(records, "validation", "loss")[1]
        scored = evaluation if evaluation and evaluation.scored else None
        graded = scored if scored and scored.after.exact_match is None else None
        return cls(
            train_loss_first=losses[0] if losses else None,
            train_loss_last=losses[1] if losses else None,
            validation_loss_first=validation[0] if validation else None,
            validation_loss_last=validation[-1] if validation else None,
            exact_match_before=scored.before.exact_match if scored else None,
            exact_match_after=scored.after.exact_match if scored else None,
            exact_match_normalized_before=scored.before.exact_match_normalized if scored else None,
            exact_match_normalized_after=scored.after.exact_match_normalized if scored else None,
            score_before=graded.before.score if graded else None,
            score_after=graded.after.score if graded else None,
            train_energy_kwh=Energy.from_records(records).kwh,
        )

    @classmethod
    def read(cls, folder: Path) -> RunSummary:
        """Read summary.json of a run's folder. Raises: UserError, it is missing or invalid."""
        found = read_json(folder / "summary.json")
        return cls(**{field.name: found.get(field.name) for field in fields(cls)})

    def write(self, folder: Path) -> None:
        """Write summary.json into a run's folder; figures that are not known are left out."""
        write_json(folder / "summary.json", self.figures())

    def figures(self) -> dict[str, float]:
        """Return the figures that are known and finite, by name."""
        found = finite(asdict(self))
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class TrainingStats:
    """Steps, time, tokens and speed of the training; None where it was not recorded."""

    steps: int
    planned_steps: int
    seconds: float  # of steps and validations
    train_seconds: float  # of steps only
    step_seconds: float | None  # median
    tokens: int
    tokens_per_second: float | None  # median
    mfu: float | None  # median, 0 to 1
    tflops: float | None  # median, per process
    memory_bytes: float | None  # peak of rank 0
    validation_steps: tuple[int, int] | None  # of the first and the last validation
    best_validation: tuple[float, int] | None  # lowest loss, and its step

    @classmethod
    def from_records(cls, records: list[Record], config: RunConfig) -> TrainingStats:
        """Compute the statistics of the records of metrics.jsonl."""

        def values(kind: str, field: str) -> list[float]:
            return series(records, kind, field)[1]

        validation_steps, validation = series(records, "validation", "loss")
        train_seconds = values("train", "seconds")
        return cls(
            steps=next((each["step"] for each in reversed(records) if each["kind"] == "train"), 0),
            planned_steps=config.train.steps,
            seconds=sum(train_seconds) + sum(values("validation", "seconds")),
            train_seconds=sum(train_seconds),
            step_seconds=_median(train_seconds),
            tokens=int(sum(values("train", "tokens"))),
            tokens_per_second=_median(values("train", "tokens_per_second")),
            mfu=_median(values("train", "mfu")),
            tflops=_median(values("train", "tflops")),
            memory_bytes=max(values("train", "memory_bytes"), default=None),
            validation_steps=(validation_steps[0], validation_steps[-1]) if validation else None,
            best_validation=min(zip(validation, validation_steps, strict=True), default=None),
        )


def loss_ends(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the first and the last loss of a training, the mean of `LAST_STEPS` steps."""
    if not losses:
        return None
    last = losses[-LAST_STEPS:]
    return losses[0], sum(last) / len(last)


def series(records: list[Record], kind: str, field: str) -> tuple[list[int], list[float]]:
    """Return steps and values of a field; records in which it is missing or null are left out."""
    found = [
        (record["step"], float(record[field]))
        for record in records
        if record["kind"] == kind and is_plottable(record.get(field))
    ]
    return [step for step, _ in found], [value for _, value in found]


def is_plottable(value: Any) -> bool:
    """Return whether a recorded value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def file_in(path: Path, name: str) -> Path:
    """Return `path` itself, or the file `name` in it if it is a folder."""
    return path / name if path.is_dir() else path


def optional_file(folder: Path | None, name: str) -> Path | None:
    """Return the file `name` in a step's output folder; None if there is no such folder or file."""
    path = folder / name if folder and folder.is_dir() else None
    return path if path is not None and path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a step's JSON file.

    Raises:
        UserError: the file is missing, or is not a JSON object.
    """
    hint = f"Use the output folder of the step that writes {path.name}."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}", hint=hint) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type_of(found)}, expected a JSON object", hint=hint)
    return found


@dataclass(frozen=True)
class Cost:
    """What steps and validations occupied."""

    hours: float
    unit: str  # "GPU-hours", "CPU-hours" or "process-hours"
    devices: str  # for example "8 × NVIDIA H200"

    @classmethod
    def from_records(cls, records: list[Record], config: RunConfig) -> Cost:
        """Sum the time of each attempt over the ranks and devices that it recorded.

        A GPU-hour is one GPU's, a CPU-hour one thread's. A run that recorded no device is counted
        over the recipe's processes.
        """
        attempt: Record = {"ranks": config.world_size}
        hours = 0.0
        for record in records:
            if "ranks" in record:
                attempt = record
            elif record["kind"] in ("train", "validation") and is_plottable(record.get("seconds")):
                hours += record["seconds"] * attempt["ranks"] * attempt.get("threads", 1) / 3600
        ranks = attempt["ranks"]
        if attempt.get("device") == "cuda":
            return cls(hours, "GPU-hours", f"{ranks} × {attempt['device_name']}")
        processes = _count(ranks, "process", "processes")
        if "threads" in attempt:
            threads = _count(attempt["threads"], "thread", "threads")
            return cls(hours, "CPU-hours", f"{processes} of {threads}")
        return cls(hours, "process-hours", processes)


@dataclass(frozen=True)
class Energy:
    """What the GPUs took in steps and validations, over all attempts, those repeated included."""

    kwh: float | None
    unmeasured: str = ""  # why it is None

    @classmethod
    def from_records(cls, records: list[Record]) -> Energy:
        """Sum what each record measured; one that lacks it leaves the sum unknown."""
        joules = sum_energy(records)
        if joules is not None:
            return cls(joules / 3.6e6)
        attempts = [record for record in records if "ranks" in record]
        return cls(None, next(filter(None, map(_why_unmeasured, attempts)), _NOT_ALL))


_NOT_ALL = "not every step was measured"


def _why_unmeasured(attempt: Record) -> str:
    """Return why an attempt could not measure energy; "": it could."""
    if attempt.get("device") == "cpu":
        return "a CPU has no counter that is read"
    return str(attempt.get("energy_unmeasured", ""))


@dataclass(frozen=True)
class StepCost:
    """What one step of the pipeline took, and what its accelerators cost."""

    step: str
    seconds: float
    accelerators: int  # 0: the step needs none
    hours: float  # of all its accelerators
    price: float | None  # None: no price is set, or no accelerator is used


def step_costs(run: RunArtifacts) -> list[StepCost]:
    """Return the time of each step and, of those with accelerators, their hours and price."""
    config, rows = run.config, []
    for step, seconds in run.step_seconds:
        count = {"train": config.world_size, "evaluate": config.evaluate.gpus or 1}.get(step, 0)
        hours, price = count * seconds / 3600, config.cluster.gpu_hour_price
        cost = hours * price if price is not None and count else None
        rows.append(StepCost(step, seconds, count, hours, cost))
    return rows


def notable_events(records: list[Record]) -> list[Record]:
    """Return the events that the page lists: all but checkpoints and the start."""
    return [
        record
        for record in records
        if record["kind"] == "event" and record.get("event") not in _ROUTINE_EVENTS
    ]


def count_checkpoints(records: list[Record]) -> int:
    """Return the number of checkpoints that were saved."""
    return sum(
        record["kind"] == "event" and record.get("event") == "checkpoint" for record in records
    )


def direction(evaluation: EvaluationResult) -> str | None:
    """Return how the score changed: "rose", "fell" or "stayed"; None if no row was scored."""
    before, after = evaluation.before.score, evaluation.after.score
    if before is None or after is None:
        return None
    return "rose" if after > before else "fell" if after < before else "stayed"


def find_warnings(
    config: RunConfig,
    records: list[Record],
    *,
    evaluation: EvaluationResult | None,
    merge: Mapping[str, Any] | None,
    card: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Return what a reader must not overlook, most serious first.

    Args:
        answers: lines of answers.jsonl.
    """
    summary = RunSummary.from_records(records, evaluation)
    stats = TrainingStats.from_records(records, config)
    found = []
    events = notable_events(records)
    if merge is not None and not merge.get("passed", False):
        found.append(
            "The merge verification failed: merged and adapted model disagree. "
            "Do not use the merged model."
        )
    skipped = [event["step"] for event in events if "skip" in str(event.get("event"))]
    if skipped:
        steps = ", ".join(map(str, skipped[:10]))
        found.append(f"{_count(len(skipped), 'step was', 'steps were')} skipped: {steps}.")
    missing = sorted(
        {name for record in records for name, value in record.items() if value is None}
    )
    if missing:
        names = ", ".join(missing)
        found.append(
            f"Some recorded values were not finite and are missing in the charts: {names}."
        )
    if 0 < stats.steps < stats.planned_steps:
        found.append(f"Training reached step {stats.steps} of {stats.planned_steps}.")
    found += [*_evaluation_warnings(evaluation), *describe_degenerate(answers)]
    best, last = stats.best_validation, summary.validation_loss_last
    if best and last is not None and last > _CLEARLY_WORSE * best[0]:
        found.append(
            f"Validation loss was lowest at step {best[1]} ({best[0]:.3f}) "
            f"and ended at {last:.3f}: training was too long."
        )
    found += _interruptions(events)
    if config.train.method == "lora" and merge is None:
        found.append("The adapter was not merged, so no merged model was verified.")
    bad = card.get("bad", 0)
    if bad:
        verb = "was" if bad == 1 else "were"
        found.append(
            f"{_count(bad, 'row', 'rows')} of the data could not be read and {verb} left out."
        )
    found += _lengths_warnings(card)
    near = card.get("near_duplicates", {})
    if near.get("found"):
        found.append(
            f"{near['found']} of {near['checked']} held-out rows are near duplicates of a training "
            "row, so the score says less about new rows. The data card has examples."
        )
    return found


def _lengths_warnings(card: Mapping[str, Any]) -> list[str]:
    """Return what `data.seq_length` left out of the data."""
    found = []
    if too_long := card.get("too_long", 0):
        found.append(
            f"{_count(too_long, 'example', 'examples')} of the data left no space for a response "
            f"in data.seq_length ({card['seq_length']:,}): nothing was learned from them."
        )
    cut, kept = card.get("cut", 0), card.get("kept", 0)
    if cut > _MANY_CUT * kept:
        found.append(
            f"{cut:,} of {kept:,} responses were cut at data.seq_length ({card['seq_length']:,}): "
            "their ends were not learned."
        )
    return found


def _evaluation_warnings(evaluation: EvaluationResult | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated: it is unknown whether the tuned model answers better."]
    found = []
    if evaluation.after.cut:
        found.append(
            f"{evaluation.after.cut} answers of the tuned model were cut at "
            f"evaluate.max_new_tokens ({evaluation.max_new_tokens})."
        )
    other = evaluation.forgetting
    if other is not None and other.verdict == "worse":
        found.append(
            f"Forgetting: on {other.scored} rows of {other.name} the tuned model scores "
            f"{other.score_after:.1%}, the base {other.score_before:.1%} (p = {other.p_value:.2g})."
        )
    if not evaluation.scored:
        if evaluation.answer_pattern is None or not evaluation.judges:
            return found  # switched off: nothing to overlook
        return [*found, f"{evaluation.title} is left out: {evaluation.unscored_reason}."]
    change = f"{evaluation.gained} gained, {evaluation.lost} lost, p = {evaluation.p_value:.2f}"
    if direction(evaluation) == "fell":
        return [_fall(evaluation), *found]
    if evaluation.verdict == "undecided" and direction(evaluation) != "stayed":
        found.insert(
            0,
            f"{evaluation.scored} rows are too few to be sure of the change in "
            f"{evaluation.measure}: {change}.",
        )
    found += [f"{line}." for line in too_few(evaluation.scored)]
    return found


def _fall(evaluation: EvaluationResult) -> str:
    before, after = evaluation.before, evaluation.after
    if before.correct is None or evaluation.repeats > 1:
        return f"{evaluation.title} fell from {before.score:.1%} to {after.score:.1%}."
    fall = f"{before.correct} to {after.correct} of {evaluation.scored} rows"
    return f"{evaluation.title} fell from {fall}."


def _interruptions(events: list[Record]) -> list[str]:
    found = []
    restarts = [event["step"] for event in events if event.get("event") in _RESTARTS]
    if restarts:
        times = "once" if len(restarts) == 1 else f"{len(restarts)} times"
        steps = ", ".join(map(str, restarts[:10]))
        found.append(f"Training was interrupted and resumed {times}, from step {steps}.")
    damaged = [event["step"] for event in events if event.get("event") == "damaged_checkpoint"]
    if damaged:
        checkpoints = _count(len(damaged), "checkpoint was", "checkpoints were")
        found.append(f"{checkpoints} damaged and skipped; see the events.")
    return found


def plan_rows(plan: Mapping[str, Any], stats: TrainingStats) -> list[dict[str, Any]]:
    """Return planned and measured values of what both have; `unit` names the format."""
    pairs = (
        ("Step time", "s", "step_seconds", stats.step_seconds),
        ("Model FLOPs utilization", "share", "model_flops_utilisation", stats.mfu),
        ("Memory per accelerator, peak", "bytes", "memory_bytes", stats.memory_bytes),
    )
    return [
        {
            "title": title,
            "unit": unit,
            "planned": plan[name],
            "measured": measured,
            "ratio": measured / plan[name],
        }
        for title, unit, name, measured in pairs
        if measured is not None and plan.get(name)
    ]


def unique_names(runs: Sequence[RunArtifacts]) -> list[str]:
    """Return each run's name, followed by a number if an earlier run has the same name."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 2
        while name in names:
            name, number = f"{run.name} ({number})", number + 1
        names.append(name)
    return names


def differing_settings(runs: Sequence[RunArtifacts]) -> list[dict[str, Any]]:
    """Return settings that differ: {"key", "values"}, None where a run has no such setting."""
    found = [flatten(run.config.model_dump(mode="json")) for run in runs]
    rows = []
    for key in dict.fromkeys(key for each in found for key in each):
        values = [each.get(key) for each in found]
        if not key.startswith(_NOT_COMPARED) and any(value != values[0] for value in values):
            rows.append({"key": key, "values": values})
    return rows


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"

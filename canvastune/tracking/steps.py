"""steps.json: how the attempts and the steps of a run went, and what MLflow shows of them.

RUN/steps.json                 a run's attempts, and its steps over all of them
    .tracking/published.json   what MLflow has of them; if it is lost, everything is sent again
              STEP/            tables that only MLflow shows
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from canvastune.errors import UserError
from canvastune.io.json_text import write_json
from canvastune.tracking.client import TrackingError, file_lock, log

Step = Literal[
    "resolve", "prepare_data", "plan", "train", "merge_lora", "evaluate", "report", "finish"
]
STEPS: tuple[Step, ...] = get_args(Step)  # in the order in which they are published
PIPELINE_STEPS = ("resolve", "finish")  # they start and end the pipeline run: no nested run
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's
_AT_THE_END: tuple[Step, ...] = ("report", "finish")  # their words are of one attempt only
LOST = "its process was killed, or its machine stopped: nothing was recorded at its end"


@dataclass
class Attempt:
    """One attempt at a run: a pipeline job, start to finish."""

    job: str
    started: float  # Unix seconds
    host: str = ""  # and process, of a run on one machine; a cluster's attempts have neither
    process: int = 0
    command: str = ""  # the one that resumes the run
    directory: str = ""  # in which it was typed
    ended: float | None = None
    status: str = RUNNING
    step: str = ""  # the one that failed, or was interrupted
    reason: str = ""


@dataclass
class StepRecord:
    """One step of a run, over all its attempts."""

    started: float  # Unix seconds
    ended: float | None = None
    status: str = RUNNING
    error: str = ""  # of the last attempt that failed
    attempt: int = 0  # the number of the newest one, from 1
    seconds: float = 0.0  # that its attempts took; of a killed one nothing is known
    # What MLflow shows, by kind (see publish.py), in the order in which the step recorded it. Kinds
    # that start with "run/" are shown on the pipeline run. Paths are relative to the run directory.
    shows: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class RunRecords:
    """The content of steps.json."""

    attempts: list[Attempt] = field(default_factory=list)
    steps: dict[Step, StepRecord] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether the newest attempt has no end."""
        return bool(self.attempts) and self.attempts[-1].status == RUNNING


def tracking_directory(run_directory: Path) -> Path:
    """Return the directory of what only tracking reads and writes."""
    return run_directory / ".tracking"


def read_records(run_directory: Path, job: str | None = None) -> RunRecords:
    """Return what was recorded of a run.

    Args:
        job: the one that the run is known by; records of another one do not count. None: any.
    """
    tree = read_json(run_directory / "steps.json")
    if job is not None and tree.get("job") != job:
        return RunRecords()
    try:
        attempts, found = tree.get("attempts", []), tree.get("steps", {})
        return RunRecords(
            [Attempt(**attempt) for attempt in attempts],
            {step: StepRecord(**found[step]) for step in STEPS if step in found},
        )
    except (TypeError, KeyError, AttributeError) as error:
        log.warning("%s: not a record of steps (%r)", run_directory / "steps.json", error)
        return RunRecords()


def update_step(
    run_directory: Path, job: str, step: Step, change: Callable[[StepRecord], None], what: str
) -> None:
    """Change the record of a step, created if necessary.

    Args:
        what: what MLflow will lack if the record cannot be written.
    """

    def change_step(records: RunRecords) -> None:
        record = records.steps.setdefault(step, StepRecord(time.time()))
        record.attempt = len(records.attempts)
        change(record)

    update_records(run_directory, job, change_step, f"{what} of {step}")


def update_records(
    run_directory: Path, job: str, change: Callable[[RunRecords], None], what: str
) -> None:
    """Change what is recorded of a run; a disk that is full costs a warning.

    Args:
        what: what MLflow will lack if the record cannot be written.
    """
    path = run_directory / "steps.json"
    try:
        with file_lock(tracking_directory(run_directory) / "steps.lock"):
            records = read_records(run_directory, job)
            change(records)
            write_json(path, {"job": job, **asdict(records)}, indent=1)
    except (OSError, TrackingError) as error:
        log.warning("%s: cannot be written (%s). MLflow will lack %s", path, error, what)


def begin_attempt(run_directory: Path, job: str, attempt: Attempt) -> None:
    """Record an attempt; the one before, if it has no end, was killed, and so was its step.

    A retried step comes with the same attempt again.
    """

    def change(records: RunRecords) -> None:
        if records.attempts and records.attempts[-1].job == attempt.job:
            started = records.attempts[-1].started
            records.attempts[-1] = replace(attempt, started=started)
            return
        _end_attempt(records, KILLED, reason=LOST)
        for step in _AT_THE_END:
            records.steps.pop(step, None)
        records.attempts.append(attempt)

    update_records(run_directory, job, change, "the attempt")


def end_attempt(
    run_directory: Path, job: str, status: str, step: str = "", reason: str = ""
) -> None:
    """Record the end of the running attempt, and of its steps that have none: they were killed.

    Args:
        step: the one that failed or was interrupted; "": the one whose record says so.
        reason: why, if the step recorded nothing.
    """

    def change(records: RunRecords) -> None:
        if not records.attempts:  # started by an earlier version
            started = min((step.started for step in records.steps.values()), default=time.time())
            records.attempts.append(Attempt(job, started))
        _end_attempt(records, status, step, reason)

    update_records(run_directory, job, change, f"the status {status}")


def _end_attempt(records: RunRecords, status: str, step: str = "", reason: str = "") -> None:
    found = {str(name): record for name, record in records.steps.items()}
    lost = [name for name, record in found.items() if record.status == RUNNING]
    now = time.time()
    for name in lost:  # the process was killed
        found[name].status, found[name].ended = KILLED, max(now, found[name].started)
    last = records.attempts[-1] if records.attempts else None
    if last is None or last.status not in (RUNNING, status):
        return
    if last.status == RUNNING:
        last.status, last.ended = status, max(now, last.started)  # the clock may have gone back
    if status == FINISHED:
        return
    stopped = {
        name: record.ended or 0
        for name, record in found.items()
        if record.status in (FAILED, KILLED) and record.attempt == len(records.attempts)
    }
    last.step = last.step or step or max(stopped, key=lambda name: stopped[name], default="")
    if last.step in lost and status == FAILED:
        reason = LOST
    elif last.step in stopped and found[last.step].status == FAILED:
        reason = found[last.step].error.removeprefix("UserError: ")
    last.reason = last.reason or reason


def format_reason(error: BaseException) -> str:
    """Return an error as a record of it: its message, and what to do about it."""
    hint = f"\n{error.hint}" if isinstance(error, UserError) and error.hint else ""
    return f"{error}{hint}"[:5000]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; {} if there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}

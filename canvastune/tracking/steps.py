"""steps.json: how each step of a run went and what MLflow shows of it, kept in the run directory.

RUN/steps.json                 the steps of the pipeline job that works here
    .tracking/published.json   what MLflow has of them; if it is lost, everything is sent again
              STEP/            tables that only MLflow shows
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from canvastune.io.json_text import to_json_text
from canvastune.tracking.client import TrackingError, file_lock, log

Step = Literal[
    "resolve", "prepare_data", "plan", "train", "merge_lora", "evaluate", "report", "finish"
]
STEPS: tuple[Step, ...] = get_args(Step)  # in the order in which they are published
PIPELINE_STEPS = ("resolve", "finish")  # they start and end the pipeline run: no nested run
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's


@dataclass
class StepRecord:
    """One step of a run, over all its attempts."""

    started: float  # Unix seconds
    ended: float | None = None
    status: str = RUNNING
    error: str = ""  # of the last attempt that failed
    # What MLflow shows, by kind (see publish.py), in the order in which the step recorded it. Kinds
    # that start with "run/" are shown on the pipeline run. Paths are relative to the run directory.
    shows: dict[str, dict[str, Any]] = field(default_factory=dict)


def tracking_directory(run_directory: Path) -> Path:
    """Return the directory of what only tracking reads and writes."""
    return run_directory / ".tracking"


def read_steps(run_directory: Path, job: str) -> dict[Step, StepRecord]:
    """Return what the steps of a pipeline job recorded; an earlier job's records do not count."""
    tree = read_json(run_directory / "steps.json")
    try:
        found = tree["steps"] if tree.get("job") == job else {}
        return {step: StepRecord(**found[step]) for step in STEPS if step in found}
    except (TypeError, KeyError, AttributeError) as error:
        log.warning("%s: not a record of steps (%r)", run_directory / "steps.json", error)
        return {}


def update_step(
    run_directory: Path, job: str, step: Step, change: Callable[[StepRecord], None], what: str
) -> None:
    """Change the record of a step, created if necessary; a disk that is full costs a warning.

    Args:
        what: what MLflow will lack if the record cannot be written.
    """
    path = run_directory / "steps.json"
    try:
        with file_lock(tracking_directory(run_directory) / "steps.lock"):
            steps = read_steps(run_directory, job)
            change(steps.setdefault(step, StepRecord(time.time())))
            tree = {"job": job, "steps": {name: asdict(record) for name, record in steps.items()}}
            write_json(path, tree)
    except (OSError, TrackingError) as error:
        log.warning(
            "%s: cannot be written (%s). MLflow will lack %s of %s", path, error, what, step
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; {} if there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write an object to a file, completely or not at all. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(to_json_text(tree, indent=1), encoding="utf-8")
    partial.replace(path)

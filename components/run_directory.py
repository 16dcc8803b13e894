"""The folder of one run on the workspace: where its steps leave what outlives their pods.

WORKSPACE/runs/RUN/run.json     whose folder this is, and whether the run is finished
                   train/       checkpoints, metrics.jsonl, adapter/ or model/
                   model/       the merged checkpoint (LoRA)
                   data/ plan/ evaluation/    what the report shows of them: card, plan, answers
                   report/      report.html and PNGs
                   summary.json the run's main figures
                   unsent/      what MLflow did not take; there only while something waits
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.tracking import PipelineRun

if TYPE_CHECKING:
    from kfp.dsl import Model


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds."""

    job_id: str  # the pipeline job that works here
    config: str  # JSON text
    data_fingerprint: str
    mlflow_run_id: str = ""
    finished: bool = False


def run_directory(workspace: str, run_name: str, job_name: str) -> Path:
    """The folder of a run, by its name or, where it has none, by that of its pipeline job.

    Raises:
        UserError: no workspace, or a name that cannot be a folder's.
    """
    name = run_name or job_name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"run name {name!r}: expected letters, digits, '-', '_' and '.', beginning with one of the first two. Choose such")
    if not Path(workspace).is_dir():
        raise UserError(f"workspace {workspace}: no such folder. Mount the volume there, or give the folder where it is mounted")
    return Path(workspace).absolute() / "runs" / name


def workspace_of(folder: Path | str) -> Path:
    """The workspace that a run's folder lies in."""
    return Path(folder).parent.parent


def read_record(folder: Path) -> RunRecord | None:
    """The record of the run whose folder this is; None where no run has begun. Raises: UserError, another file of that name."""
    path = folder / "run.json"
    try:
        return RunRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a run's record ({error}). Give another folder or run name, or move this one away") from None


def run_id_of(folder: Path) -> str:
    """What the jobs of a run are found by: its pipeline job."""
    record = read_record(folder)
    return record.job_id if record else folder.name


def with_tracking_uri(config: RunConfig, folder: Path | str, mlflow_run_id: str) -> PipelineRun:
    """A run as MLflow's records know it.

    Args:
        mlflow_run_id: its run in MLflow; "" if it is not known yet.
    """
    return PipelineRun(config, Path(folder), run_id_of(Path(folder)), mlflow_run_id)


def write_pointer(artifact: Model, folder: Path) -> None:
    """Let an artifact stand for a model of the workspace: tens of GB that Kubeflow's object store need not hold.

    The artifact is a file with the folder's path. An address of its own, outside of the object store, is refused by the launcher of
    the next step.
    """
    Path(artifact.path).write_text(json.dumps({"folder": str(folder)}) + "\n", encoding="utf-8")
    artifact.metadata["folder"] = str(folder)


def read_pointer(artifact: Model) -> Path:
    """The folder that an artifact stands for."""
    return Path(json.loads(Path(artifact.path).read_text(encoding="utf-8"))["folder"])


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json`, whole or not at all. Raises: UserError, a place that cannot be written."""
    partial = folder / f".run.json-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        partial.rename(folder / "run.json")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Give a workspace where you may write and that has room") from None

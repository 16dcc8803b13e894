"""The directory of one run on the workspace, which keeps what outlives the pods of its steps.

WORKSPACE/runs/RUN/run.json     the record: pipeline job, config, whether the run is finished
                   train/       checkpoints, metrics.jsonl, adapter/ or model/
                   model/       the merged checkpoint (LoRA)
                   data/ plan/ evaluation/    for the report: card, plan, answers
                   report/      report.html and PNGs
                   summary.json the run's main figures
                   steps.json   how each step went, and what MLflow shows of it
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.io.json_text import write_json
from canvastune.tracking import PipelineRun

if TYPE_CHECKING:
    from kfp.dsl import Model

BASE_RESULTS = ".base-results"  # next to the runs: answers and losses of bases, for all of them


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`."""

    job_id: str  # the pipeline job that writes here
    config: str  # JSON text
    data_fingerprint: str
    mlflow_run_id: str = ""
    finished: bool = False
    first_job: str = ""  # that of the first attempt, by which MLflow knows the run

    @property
    def known_as(self) -> str:
        """The pipeline job that identifies the run over all its attempts."""
        return self.first_job or self.job_id


def run_directory(workspace: str, run_name: str, job_name: str) -> Path:
    """Return the directory of a run, by its name or, if that is empty, its pipeline job's.

    Raises:
        UserError: no workspace, or an invalid name.
    """
    name = run_name or job_name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"run_name: invalid name {name!r}",
            hint="Use letters, digits, '-', '_' and '.'; start with a letter or digit.",
        )
    if not Path(workspace).is_dir():
        raise UserError(
            f"workspace: no such directory: {workspace}",
            hint="Mount the volume there, or set the directory where it is mounted.",
        )
    return Path(workspace).absolute() / "runs" / name


def workspace_of(folder: Path | str) -> Path:
    """Return the workspace that contains a run's directory."""
    return Path(folder).parent.parent


def read_record(folder: Path) -> RunRecord | None:
    """Read the record of a run's directory; None if no run has started there.

    Raises:
        UserError: run.json is not a run's record.
    """
    path = folder / "run.json"
    try:
        return RunRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a run's record ({error})",
            hint="Use another directory or run name, or move this one.",
        ) from None


def read_run_id(folder: Path) -> str:
    """Return the id that labels the run's jobs: that of its pipeline job."""
    record = read_record(folder)
    return record.job_id if record else folder.name


def pipeline_run(config: RunConfig, folder: Path | str, mlflow_run_id: str) -> PipelineRun:
    """Return the run of this folder, with what identifies it in MLflow.

    Args:
        mlflow_run_id: its run in MLflow; "" if it is not known yet.
    """
    record = read_record(Path(folder))
    job = record.known_as if record else Path(folder).name
    return PipelineRun(config, Path(folder), job, mlflow_run_id)


def write_pointer(artifact: Model, folder: Path) -> None:
    """Write an artifact that points to a model on the workspace.

    The model's tens of GB stay out of Kubeflow's object store. The artifact is a file with the
    directory's path: the next step's launcher rejects a URI outside of the object store.
    """
    Path(artifact.path).write_text(json.dumps({"folder": str(folder)}) + "\n", encoding="utf-8")
    artifact.metadata["folder"] = str(folder)


def read_pointer(artifact: Model) -> Path:
    """Return the directory that an artifact points to."""
    return Path(json.loads(Path(artifact.path).read_text(encoding="utf-8"))["folder"])


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json` atomically. Raises: UserError, if the directory is not writable."""
    try:
        write_json(folder / "run.json", asdict(record))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write ({error.strerror})",
            hint="Use a workspace that you can write to and that has free space.",
        ) from None

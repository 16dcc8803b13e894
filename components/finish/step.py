"""Mark a run as finished or failed, in its directory and in MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from canvastune import tracking
from canvastune.config import parse_config
from canvastune.errors import UserError
from canvastune.tracking.client import connect
from components.jobs.launcher import delete_jobs
from components.run_directory import pipeline_run, read_record, run_directory, write_record

_WELL = (
    "COMPLETE",
    "SUCCEEDED",
)  # how Kubeflow's launcher on a cluster, and its local runner, call tasks that ended well


def finish(workspace: str, run_name: str, job_name: str, job_id: str, state: str) -> None:
    """Mark a pipeline job's run as finished or failed, and delete its jobs on a cluster.

    A job that failed before it got a run directory leaves nothing to mark.

    Args:
        state: of the job's other tasks, as Kubeflow names it.

    Raises:
        UserError: as `run_directory`.
    """
    folder = run_directory(workspace, run_name, job_name)
    record = read_record(folder)
    if record is None or record.job_id != job_id:
        return
    config, succeeded = parse_config(record.config), state in _WELL
    delete_jobs(config, job_id)
    run = pipeline_run(config, folder, record.mlflow_run_id)
    pending = tracking.finish(run, failed=not succeeded)
    write_record(folder, replace(record, finished=succeeded))
    if pending:
        print(f"{folder}: MLflow lacks a part of it. When it is back: canvastune sync {folder}")
    unfinished = "not finished; run it again with the same name and recipe to resume"
    print(f"{folder}: {'finished' if succeeded else unfinished}")


def sync(folder: Path) -> str:
    """Send MLflow what it lacks of a run; return a line that says so.

    Raises:
        UserError: not the directory of a run; MLflow still lacks something.
    """
    record = read_record(folder)
    if record is None:
        raise UserError(
            f"{folder}: not a run's directory: expected run.json in it",
            hint="Pass WORKSPACE/runs/RUN.",
        )
    run = pipeline_run(parse_config(record.config), folder.absolute(), record.mlflow_run_id)
    if reasons := tracking.sync(run):
        raise UserError(
            f"{folder}: not sent yet: {'; '.join(reasons)}",
            hint="Fix the cause and run the command again.",
        )
    return f"{folder}: MLflow at {connect(run.uri)} has everything"

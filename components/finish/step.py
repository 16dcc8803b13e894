"""Mark a run as finished or failed, in its directory and in MLflow."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from canvastune import tracking
from canvastune.config import parse_config
from canvastune.errors import UserError
from canvastune.tracking.client import connect
from canvastune.tracking.steps import (
    FAILED,
    FINISHED,
    KILLED,
    LOST,
    RUNNING,
    Attempt,
    read_records,
)
from components.jobs.launcher import delete_jobs
from components.run_directory import pipeline_run, read_record, run_directory, write_record
from components.run_owner import find_owner, own_run, owner_of_this_step

# How Kubeflow's launcher on a cluster, and its local runner, call tasks that ended well, and a run
# that a person ended.
_WELL = ("COMPLETE", "SUCCEEDED")
_CANCELED = ("CANCELED", "CANCELLED", "CANCELING", "CANCELLING")  # codespell:ignore


def finish(
    workspace: str, run_name: str, job_name: str, job_id: str, state: str, reason: str = ""
) -> None:
    """Mark a pipeline job's run as finished or failed, and delete its jobs on a cluster.

    A job that failed before it got a run directory leaves nothing to mark.

    Args:
        state: of the job's other tasks, as Kubeflow names it.
        reason: of a failure, as Kubeflow knows it.

    Raises:
        UserError: as `run_directory`.
    """
    folder = run_directory(workspace, run_name, job_name)
    record = read_record(folder)
    if record is None or record.job_id != job_id:
        return
    delete_jobs(parse_config(record.config), job_id)
    status = FINISHED if state in _WELL else KILLED if state in _CANCELED else FAILED
    if owner_of_this_step(folder):  # which knows more than Kubeflow's local runner says
        reason = ""
    if close_run(folder, status, reason=reason):
        print(f"{folder}: MLflow lacks a part of it. When it is back: canvastune sync {folder}")
    unfinished = "not finished; run it again with the same name and recipe to resume"
    print(f"{folder}: {'finished' if status == FINISHED else unfinished}")


def close_run(folder: Path, status: str, step: str = "", reason: str = "") -> list[str]:
    """Record how an attempt at a run ended, in its directory and in MLflow; once is enough.

    Args:
        status: FINISHED, FAILED or KILLED.
        step: the one that failed or was interrupted, if it recorded nothing itself.
        reason: why, if that step recorded nothing.

    Returns:
        What MLflow lacks; nothing, if no run has started in this directory.
    """
    record = read_record(folder)
    if record is None:
        return []
    run = pipeline_run(parse_config(record.config), folder, record.mlflow_run_id)
    pending = tracking.finish(run, status, step, reason)
    finished, mlflow_run_id = record.finished or status == FINISHED, tracking.run_id(run)
    write_record(folder, replace(record, finished=finished, mlflow_run_id=mlflow_run_id))
    return pending


def close_own_run(folder: Path, status: str, step: str = "", reason: str = "") -> None:
    """Record how the attempt ended that this process owns.

    A run that refused this process, as it is finished or has another recipe, is left as it is.
    """
    last = _last_attempt(folder)
    if last and (last.host, last.process) == (socket.gethostname(), os.getpid()):
        close_run(folder, status, step, reason)


def _last_attempt(folder: Path) -> Attempt | None:
    record = read_record(folder)
    attempts = read_records(folder, record.known_as).attempts if record else []
    return attempts[-1] if attempts else None


def close_lost_attempt(folder: Path) -> bool:
    """End an attempt whose process was killed on this machine, so that nothing counts as running.

    Returns:
        Whether there was one.
    """
    last = _last_attempt(folder)
    if last is None or last.status != RUNNING or last.host != socket.gethostname():
        return False
    with own_run(folder):
        close_run(folder, KILLED, reason=LOST)
    return True


def sync(folder: Path) -> str:
    """Send MLflow what it lacks of a run; return a line that says so.

    A local run whose process was killed no longer counts as running.

    Raises:
        UserError: not the directory of a run; MLflow still lacks something.
    """
    record = read_record(folder)
    if record is None:
        raise UserError(
            f"{folder}: not a run's directory: expected run.json in it",
            hint="Pass WORKSPACE/runs/RUN.",
        )
    if find_owner(folder) is None:
        close_lost_attempt(folder.absolute())
    run = pipeline_run(parse_config(record.config), folder.absolute(), record.mlflow_run_id)
    if reasons := tracking.sync(run):
        raise UserError(
            f"{folder}: not sent yet: {'; '.join(reasons)}",
            hint="Fix the cause, which `canvastune doctor` explains, and run the command again.",
        )
    return f"{folder}: MLflow at {connect(run.uri)} has everything"

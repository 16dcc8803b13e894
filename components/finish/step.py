"""Closes a run's books: its folder's record and its MLflow run say how it ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from canvastune import tracking
from canvastune.config import parse_config
from canvastune.errors import UserError
from canvastune.tracking.client import connect
from components.jobs.launcher import delete_jobs
from components.run_directory import read_record, run_directory, with_tracking_uri, write_record

_WELL = ("COMPLETE", "SUCCEEDED")  # how Kubeflow's launcher on a cluster, and its local runner, call tasks that ended well


def finish(workspace: str, run_name: str, job_name: str, job_id: str, state: str) -> None:
    """Mark the run of a pipeline job finished or failed, and end what it still trains on a cluster.

    A job that did not get as far as a folder of its own leaves nothing to close.

    Args:
        state: of the job's other tasks, in Kubeflow's words.

    Raises:
        UserError: as `run_folder`.
    """
    folder = run_directory(workspace, run_name, job_name)
    record = read_record(folder)
    if record is None or record.job_id != job_id:
        return
    config, succeeded = parse_config(record.config), state in _WELL
    delete_jobs(config, job_id)
    tracking.finish(with_tracking_uri(config, folder, record.mlflow_run_id), failed=not succeeded)
    write_record(folder, replace(record, finished=succeeded))
    if (folder / "unsent").exists():
        print(f"{folder}: MLflow lacks a part of it. When it is back: canvastune sync {folder}")
    print(f"{folder}: {'finished' if succeeded else 'not finished; a run of this name and recipe goes on from what is done'}")


def sync(folder: Path) -> str:
    """Send MLflow what it did not take while a run was made; returns a line that says so.

    Raises:
        UserError: not the folder of a run; something still waits.
    """
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder}: not a run's folder: expected run.json in it. Give WORKSPACE/runs/RUN")
    run = with_tracking_uri(parse_config(record.config), folder.absolute(), record.mlflow_run_id)
    if reasons := tracking.sync(run):
        raise UserError(f"{folder / 'unsent'}: still waits: {'; '.join(reasons)}. Give the same command again once this is mended")
    return f"{folder}: MLflow at {connect(run.uri)} has everything"

"""Closes a run's books: its folder's record and its MLflow run say how it ended."""

from __future__ import annotations

from dataclasses import replace

from canvastune import tracking
from canvastune.config import parse_config
from components.jobs.launcher import withdraw
from components.run_folder import read_record, run_folder, workspace_of, write_record


def finish(workspace: str, run_name: str, job_name: str, job_id: str, succeeded: bool) -> None:
    """Mark the run of a pipeline job finished or failed, and end what it still trains on a cluster.

    A job that did not get as far as a folder of its own leaves nothing to close.

    Raises:
        UserError: as `run_folder`.
    """
    folder = run_folder(workspace, run_name, job_name)
    record = read_record(folder)
    if record is None or record.job_id != job_id:
        return
    config = parse_config(record.config)
    withdraw(config, job_id)
    tracking.finish_parent(config, record.mlflow_run_id or None, workspace=workspace_of(folder), failed=not succeeded)
    write_record(folder, replace(record, finished=succeeded))
    print(f"{folder}: {'finished' if succeeded else 'not finished; a run of this name and recipe goes on from what is done'}")

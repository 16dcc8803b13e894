"""Find a pipeline run's run and its steps' nested runs by their tags; create them if necessary."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.config import RunConfig
from canvastune.tracking import descriptions
from canvastune.tracking.client import TrackingClient, load_mlflow, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
PIPELINE_RUN, STEP = "canvastune.pipeline_run", "canvastune.step"


@dataclass(frozen=True)
class PipelineRun:
    """One run of the pipeline: its config and run directory, and how MLflow finds it."""

    config: RunConfig
    folder: Path  # WORKSPACE/runs/NAME
    job: str  # the pipeline job: with the name, the key of the run in MLflow
    parent: str = ""  # id of that run; "": unknown, since MLflow was down when the run started

    @property
    def uri(self) -> str:
        """Tracking server of the run."""
        return tracking_uri(self.config, self.folder.parent.parent)


class RunIds:
    """Ids of a pipeline run's runs in MLflow. A run that does not exist is created."""

    def __init__(self, server: TrackingClient, run: PipelineRun, step: str | None = None) -> None:
        """
        Args:
            step: what this process does: MLFLOW_RUN_ID, if Kubeflow sets it, is this step's run.
        """
        self.server, self.run = server, run
        self._step = step
        self.known: dict[str, str] = {"": run.parent} if run.parent else {}

    def find(self, client: MlflowClient, step: str, started: float) -> str:
        """Return the id of a step's run, or of the pipeline run's ("").

        Args:
            started: Unix seconds: start of the run, if it is created now.
        """
        if step not in self.known:
            self.known[step] = (
                self._nested(client, step, started) if step else self._parent(client, started)
            )
        return self.known[step]

    def forget_missing(self, client: MlflowClient) -> None:
        """Forget the pipeline run's id from run.json if this MLflow does not have that run: its
        database may be another one since. `find` then looks for the run, or creates it.
        """
        if self.known.get("") != self.run.parent or not self.run.parent:
            return
        try:
            client.get_run(self.run.parent)
        except load_mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.known.clear()

    def existing(self, client: MlflowClient, step: str) -> str | None:
        """Return the id of a step's run, if it has one."""
        return self.known.get(step) or _find_nested(client, self.find(client, "", 0), step)

    def _parent(self, client: MlflowClient, started: float) -> str:
        """Return the run of KFP's plugin, the one that an earlier step created, or a new one."""
        # The plugin's run of this task, below the pipeline's.
        given = os.environ.get("MLFLOW_RUN_ID")
        if given:
            return client.get_run(given).data.tags.get(PARENT) or given
        experiment = self.server.experiment(self.run.config.tracking.experiment)
        key = f"{self.run.folder.name}/{self.run.job}"
        query, order = f"tags.`{PIPELINE_RUN}` = '{key}'", ["attributes.start_time ASC"]

        def find() -> Run | None:
            runs = client.search_runs([experiment], query, order_by=order)
            return min(runs, key=lambda r: (r.info.start_time, r.info.run_id), default=None)

        if (run := find()) is not None:
            return str(run.info.run_id)
        start, name = int(started * 1000) or None, self.run.folder.name
        created = client.create_run(experiment, start, {PIPELINE_RUN: key}, run_name=name)
        first = find() or created
        if first.info.run_id != created.info.run_id:  # two steps at once: both take the older run
            client.delete_run(created.info.run_id)
        return str(first.info.run_id)

    def _nested(self, client: MlflowClient, step: str, started: float) -> str:
        parent = self.find(client, "", started)
        found = _find_nested(client, parent, step)
        if found:
            return found
        name = f"{self.run.folder.name}: {step}"
        tags = {STEP: step, descriptions.NOTE: descriptions.STEP_NOTES[step], **origin(self.run)}
        given = os.environ.get("MLFLOW_RUN_ID") if step == self._step else None
        if given and client.get_run(given).data.tags.get(PARENT) == parent:
            for key, value in tags.items():
                client.set_tag(given, key, value)
            client.update_run(given, name=name)
            return given
        experiment = client.get_run(parent).info.experiment_id
        start = int(started * 1000) or None
        run = client.create_run(experiment, start, {PARENT: parent, **tags}, run_name=name)
        return str(run.info.run_id)


def origin(run: PipelineRun) -> dict[str, str]:
    """Return the tags that MLflow shows as a run's creator, source and version."""
    tags = {
        "mlflow.source.name": f"canvastune {run.config.name}",
        "mlflow.source.type": "PROJECT",
    }
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the checkout that holds this package; None if there is none."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()
    return None


def _find_nested(client: MlflowClient, parent: str, step: str) -> str | None:
    experiment = client.get_run(parent).info.experiment_id
    query = f"tags.`{PARENT}` = '{parent}' and tags.`{STEP}` = '{step}'"
    found = client.search_runs([experiment], query, max_results=1)
    return found[0].info.run_id if found else None

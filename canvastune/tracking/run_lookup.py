"""A parent run per pipeline run and a nested run per step, found again by their tags: steps are processes that share nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.config import RunConfig
from canvastune.tracking import descriptions
from canvastune.tracking.client import TrackingClient, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
PIPELINE_RUN, STEP = "canvastune.pipeline_run", "canvastune.step"


@dataclass(frozen=True)
class PipelineRun:
    """One run of the pipeline, as each of its steps knows it."""

    config: RunConfig
    folder: Path  # WORKSPACE/runs/NAME
    job: str  # the pipeline job: with the name, what the run in MLflow is found by
    parent: str = ""  # id of that run; "": not known, since MLflow was away when the first step came

    @property
    def uri(self) -> str:
        """Where its MLflow is."""
        return tracking_uri(self.config, self.folder.parent.parent)


class RunIds:
    """Ids of a pipeline run's runs in MLflow. A run that is not there yet is made."""

    def __init__(self, server: TrackingClient, run: PipelineRun, step: str | None = None) -> None:
        """
        Args:
            step: what this process does: MLFLOW_RUN_ID, where Kubeflow sets it, is this step's run.
        """
        self.server, self.run = server, run
        self._step = step
        self.known: dict[str, str] = {"": run.parent} if run.parent else {}

    def find(self, client: MlflowClient, step: str, began: float) -> str:
        """The id of a step's run, or of the pipeline run's ("").

        Args:
            began: Unix seconds: when the run begins, if it is made now.
        """
        if step not in self.known:
            self.known[step] = self._nested(client, step, began) if step else self._parent(client, began)
        return self.known[step]

    def later(self, step: str) -> Callable[[MlflowClient], str]:
        """What finds a step's run, which begins now, once MLflow is there."""
        began = time.time()
        return lambda client: self.find(client, step, began)

    def existing(self, client: MlflowClient, step: str) -> str | None:
        """The id of a step's run, if it has one."""
        return self.known.get(step) or _find_nested(client, self.find(client, "", 0), step)

    def _parent(self, client: MlflowClient, began: float) -> str:
        """The run that KFP's plugin made, one that an earlier step made, or a new one."""
        given = os.environ.get("MLFLOW_RUN_ID")  # the plugin gives each task's process a run of its own below the pipeline run's
        if given:
            return client.get_run(given).data.tags.get(PARENT) or given
        experiment, key = self.server.experiment(self.run.config.tracking.experiment), f"{self.run.folder.name}/{self.run.job}"

        def find() -> Run | None:
            found = client.search_runs([experiment], f"tags.`{PIPELINE_RUN}` = '{key}'", order_by=["attributes.start_time ASC"])
            return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)

        if (run := find()) is not None:
            return str(run.info.run_id)
        made = client.create_run(experiment, int(began * 1000) or None, {PIPELINE_RUN: key}, run_name=self.run.folder.name)
        first = find() or made
        if first.info.run_id != made.info.run_id:  # two steps came at once: both take the older one
            client.delete_run(made.info.run_id)
        return str(first.info.run_id)

    def _nested(self, client: MlflowClient, step: str, began: float) -> str:
        parent = self.find(client, "", began)
        found = _find_nested(client, parent, step)
        if found:
            return found
        given = os.environ.get("MLFLOW_RUN_ID")
        if given and step == self._step and client.get_run(given).data.tags.get(PARENT) == parent:
            client.set_tag(given, STEP, step)
            return given
        tags = {PARENT: parent, STEP: step, descriptions.NOTE: descriptions.STEPS[step]}
        experiment = client.get_run(parent).info.experiment_id
        return str(client.create_run(experiment, int(began * 1000), tags, run_name=step).info.run_id)


def _find_nested(client: MlflowClient, parent: str, step: str) -> str | None:
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}' and tags.`{STEP}` = '{step}'", max_results=1)
    return found[0].info.run_id if found else None

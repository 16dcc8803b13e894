"""A parent run per pipeline run and a nested run per step, found again by their tags: steps are processes that share nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from canvastune.config import RunConfig
from canvastune.tracking.contents import StepRun, log_parameters
from canvastune.tracking.server import Server, TrackingError, connect, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Step = Literal["prepare_data", "plan", "train", "merge_lora", "evaluate", "report"]

_PIPELINE_RUN = "canvastune.pipeline_run"
_STEP = "canvastune.step"
_PARENT = "mlflow.parentRunId"
_CONFIG = "config.yaml"


def start_parent(
    config: RunConfig, *, run_name: str, pipeline_run: str, workspace: Path, tags: Mapping[str, str] | None = None
) -> str | None:
    """Id of the pipeline run's MLflow run: the one that KFP's plugin made, one that an earlier step made, or a new one.

    The first step to come describes it: tags, the flattened config as parameters, the config as a file.

    Args:
        run_name: what people call the run.
        pipeline_run: what every step of this pipeline run knows it by, such as KFP's run id.
        workspace: folder of the embedded store, if no server is named.
        tags: what else the run is to be found by, such as its address in Kubeflow.

    Returns:
        None if MLflow is away or refuses, after a warning that says why: steps go on without.
    """
    server = connect(tracking_uri(config, workspace))
    try:
        run = server.ask(_given_parent) or _find_or_make_parent(server, config, run_name, pipeline_run)
    except TrackingError as error:
        server.warn("this run's records", error)
        return None
    run_id = run.info.run_id
    if not run.data.params:
        server.call(
            "the run's description", lambda client: _describe(client, run_id, config, {_PIPELINE_RUN: pipeline_run, **(tags or {})})
        )
    return run_id


@contextlib.contextmanager
def step_run(config: RunConfig, parent: str | None, step: Step, *, workspace: Path) -> Iterator[StepRun]:
    """The nested run of a step, which ends FINISHED, or FAILED with the error as a tag if the block raises.

    A step that is tried again goes on in the run of its first attempt. With `parent` None, or with MLflow away, the
    block runs all the same.
    """
    server = connect(tracking_uri(config, workspace))
    run_id = server.call(f"the records of {step}", lambda client: _nested(client, parent, step)) if parent else None
    run = StepRun(server, config, run_id, parent)
    try:
        yield run
    except BaseException as error:
        _end(run, "FAILED" if isinstance(error, Exception) else "KILLED", f"{type(error).__name__}: {error}")
        raise
    _end(run, "FINISHED")


def finish_parent(config: RunConfig, parent: str | None, *, workspace: Path, failed: bool) -> None:
    """End the pipeline run's MLflow run, and whatever step of it still counts as running (its process was killed)."""
    if parent is None:
        return
    server = connect(tracking_uri(config, workspace))

    def finish(client: MlflowClient) -> None:
        experiment = client.get_run(parent).info.experiment_id
        for run in client.search_runs([experiment], f"tags.`{_PARENT}` = '{parent}' and attributes.status = 'RUNNING'"):
            client.set_terminated(run.info.run_id, "KILLED")
        client.set_terminated(parent, "FAILED" if failed else "FINISHED")

    server.call("the run's end", finish)


def log_data(config: RunConfig, parent: str | None, dataset: Path, *, workspace: Path) -> None:
    """Give the pipeline run its prepare_data run if it has none: a cached preparation never ran in this pipeline run."""
    if parent is None:
        return
    server = connect(tracking_uri(config, workspace))
    if server.call("the records of prepare_data", lambda client: _find_nested(client, parent, "prepare_data") is not None) is False:
        with step_run(config, parent, "prepare_data", workspace=workspace) as run:
            _log_prepared(run, dataset)


def _log_prepared(run: StepRun, dataset: Path) -> None:
    """Log a prepared data set in its own run: card, counts, the data set as an input."""
    card = json.loads((dataset / "card.json").read_text(encoding="utf-8"))
    named = ("source", "format", "fingerprint", "content_hash", "seq_length", "canvas_length", "tokenizer", "vocab_size")
    run.parameters({name: card[name] for name in named if name in card})
    counts = {name: card[name] for name in ("rows_read", "kept", "train", "validation", "cut", "seconds") if name in card}
    counts |= {f"dropped/{reason}": count for reason, count in card.get("dropped", {}).items()}
    run.metrics({f"data/{name}": count for name, count in counts.items()})
    run.dataset(dataset, "training")
    run.outputs(dataset)


def _given_parent(client: MlflowClient) -> Run | None:
    """The run of MLFLOW_RUN_ID: KFP's plugin gives each task's process a run of its own below the pipeline run's."""
    given = os.environ.get("MLFLOW_RUN_ID")
    if not given:
        return None
    run = client.get_run(given)
    above = run.data.tags.get(_PARENT)
    return client.get_run(above) if above else run


def _find_or_make_parent(server: Server, config: RunConfig, run_name: str, pipeline_run: str) -> Run:
    experiment = server.experiment(config.tracking.experiment)

    def find(client: MlflowClient) -> Run | None:
        found = client.search_runs([experiment], f"tags.`{_PIPELINE_RUN}` = '{pipeline_run}'", order_by=["attributes.start_time ASC"])
        return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)

    def find_or_make(client: MlflowClient) -> Run:
        if (run := find(client)) is not None:
            return run
        made = client.create_run(experiment, tags={_PIPELINE_RUN: pipeline_run}, run_name=run_name)
        first = find(client) or made
        if first.info.run_id != made.info.run_id:  # two steps came at once: both take the older one
            client.delete_run(made.info.run_id)
        return first

    return server.ask(find_or_make)


def _nested(client: MlflowClient, parent: str, step: str) -> str:
    run = _find_nested(client, parent, step)
    if run is None:
        given = os.environ.get("MLFLOW_RUN_ID")
        if given and client.get_run(given).data.tags.get(_PARENT) == parent:
            client.set_tag(given, _STEP, step)
            return given
        experiment = client.get_run(parent).info.experiment_id
        return client.create_run(experiment, tags={_PARENT: parent, _STEP: step}, run_name=step).info.run_id
    client.update_run(run.info.run_id, status="RUNNING")
    return run.info.run_id


def _end(run: StepRun, status: str, error: str | None = None) -> None:
    if (run_id := run.run_id) is not None:
        if error:
            run.server.call("the step's error", lambda client: client.set_tag(run_id, "canvastune.error", error[:5000]))
        run.server.call("the step's end", lambda client: client.set_terminated(run_id, status))


def _find_nested(client: MlflowClient, parent: str, step: str) -> Run | None:
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`{_PARENT}` = '{parent}' and tags.`{_STEP}` = '{step}'", max_results=1)
    return found[0] if found else None


def _describe(client: MlflowClient, run_id: str, config: RunConfig, about: Mapping[str, str]) -> None:
    tree = config.model_dump(mode="json")
    tags = {
        **about,
        "canvastune.recipe": config.name,
        "canvastune.method": config.train.method,
        "canvastune.model": config.model.id,
        "canvastune.model_revision": config.model.revision or "unspecified",
    }
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    for name, value in tags.items():
        client.set_tag(run_id, name, value)
    client.log_text(run_id, yaml.safe_dump(tree, sort_keys=False), _CONFIG)
    log_parameters(client, run_id, tree)  # last: a run with parameters counts as described


def _git_commit() -> str | None:
    """Commit of the checkout that this package lies in; None if it is installed elsewhere."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

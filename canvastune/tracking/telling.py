"""What each kind of entry does to MLflow. Doing it twice is the same as doing it once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.tracking.client import load_mlflow
from canvastune.tracking.descriptions import NOTE
from canvastune.tracking.model_registry import Score, flatten_parameters, log_model, models_of, promote, register, version_of
from canvastune.tracking.outbox import Entry
from canvastune.tracking.run_lookup import PARENT, RunIds
from canvastune.tracking.sending import metric_name, send_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PARAMETERS_IN_A_BATCH = 100  # MLflow's limit
_MAKERS = ("train", "merge_lora")  # steps that make models
_TABLES = "mlflow.loggedArtifacts"  # the tag by which MLflow's page finds tables


class Teller:
    """Tells the entries of one pipeline run."""

    def __init__(self, ids: RunIds) -> None:
        self._ids = ids
        self._config = ids.run.config
        self._ways: dict[str, Callable[[MlflowClient, str, Entry], None]] = {
            "start": lambda client, run_id, entry: _start(client, run_id),
            "tags": lambda client, run_id, entry: _set_tags(client, run_id, entry.what),
            "parameters": lambda client, run_id, entry: _log_parameters(client, run_id, entry.what),
            "metrics": _log_metrics,
            "curves": self._send_curves,
            "summary": self._summarize,
            "file": lambda client, run_id, entry: client.log_artifact(run_id, entry.what["path"]),
            "text": lambda client, run_id, entry: client.log_text(run_id, entry.what["text"], entry.what["name"]),
            "table": lambda client, run_id, entry: _log_table(client, run_id, **entry.what),
            "data set": lambda client, run_id, entry: _log_data(client, run_id, **entry.what),
            "model": self._log_model,
            "judged model": self._name_judged,
            "verdict": self._promote,
            "end": lambda client, run_id, entry: client.set_terminated(run_id, entry.what["status"], int(entry.time * 1000)),
            "finish": _finish,
        }

    def __call__(self, client: MlflowClient, entry: Entry) -> None:
        """Tell an entry. Raises whatever MLflow raises."""
        self._ways[entry.kind](client, self._ids.find(client, entry.run, entry.time), entry)

    def _models(self, client: MlflowClient) -> list[Any]:
        makers = (self._ids.existing(client, step) for step in _MAKERS)
        return models_of(client, [run_id for run_id in makers if run_id])

    def _log_model(self, client: MlflowClient, run_id: str, entry: Entry) -> None:
        kind = entry.what["kind"]
        model = log_model(client, run_id, self._ids.run, Path(entry.what["path"]), kind)
        name = self._config.tracking.registered_model
        if name and kind != "adapter":
            register(client, self._ids.server.uri, name, model)

    def _name_judged(self, client: MlflowClient, run_id: str, entry: Entry) -> None:
        models = [model for model in self._models(client) if model.model_type != "adapter"]
        client.log_inputs(run_id, models=[load_mlflow().entities.LoggedModelInput(model.model_id) for model in models])

    def _send_curves(self, client: MlflowClient, run_id: str, entry: Entry) -> None:
        file, parent = Path(entry.what["path"]), self._ids.find(client, "", entry.time)
        send_metrics(run_id, file, uri=self._ids.server.uri)
        send_metrics(parent, file, uri=self._ids.server.uri, machine=False)

    def _summarize(self, client: MlflowClient, run_id: str, entry: Entry) -> None:
        """The figures that pipeline runs are compared by, on the parent; and on its models, linked with the data set."""
        values, dataset = entry.what["values"], entry.what["dataset"]
        client.log_batch(run_id, metrics=list(_metrics(values, entry.time)))
        models = self._models(client)
        client.log_outputs(run_id, [load_mlflow().entities.LoggedModelOutput(model.model_id, 0) for model in models])
        for model in models:
            client.log_batch(run_id, metrics=list(_metrics(values, entry.time, model_id=model.model_id, **dataset)))

    def _promote(self, client: MlflowClient, run_id: str, entry: Entry) -> None:
        """Judge the registered version of this run's model, and write the outcome where people look."""
        name, note = self._config.tracking.registered_model, entry.what["note"]
        score, models = Score(**entry.what["score"]) if entry.what["score"] else None, self._models(client)
        for model in models:
            client.set_logged_model_tags(model.model_id, {NOTE: note})
        if not name:
            return
        for version in filter(None, (version_of(client, name, model) for model in models)):
            outcome = promote(client, name, version, score, self._config.tracking.promote)
            said = f"{outcome[0].upper()}{outcome[1:]}."
            client.update_model_version(name, version.version, f"{said}\n\n{note}")
            tags = {"canvastune.model_version": f"{name}/{version.version}", "canvastune.promotion": outcome}
            _set_tags(client, run_id, tags | {NOTE: f"{note}\n\n**Registered** as version {version.version} of `{name}`. {said}"})


def _start(client: MlflowClient, run_id: str) -> None:
    client.update_run(run_id, status="RUNNING")


def _finish(client: MlflowClient, run_id: str, entry: Entry) -> None:
    """End a pipeline run, and whatever step of it still counts as running: its process was killed."""
    experiment, time = client.get_run(run_id).info.experiment_id, int(entry.time * 1000)
    for run in client.search_runs([experiment], f"tags.`{PARENT}` = '{run_id}' and attributes.status = 'RUNNING'"):
        client.set_terminated(run.info.run_id, "KILLED", end_time=time)
    client.set_terminated(run_id, entry.what["status"], end_time=time)


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    client.log_batch(run_id, tags=[load_mlflow().entities.RunTag(name, value) for name, value in tags.items()])


def _log_metrics(client: MlflowClient, run_id: str, entry: Entry) -> None:
    client.log_batch(run_id, metrics=list(_metrics(entry.what["values"], entry.time, entry.what["step"])))


def _metrics(values: Mapping[str, Any], time: float, step: int = 0, **of: str) -> Iterator[Any]:
    entities = load_mlflow().entities
    for name, value in values.items():
        yield entities.Metric(metric_name(name), float(value), int(time * 1000), step, **of)


def _log_parameters(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Flattened parameters, in batches that MLflow takes."""
    parameters = [load_mlflow().entities.Param(metric_name(name), value) for name, value in flatten_parameters(values).items()]
    for start in range(0, len(parameters), _PARAMETERS_IN_A_BATCH):
        client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_IN_A_BATCH])


def _log_table(client: MlflowClient, run_id: str, name: str, columns: list[str], data: list[list[Any]]) -> None:
    """As MLflow's own log_table, which would append to what an earlier attempt has logged."""
    client.log_text(run_id, json.dumps({"columns": columns, "data": data}), name)
    client.set_tag(run_id, _TABLES, json.dumps([{"path": name, "type": "table"}]))


def _log_data(client: MlflowClient, run_id: str, context: str, **fields: str) -> None:
    entities = load_mlflow().entities
    tag = entities.InputTag("mlflow.data.context", context)
    client.log_inputs(run_id, [entities.DatasetInput(dataset=entities.Dataset(**fields), tags=[tag])])

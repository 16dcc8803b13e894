"""What a step's run holds in MLflow: parameters, metrics, files, the data set, answers, models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.config import RunConfig
from canvastune.tracking.sending import is_number, metric_name, sync_metrics
from canvastune.tracking.server import Server, load_mlflow, log

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, LoggedModel

_LONGEST_PARAMETER = 6000  # characters: MLflow's limit
_PARAMETERS_IN_A_BATCH = 100  # likewise
_LARGEST_FILE = 20 * 10**6  # bytes: an output file above this is data, and stays where it is
_LARGEST_MODEL = 200 * 10**6  # bytes: a model above this is logged as a pointer to its folder
_REGISTRATION_SECONDS = 30
_READABLE = {".json", ".jsonl", ".yaml", ".txt", ".html", ".png", ".svg"}
_MODEL_TEXTS = ("config.json", "generation_config.json", "adapter_config.json", "provenance.json", "merge_proof.json")
_COLUMNS = {
    "input_ids": "list<int32>",
    "prefix_length": "int32",
    "complete": "bool",
    "id": "string",
    "prompt": "string",
    "answer": "string",
}


class StepRun:
    """The MLflow run of a step. Without a run (`run_id` None: MLflow was away, as was said) its methods do nothing."""

    def __init__(self, server: Server, config: RunConfig, run_id: str | None, parent: str | None) -> None:
        self.server, self.config, self.run_id, self.parent = server, config, run_id, parent

    def environment(self) -> dict[str, str]:
        """Variables for a process that is to log into this run: MLFLOW_TRACKING_URI and MLFLOW_RUN_ID."""
        return {"MLFLOW_TRACKING_URI": self.server.uri, "MLFLOW_RUN_ID": self.run_id} if self.run_id else {}

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters, branches flattened to dotted names. They are immutable: the same values again are no error."""
        if (run_id := self.run_id) is not None:
            self.server.call("parameters", lambda client: log_parameters(client, run_id, values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, which a later call may change."""
        if (run_id := self.run_id) is not None:
            for name, value in values.items():
                self.server.call(f"tag {name}", partial(_set_tag, run_id, name, value))

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Log the numbers of a mapping; what is not a finite number is left out."""
        if (run_id := self.run_id) is not None:
            self.server.call("metrics", lambda client: _log_metrics(client, run_id, values, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the numbers that pipeline runs are compared by: on the step's run and on its parent."""
        self.metrics(values)
        if (parent := self.parent) is not None and self.run_id is not None:
            self.server.call("metrics", lambda client: _log_metrics(client, parent, values, 0))

    def training_metrics(self, metrics_file: Path) -> None:
        """Send what the run lacks of metrics.jsonl, for example because the server was away while training."""
        sync_metrics(self.run_id, metrics_file, uri=self.server.uri)

    def outputs(self, folder: Path) -> None:
        """Upload what people read at the top of a step's output folder: config, provenance, card, report, pictures, answers."""
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in _READABLE and file.stat().st_size <= _LARGEST_FILE:
                self.artifact(file)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload one file."""
        if (run_id := self.run_id) is not None:
            self.server.call(f"artifact {path.name}", lambda client: client.log_artifact(run_id, str(path), folder))

    def table(self, rows: list[dict[str, Any]], name: str = "answers.json") -> None:
        """Log rows as a table that MLflow's page shows and compares between runs. A repeated step replaces its table."""
        if (run_id := self.run_id) is not None and rows:
            self.server.call(f"table {name}", lambda client: _log_table(client, run_id, rows, name))

    def dataset(self, folder: Path, context: str) -> None:
        """Log a prepared data set (its card.json) as an input of this run and of its parent: name, source, digest, columns, sizes."""
        if self.run_id is None:
            return
        entities = load_mlflow().entities
        card, data = json.loads((folder / "card.json").read_text(encoding="utf-8")), self.config.data
        local = Path(data.source).exists()
        hub = {"path": data.source, "config_name": data.config, "revision": data.revision, "split": data.split}
        entity = entities.Dataset(
            name=Path(data.source).name if local else data.source,
            digest=str(card["content_hash"])[:16],
            source_type="local" if local else "hf",
            source=json.dumps({"uri": str(Path(data.source).absolute())} if local else hub),
            schema=json.dumps({"mlflow_colspec": [{"name": name, "type": kind, "required": True} for name, kind in _COLUMNS.items()]}),
            profile=json.dumps({"num_rows": card["kept"], "train": card["train"], "validation": card["validation"]}),
        )
        tagged = entities.DatasetInput(dataset=entity, tags=[entities.InputTag("mlflow.data.context", context)])
        for run_id in filter(None, (self.run_id, self.parent)):
            self.server.call("data set", partial(_log_inputs, run_id, [tagged]))

    def model(self, folder: Path, kind: str) -> None:
        """Log an adapter or a checkpoint as a LoggedModel, and register the latter if the recipe names a registered model.

        A folder above 200 MB is not uploaded: the model then holds its path and size, and its small files. The registered
        version gets the alias `candidate`.

        Args:
            kind: "adapter", "merged" or "full"; an adapter is not registered, since it is no model without its base.
        """
        if (run_id := self.run_id) is None:
            return
        model = self.server.call(f"{kind} model", lambda client: self._logged_model(client, run_id, folder, kind))
        name = self.config.tracking.registered_model
        if model is not None and name and kind != "adapter":
            self.server.call("registered model", partial(_register, self.server.uri, name, model, run_id))

    def _logged_model(self, client: MlflowClient, run_id: str, folder: Path, kind: str) -> LoggedModel:
        name = f"{self.config.name}-{kind}"
        experiment = client.get_run(run_id).info.experiment_id
        for earlier in client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{name}'"):
            if earlier.status == "READY":
                return earlier  # the step was repeated
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        whole = size <= _LARGEST_MODEL
        about = {"path": str(folder.absolute()), "size_bytes": str(size), "uploaded": str(whole).lower(), "kind": kind}
        branches = {"model": self.config.model, **({} if kind == "full" else {"lora": self.config.lora})}
        parameters = flatten({name: branch.model_dump(mode="json") for name, branch in branches.items()})
        model = client.create_logged_model(experiment, name, run_id, {f"canvastune.{k}": v for k, v in about.items()}, parameters, kind)
        if whole:
            client.log_model_artifacts(model.model_id, str(folder))
        else:
            log.info("%s: %.1f GB are not uploaded to MLflow; the logged model points to the folder", folder, size / 1e9)
            for file in (folder / text for text in _MODEL_TEXTS):
                if file.is_file():
                    client.log_model_artifact(model.model_id, str(file))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [load_mlflow().entities.LoggedModelOutput(model.model_id, 0)])
        return model


def log_parameters(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Log flattened parameters in batches that MLflow takes."""
    entities = load_mlflow().entities
    parameters = [entities.Param(metric_name(name), value) for name, value in flatten(values).items()]
    for start in range(0, len(parameters), _PARAMETERS_IN_A_BATCH):
        client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_IN_A_BATCH])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and texts of a tree's leaves, cut at the length that MLflow takes."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)[:_LONGEST_PARAMETER]
    return flat


def _set_tag(run_id: str, name: str, value: str, client: MlflowClient) -> None:
    client.set_tag(run_id, name, value)


def _log_metrics(client: MlflowClient, run_id: str, values: Mapping[str, Any], step: int) -> None:
    entities = load_mlflow().entities
    now = int(time.time() * 1000)
    numbers = [entities.Metric(metric_name(name), float(value), now, step) for name, value in values.items() if is_number(value)]
    client.log_batch(run_id, metrics=numbers)


def _log_inputs(run_id: str, inputs: list[DatasetInput], client: MlflowClient) -> None:
    client.log_inputs(run_id, inputs)


def _log_table(client: MlflowClient, run_id: str, rows: list[dict[str, Any]], name: str) -> None:
    columns = list(rows[0])
    if any(file.path == name for file in client.list_artifacts(run_id)):  # log_table would append to it
        client.log_text(run_id, json.dumps({"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}), name)
    else:
        client.log_table(run_id, {column: [row.get(column) for row in rows] for column in columns}, name)


def _register(uri: str, name: str, model: LoggedModel, run_id: str, client: MlflowClient) -> None:
    mlflow = load_mlflow()
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if found:  # the step was repeated
        version = found[0]
    else:
        mlflow.set_tracking_uri(uri)  # models:/<id> is looked up in the process's default store, whatever client asks
        source = f"models:/{model.model_id}"
        version = mlflow.register_model(source, name, await_registration_for=_REGISTRATION_SECONDS, tags=model.tags)
    client.set_registered_model_alias(name, "candidate", version.version)

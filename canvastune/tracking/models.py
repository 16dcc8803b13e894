"""Trained weights in MLflow: logged models, and versions of a registered one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.section import leaves
from canvastune.tracking.ids import PipelineRun
from canvastune.tracking.server import load_mlflow, log

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
_LONGEST_PARAMETER = 6000  # characters: MLflow's limit
_LARGEST_MODEL = 200 * 10**6  # bytes: a model above this is logged as a pointer to its folder
_REGISTRATION_SECONDS = 30
_MODEL_TEXTS = ("config.json", "generation_config.json", "adapter_config.json", "provenance.json", "merge_proof.json")
_ABOUT = f"""DiffusionGemma models tuned by Canvastune, each version with the run that made it and its evaluation.

- `{CANDIDATE}`: the newest version.
- `{CHAMPION}`: the best so far on the same held-out rows. A version says in its description why it is or is not."""


def log_model(client: MlflowClient, run_id: str, pipeline_run: PipelineRun, folder: Path, kind: str) -> LoggedModel:
    """Log a folder of weights as a LoggedModel of a step's run, once; above 200 MB as its path, its size and its small files.

    Args:
        kind: "adapter", "merged" or "full".
    """
    config, name = pipeline_run.config, f"{pipeline_run.folder.name.replace('.', '_')}-{kind}"  # MLflow takes no dot
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{name}'")
    for earlier in found:
        if earlier.status == "READY":
            return earlier  # the step was repeated
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not size:
        raise FileNotFoundError(f"{folder} holds no model")
    whole = size <= _LARGEST_MODEL
    about = {"path": str(folder.absolute()), "size_bytes": str(size), "uploaded": str(whole).lower(), "kind": kind}
    about |= {"base": config.model.id, "base_revision": config.model.revision or "unspecified", "recipe": config.name}
    branches = {"model": config.model, "train": config.train, **({} if kind == "full" else {"lora": config.lora})}
    parameters = flatten({name: branch.model_dump(mode="json") for name, branch in branches.items()})
    tags = {f"canvastune.{name}": value for name, value in about.items()}
    model = found[0] if found else client.create_logged_model(experiment, name, run_id, tags, parameters, kind)
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


def models_of(client: MlflowClient, run_ids: list[str]) -> list[LoggedModel]:
    """The models that some runs have made."""
    if not run_ids:
        return []
    experiment = client.get_run(run_ids[0]).info.experiment_id
    found = [client.search_logged_models([experiment], f"source_run_id = '{run_id}'") for run_id in run_ids]
    return [model for models in found for model in models if model.status == "READY"]


def register(client: MlflowClient, uri: str, name: str, model: LoggedModel) -> ModelVersion:
    """Make a model a version of a registered one, once, with the alias `candidate` unless a newer version has it."""
    version = version_of(client, name, model)
    if version is None:
        mlflow = load_mlflow()
        mlflow.set_tracking_uri(uri)  # models:/<id> is looked up in the process's default store, whatever client asks
        version = mlflow.register_model(f"models:/{model.model_id}", name, await_registration_for=_REGISTRATION_SECONDS)
        if not client.get_registered_model(name).description:
            client.update_registered_model(name, _ABOUT)
    newest = with_alias(client, name, CANDIDATE)
    if newest is None or int(newest.version) < int(version.version):
        client.set_registered_model_alias(name, CANDIDATE, version.version)
    return version


def version_of(client: MlflowClient, name: str, model: LoggedModel) -> ModelVersion | None:
    """The version of a registered model that a logged model is."""
    found = client.search_model_versions(f"name = '{name}' and run_id = '{model.source_run_id}'")
    return min(found, key=lambda version: int(version.version), default=None)


def with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has an alias, if one has."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else client.get_model_version(name, str(version))


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names and texts of a tree's leaves, cut at the length that MLflow takes."""
    return {name: str(value)[:_LONGEST_PARAMETER] for name, value in leaves(tree).items()}

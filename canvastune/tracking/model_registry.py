"""Trained weights in MLflow: logged models, and versions of a registered one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.config.strict import flatten
from canvastune.evaluation.result import EvaluationResult
from canvastune.tracking.client import load_mlflow, log
from canvastune.tracking.run_lookup import PipelineRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

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


def flatten_parameters(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names and texts of a tree's leaves, cut at the length that MLflow takes."""
    return {name: str(value)[:_LONGEST_PARAMETER] for name, value in flatten(tree).items()}


_VERDICT, _SCORE, _ROWS, _CLAIMED = (f"canvastune.{name}" for name in ("promotion", "exact_match", "evaluation", "claimed_at"))


_SIMULTANEOUS = 600  # seconds: claims to the title this near to each other may not have seen one another


@dataclass(frozen=True)
class Score:
    """How a version did in an evaluation."""

    before: float  # exact match of the base, 0 to 1
    after: float
    evaluation: str  # hash of what was asked and how: scores compare where these agree


def score_of(result: EvaluationResult) -> Score | None:
    """Return the score of an evaluation; None if no row was scored."""
    if not result.scored:
        return None
    compared = [result.asked, result.scored, result.answer_pattern, result.max_new_tokens, result.max_denoising_steps]
    digest = hashlib.sha256(json.dumps(compared).encode()).hexdigest()[:16]
    return Score(result.before.exact_match, result.after.exact_match, digest)


def promote(client: MlflowClient, name: str, version: ModelVersion, score: Score | None, when: str) -> str:
    """Give a version the alias `champion` if it deserves it; returns why it got it, or did not.

    A version is judged once: a repeated step changes nothing, and neither does it undo what a person has set since.

    Args:
        when: "better": than the champion or, where there is none, not worse than the base. "never": an alias is a person's to set.
    """
    if _VERDICT in version.tags:
        return str(version.tags[_VERDICT])
    if score is not None:
        client.set_model_version_tag(name, version.version, _SCORE, f"{score.after:.6g}")
        client.set_model_version_tag(name, version.version, _ROWS, score.evaluation)
    verdict = _judge(client, name, version, score, when)
    client.set_model_version_tag(name, version.version, _VERDICT, verdict)
    return verdict


def _judge(client: MlflowClient, name: str, version: ModelVersion, score: Score | None, when: str) -> str:
    if when == "never":
        return "not promoted: tracking.promote is never"
    if score is None:
        return "not promoted: no held-out row was scored"
    champion = with_alias(client, name, CHAMPION)
    if champion is not None and champion.version == version.version:
        reason = f"promoted to {CHAMPION}: exact match {score.after:.1%}"  # the step was repeated
    elif champion is None:
        if score.after < score.before:
            return f"not promoted: exact match {score.after:.1%} is below the base's {score.before:.1%}"
        reason = f"promoted to {CHAMPION}: the first one, exact match {score.after:.1%}, the base has {score.before:.1%}"
    else:
        if champion.tags.get(_ROWS) != score.evaluation:
            return (
                f"not promoted: version {champion.version}, the {CHAMPION}, was not evaluated on the same rows in the same way. "
                "If this one is better, set the alias by hand"
            )
        best = float(champion.tags[_SCORE])
        if _rounded(score.after) <= best:
            how = "is no better than" if _rounded(score.after) == best else "is below"
            return f"not promoted: exact match {score.after:.1%} {how} the {best:.1%} of version {champion.version}, the {CHAMPION}"
        reason = f"promoted to {CHAMPION}: exact match {score.after:.1%}, version {champion.version} before it has {best:.1%}"
    return _claim(client, name, version, score) or reason


def _claim(client: MlflowClient, name: str, version: ModelVersion, score: Score) -> str | None:
    """Set the alias; if another run does so at the same time, the better one has it in the end, whoever is the last to set it.

    Returns:
        Why another version has it now; None if this one has.
    """
    client.set_model_version_tag(name, version.version, _CLAIMED, f"{time.time():.0f}")  # before the alias, so that others see it
    client.set_registered_model_alias(name, CHAMPION, version.version)
    rivals = [
        other
        for other in client.search_model_versions(f"name = '{name}'")
        if time.time() - float(other.tags.get(_CLAIMED, 0)) < _SIMULTANEOUS and other.tags.get(_ROWS) == score.evaluation
    ]
    best = max(rivals, key=lambda other: (float(other.tags[_SCORE]), -int(other.version)))
    if best.version == version.version:
        return None
    client.set_registered_model_alias(name, CHAMPION, best.version)
    return (
        f"not promoted: version {best.version}, judged at the same time, has an exact match of {float(best.tags[_SCORE]):.1%}, "
        f"this one {score.after:.1%}"
    )


def _rounded(score: float) -> float:
    """As it stands in a version's tag."""
    return float(f"{score:.6g}")

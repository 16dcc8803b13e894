"""Trained weights in MLflow: logged models, versions of a registered one, and its champion."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.config.strict import flatten
from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.scoring import count_changes, paired_test
from canvastune.tracking.client import load_mlflow, log
from canvastune.tracking.mlmodel import write_mlmodel
from canvastune.tracking.run_lookup import PARENT, PipelineRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
_RESULT, _SCORE = "canvastune.promotion", "canvastune.score"  # tags of a version
_ROWS, _ROW_SCORES = "canvastune.evaluation", "canvastune.row_scores"
_LONGEST_TAG = 100_000  # characters: MLflow's limit
_LONGEST_PARAMETER = 6000  # characters: MLflow's limit
_LARGEST_MODEL = 200 * 10**6  # bytes: a larger model is logged as a pointer to its folder
_REGISTRATION_SECONDS = 30
_MODEL_FILES = ["config.json", "generation_config.json", "adapter_config.json"]
_MODEL_FILES += ["provenance.json", "merge_proof.json"]
_DESCRIPTION = f"""DiffusionGemma models tuned by Canvastune. A version has its run and evaluation.

- `{CANDIDATE}`: the newest version.
- `{CHAMPION}`: the newest one that did clearly better than the champion before it, or the base, on
  the same held-out rows. A version says why it is or is not."""


def log_model(
    client: MlflowClient, run_id: str, run: PipelineRun, folder: Path, kind: str
) -> LoggedModel:
    """Log a folder of weights as a LoggedModel of a step's run, once.

    `mlflow.pyfunc.load_model` answers with it. Above 200 MB it holds the folder's path, its size
    and its small files in place of the weights.

    Args:
        kind: "adapter", "merged" or "full".
    """
    config, name = run.config, f"{run.folder.name.replace('.', '_')}-{kind}"  # no dot in MLflow
    experiment = client.get_run(run_id).info.experiment_id
    query = f"source_run_id = '{run_id}' AND name = '{name}'"
    found = client.search_logged_models([experiment], query)
    for earlier in found:
        if earlier.status == "READY":
            return earlier  # the step was repeated
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not size:
        raise FileNotFoundError(f"{folder} holds no model")
    upload = size <= _LARGEST_MODEL
    about = {"path": str(folder.absolute()), "size_bytes": str(size), "kind": kind}
    about |= {"uploaded": str(upload).lower(), "base": config.model.id, "recipe": config.name}
    about |= {"base_revision": config.model.revision or "unspecified"}
    sections = ("model", "train") if kind == "full" else ("model", "train", "lora")
    settings = flatten({name: getattr(config, name).model_dump(mode="json") for name in sections})
    parameters = {name: value for name, value in settings.items() if value is not None}
    tags = {f"canvastune.{name}": value for name, value in about.items()}
    model = next(iter(found), None) or client.create_logged_model(
        experiment, name, run_id, tags, parameters, kind
    )
    with tempfile.TemporaryDirectory(prefix="canvastune-model-") as scratch:
        described = Path(scratch) / "model"
        write_mlmodel(described, model, config, folder, kind, upload=upload)
        client.log_model_artifacts(model.model_id, str(described))
    if not upload:
        log.info("%s: %.1f GB are not uploaded to MLflow, only their path", folder, size / 1e9)
        for file in (folder / name for name in _MODEL_FILES):
            if file.is_file():
                client.log_model_artifact(model.model_id, str(file))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [load_mlflow().entities.LoggedModelOutput(model.model_id, 0)])
    return model


def models_of(client: MlflowClient, run_ids: list[str]) -> list[LoggedModel]:
    """Return the models that some runs logged."""
    models: list[LoggedModel] = []
    for run_id in run_ids:
        experiment = client.get_run(run_id).info.experiment_id
        models += client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    return [model for model in models if model.status == "READY"]


def register(client: MlflowClient, uri: str, name: str, model: LoggedModel) -> ModelVersion:
    """Register a model as a version, once; it becomes `candidate` unless a newer version is."""
    version = version_of(client, name, model)
    if version is None:
        mlflow = load_mlflow()
        mlflow.set_tracking_uri(uri)  # models:/<id> is looked up in the process's default store
        version = mlflow.register_model(
            f"models:/{model.model_id}", name, await_registration_for=_REGISTRATION_SECONDS
        )
        if not client.get_registered_model(name).description:
            client.update_registered_model(name, _DESCRIPTION)
    newest = with_alias(client, name, CANDIDATE)
    if newest is None or int(newest.version) < int(version.version):
        client.set_registered_model_alias(name, CANDIDATE, version.version)
    return version


def version_of(client: MlflowClient, name: str, model: LoggedModel) -> ModelVersion | None:
    """Return the version of a registered model that a logged model is."""
    query = f"name = '{name}' and run_id = '{model.source_run_id}'"
    versions = client.search_model_versions(query)
    return min(versions, key=lambda version: int(version.version), default=None)


def with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version that has an alias, if one has."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else client.get_model_version(name, str(version))


def aliases_of(client: MlflowClient, parent: str) -> dict[str, list[str]]:
    """Return the registered versions of a pipeline run's models, as NAME/VERSION, with aliases.

    Args:
        parent: id of the pipeline run's run.
    """
    experiment = client.get_run(parent).info.experiment_id
    nested = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")
    found: dict[str, list[str]] = {}
    for run_id in (parent, *(run.info.run_id for run in nested)):
        for version in client.search_model_versions(f"run_id = '{run_id}'"):
            aliases = client.get_registered_model(version.name).aliases
            mine = [alias for alias, number in aliases.items() if str(number) == version.version]
            found[f"{version.name}/{version.version}"] = mine
    return found


def flatten_parameters(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return a tree's leaves as text by dotted name, cut at MLflow's limit."""
    return {name: str(value)[:_LONGEST_PARAMETER] for name, value in flatten(tree).items()}


@dataclass(frozen=True)
class Score:
    """How a version did in an evaluation."""

    before: float  # mean score of the base, 0 to 1
    after: float
    evaluation: str  # hash of the questions and settings: scores compare where these agree
    change: str = ""  # how the rows changed from the base to this version, for people
    verdict: str | None = None  # of the paired test: "better", "worse" or "undecided"
    measure: str = "exact match"
    rows: tuple[float | None, ...] = ()  # of this version, by row; None: not scored


def score_of(result: EvaluationResult, answers: Sequence[Mapping[str, Any]]) -> Score | None:
    """Return the score of an evaluation; None if no row was scored.

    Args:
        answers: the lines of answers.jsonl.
    """
    before, after = result.before.score, result.after.score
    if before is None or after is None:
        return None
    compared = [result.asked, result.scored, result.answer_pattern]
    compared += [result.max_new_tokens, result.max_denoising_steps]
    if result.sampler is not None:  # earlier versions sampled by the checkpoint's own settings
        compared.append(result.sampler)
    if result.judges != ("pattern",):  # what earlier versions judged by
        compared.append(result.judges)
    if result.repeats > 1:
        compared.append(result.repeats)
    digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]
    rows = tuple(row.get("score_after") for row in answers)
    change = describe_change(result.gained, result.lost, result.p_value)
    return Score(before, after, digest, change, result.verdict, result.measure, rows)


def describe_change(gained: int | None, lost: int | None, p: float | None) -> str:
    """Return how rows changed, for people."""
    return f"{gained} gained, {lost} lost, p = {p:.2g}"


def promote(
    client: MlflowClient, name: str, version: ModelVersion, score: Score | None, when: str
) -> str:
    """Set the alias `champion` on a version that deserves it; return why it does or does not.

    This is decided once: a repeated step changes nothing, nor does it undo what a person set since.

    Args:
        when: "better": if the paired test on the rows says that it is better than the champion or,
            without one, than the base. "never": only a person sets the alias.
    """
    if _RESULT in version.tags:
        return str(version.tags[_RESULT])
    if score is not None:
        client.set_model_version_tag(name, version.version, _SCORE, f"{score.after:.6g}")
        client.set_model_version_tag(name, version.version, _ROWS, score.evaluation)
        if len(text := _row_scores(score)) <= _LONGEST_TAG:
            client.set_model_version_tag(name, version.version, _ROW_SCORES, text)
    champion = with_alias(client, name, CHAMPION)
    deserved, result = _compare(version, champion, score, when)
    if deserved:  # of two runs at once the last one has the alias, as in MLflow itself
        client.set_registered_model_alias(name, CHAMPION, version.version)
    client.set_model_version_tag(name, version.version, _RESULT, result)
    return result


def _compare(
    version: ModelVersion, champion: ModelVersion | None, score: Score | None, when: str
) -> tuple[bool, str]:
    """Return whether a version becomes the champion, and why."""
    if when == "never":
        return False, "not promoted: tracking.promote is never"
    if score is None:
        return False, (
            "not promoted: there is no score to decide by, as no held-out row was scored. "
            "If the answers are better, set the alias by hand"
        )
    match = f"{score.measure} {score.after:.1%}"
    if champion is None:
        base = f"the base's {score.before:.1%} ({score.change})"
        if score.verdict == "better":
            return True, f"promoted to {CHAMPION}: the first one, {match}, clearly above {base}"
        return False, f"not promoted: {match}, {_UNCLEAR[score.verdict]} {base}"
    if champion.version == version.version:  # the step was repeated
        return True, f"promoted to {CHAMPION}: {match}"
    return _beats(champion, score, match)


_UNCLEAR = {
    "worse": "clearly below",
    "undecided": "not clearly different from",
    None: "not tested against",  # recorded by an earlier version
}


def _beats(champion: ModelVersion, score: Score, match: str) -> tuple[bool, str]:
    """Return whether a version is clearly better than the champion on the same rows, and why."""
    known = champion.tags.get(_ROW_SCORES, "").split(",")
    pairs = [
        (float(f"{new:.4g}"), float(old))
        for new, old in zip(score.rows, known, strict=False)
        if new is not None and old
    ]
    if champion.tags.get(_ROWS) == score.evaluation and _ROW_SCORES not in champion.tags:
        return False, (
            f"not promoted: version {champion.version}, the {CHAMPION}, has no scores by row: an "
            "earlier version registered it, or its rows are more than a tag of MLflow holds. If "
            "this one is better, set the alias by hand"
        )
    if (
        champion.tags.get(_ROWS) != score.evaluation
        or len(known) != len(score.rows)
        or len(pairs) < sum(each is not None for each in score.rows)
    ):
        return False, (
            f"not promoted: version {champion.version}, the {CHAMPION}, was not evaluated on the "
            "same rows in the same way. If this one is better, set the alias by hand"
        )
    differences = [new - old for new, old in pairs]
    p, verdict = paired_test(differences)
    gained, lost = count_changes(differences)
    before = sum(old for _, old in pairs) / len(pairs)
    other = f"the {before:.1%} of version {champion.version}"
    change = f"({describe_change(gained, lost, p)})"
    if verdict == "better":
        return True, f"promoted to {CHAMPION}: {match}, clearly above {other} before it {change}"
    return False, f"not promoted: {match}, {_UNCLEAR[verdict]} {other}, the {CHAMPION} {change}"


def _row_scores(score: Score) -> str:
    """Return the rows' scores as a tag's value; nothing where a row is not scored."""
    return ",".join("" if each is None else f"{each:.4g}" for each in score.rows)

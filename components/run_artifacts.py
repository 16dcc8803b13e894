"""Find a run by its folder or name, and what it has: outputs, the tuned model, pages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig, load_config, parse_config
from canvastune.errors import UserError
from canvastune.report.summary import RunArtifacts
from canvastune.tracking import run_page, tracking_uri
from canvastune.tracking.client import connect
from canvastune.tracking.steps import PIPELINE_STEPS, read_records
from components.run_directory import pipeline_run, read_record, workspace_of
from components.run_list import nearest_run, read_run

MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
PIPELINE_URL = "canvastune.pipeline_url"  # the tag with the run's address in Kubeflow


def find_run_folder(run: str | Path, workspace: Path) -> Path:
    """Return the folder of a run that is named by its folder, or by its name in a workspace.

    Raises:
        UserError: no such run, with the nearest name.
    """
    runs = workspace / "runs"
    for folder in (Path(run), runs / run):
        if folder.is_dir():
            return folder
    names = [folder.name for folder in runs.iterdir()] if runs.is_dir() else []
    raise UserError(
        f"{run}: found no such folder, and no run of this name in {runs}",
        hint=nearest_run(Path(run).name, names),
    )


def tuned_model(folder: Path) -> Path:
    """Return the folder of a run's tuned model.

    Raises:
        UserError: no run, or one without its model, with its state and what to do.
    """
    model = find_run(folder).model
    if model is None:
        raise UserError(
            f"{folder}: found the output of only a training, expected a run of the pipeline",
            hint="Use a folder such as WORKSPACE/runs/RUN.",
        )
    if (model / "config.json").is_file():
        return model
    run = read_run(folder, sizes=False)
    hint = "Use the folder of a finished pipeline run whose model is still there."
    if run.state != "finished" and run.command:
        hint = f"Resume it: {run.command}."
    raise UserError(f"{folder}: found no tuned model: the run is {run.progress}", hint=hint)


def find_run(folder: Path) -> RunArtifacts:
    """Return the run in a folder: a pipeline's, or the output of `canvastune.train`.

    Raises:
        UserError: there is no run, or it has not started training.
    """
    record = read_record(folder)
    train = folder / "train" if record else folder
    recipes = (train / "config.yaml", train / "recipe.yaml")
    recipe = next((file for file in recipes if file.is_file()), None)
    if record is None and recipe is None:
        raise UserError(
            f"{folder}: no run found, expected run.json, "
            "or metrics.jsonl and config.yaml of a finished training",
            hint="Use a folder such as WORKSPACE/runs/RUN, or the --output of canvastune.train.",
        )
    if not (train / "metrics.jsonl").is_file():
        raise UserError(
            f"{train}: no metrics.jsonl: this run has not started training",
            hint="Wait for its first step.",
        )
    files = {
        "data": "data/card.json",
        "plan": "plan/plan.json",
        "evaluation": "evaluation/evaluation.json",
        "merge": "model/merge_proof.json",
    }
    config = (
        parse_config(record.config, f"{folder}/run.json") if record else load_config(str(recipe))
    )
    found: dict[str, Any] = {
        step: (folder / file).parent if (folder / file).is_file() else None
        for step, file in files.items()
    }
    return RunArtifacts(
        name=folder.absolute().name,
        config=config,
        metrics=train / "metrics.jsonl",
        **found,
        folder=folder.absolute() if record else None,
        step_seconds=_step_seconds(folder) if record else (),
    )


def _step_seconds(folder: Path) -> tuple[tuple[str, float], ...]:
    """Return what each step took; runs of earlier versions recorded nothing."""
    found = read_records(folder).steps.items()
    return tuple(
        (step, record.seconds)
        for step, record in found
        if record.seconds and step not in PIPELINE_STEPS
    )


def find_pages(config: RunConfig, folder: Path) -> tuple[tuple[str, str], ...]:
    """Return title and address of a pipeline run's pages in MLflow, Kubeflow and the Hub."""
    uri, pages = tracking_uri(config, workspace_of(folder)), []
    if page := run_page(pipeline_run(config, folder, "")):
        local = uri.startswith("sqlite")
        start = f" (start it by: mlflow ui --backend-store-uri {shlex.quote(uri)})" if local else ""
        pages.append((f"MLflow{start}", f"{MLFLOW_UI if local else connect(uri)}{page}"))
    resolved = read_records(folder).steps.get("resolve")
    url = resolved.shows.get("run/tags", {}).get(PIPELINE_URL) if resolved else None
    if url:
        pages.append(("Kubeflow", url))
    if config.tracking.hub_model_id:
        pages.append(("Hub", f"https://huggingface.co/{config.tracking.hub_model_id}"))
    return tuple(pages)

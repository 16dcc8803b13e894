"""Answers before and after, here or, where the model is too big for a pipeline step, in a pod with an accelerator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.evaluation.run import evaluate
from canvastune.io.atomic import atomic_directory
from canvastune.tracking import StepRun
from canvastune.tracking.descriptions import judged
from components.jobs import launcher as jobs
from components.jobs.manifests import JobContext
from components.run_directory import run_id_of


def answer(config: RunConfig, dataset: Path, tuned: Path, run_folder: Path, out: Path, record: StepRun) -> dict[str, Any]:
    """Evaluate as `cluster.backend` says: in this process, or as a job of one pod with one accelerator; returns evaluation.json.

    Args:
        tuned: the tuned model, on the workspace.
        run_folder: keeps what an attempt that is killed has done, for the next one.
        out: gets evaluation.json, answers.jsonl and film.json.
        record: the step's run in MLflow, which is told the job.

    Raises:
        UserError: as `canvastune.evaluate`, and as `components.jobs.launcher.run`.
    """
    if config.cluster.backend == "local":
        return evaluate(config, dataset, resolve_model(config.model), tuned, out, run_folder / ".evaluation.unfinished.jsonl")
    alone = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"nodes": 1, "rdma_resource": None}),
            "parallel": config.parallel.model_copy(update={"nproc_per_node": 1, "ep": 1}),
        }
    )
    made = run_folder / "evaluation"
    recipe = run_folder / "train" / "recipe.yaml"  # which the train step has written
    module = ("canvastune.evaluate", "-c", str(recipe), "--data", str(jobs.copy_to_workspace(dataset, run_folder)))
    facts = JobContext(
        run_id=run_id_of(run_folder), output=made, module=(*module, "--tuned", str(tuned), "--output", str(made)), role="evaluate"
    )
    record.tags(jobs.run(alone, facts, made / "evaluation.json"))
    with atomic_directory(out) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return dict(json.loads((out / "evaluation.json").read_text(encoding="utf-8")))


def publish(figures: Mapping[str, float], evaluation: Path, record: StepRun) -> None:
    """Give the step's run the figures, a sentence, the answers as a table, and the files.

    Args:
        figures: what was measured; `eval/NAME` in MLflow.
        evaluation: the folder with evaluation.json and answers.jsonl.
    """
    record.metrics({f"eval/{name}": value for name, value in figures.items()})
    record.note(judged(figures))
    record.table([json.loads(line) for line in (evaluation / "answers.jsonl").read_text(encoding="utf-8").splitlines()])
    record.outputs(evaluation)

"""Evaluate in this process or, for a large model, in a pod with an accelerator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.evaluation.result import FILE_NAME, EvaluationResult
from canvastune.io.atomic import atomic_directory
from canvastune.tracking import StepRun
from canvastune.tracking.descriptions import describe_evaluation
from components.jobs.launcher import copy_to_workspace, run_job
from components.jobs.manifests import JobContext
from components.run_directory import BASE_RESULTS, read_run_id


def run_evaluation(
    config: RunConfig, dataset: Path, tuned: Path, run_folder: Path, out: Path, record: StepRun
) -> EvaluationResult:
    """Evaluate in this process or, with a cluster, as a job of one pod with one accelerator.

    Args:
        tuned: the tuned model, on the workspace.
        run_folder: keeps the partial results of a killed attempt for the next one.
        out: folder for evaluation.json, answers.jsonl and film.json.
        record: the step's run in MLflow, which gets the job's name as tags.

    Raises:
        UserError: as `canvastune.evaluate`, and as `components.jobs.launcher.run_job`.
    """
    if config.cluster.backend == "local":
        # Loads torch, which the launcher of a job has no use for.
        from canvastune.evaluation.run import evaluate

        cache = run_folder / ".evaluation.unfinished.jsonl"
        base = resolve_model(config.model)
        return evaluate(config, dataset, base, tuned, out, cache, run_folder.parent / BASE_RESULTS)
    one_pod = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"nodes": 1, "rdma_resource": None}),
            "parallel": config.parallel.model_copy(update={"nproc_per_node": 1, "ep": 1}),
        }
    )
    made = run_folder / "evaluation"
    recipe = run_folder / "train" / "recipe.yaml"  # written by the step `train`
    data = copy_to_workspace(dataset, run_folder)
    kept = ("--base-results", str(run_folder.parent / BASE_RESULTS))
    module = ("canvastune.evaluate", "-c", str(recipe), "--data", str(data), *kept)
    context = JobContext(
        run_id=read_run_id(run_folder),
        output=made,
        module=(*module, "--tuned", str(tuned), "--output", str(made)),
        role="evaluate",
    )
    record.tags(run_job(one_pod, context, made / FILE_NAME))
    with atomic_directory(out) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return EvaluationResult.read(out)


def publish(result: EvaluationResult, evaluation: Path, record: StepRun) -> None:
    """Log the figures (`eval/NAME`), a summary, the answers as a table, and the files to MLflow.

    Args:
        evaluation: the folder with evaluation.json and answers.jsonl.
    """
    record.metrics({f"eval/{name}": value for name, value in result.figures().items()})
    record.note(describe_evaluation(result))
    answers = (evaluation / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    record.table([json.loads(line) for line in answers])
    record.outputs(evaluation)

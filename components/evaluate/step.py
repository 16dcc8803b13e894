"""Evaluate in this process or, for a large model, in a pod with an accelerator."""

from __future__ import annotations

import shutil
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.evaluation.result import FILE_NAME, EvaluationResult, read_answers
from canvastune.io.atomic import atomic_directory
from canvastune.tracking import StepRun
from canvastune.tracking.descriptions import describe_evaluation, describe_traces
from components.jobs.launcher import copy_to_workspace, run_job
from components.jobs.manifests import JobContext
from components.run_directory import BASE_RESULTS, read_run_id

_FIRST_COLUMNS = ("prompt", "reference", "before", "after", "score_before", "score_after")


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
    record.tags(run_job(of_one_pod(config), context, made / FILE_NAME))
    with atomic_directory(out) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return EvaluationResult.read(out)


def of_one_pod(config: RunConfig) -> RunConfig:
    """Return the config of the evaluation's job: one pod with one accelerator."""
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"nodes": 1, "rdma_resource": None}),
            "parallel": config.parallel.model_copy(update={"nproc_per_node": 1, "ep": 1}),
        }
    )


def publish(result: EvaluationResult, evaluation: Path, record: StepRun) -> None:
    """Log figures (`eval/NAME`), summary, answers as a table and as traces, and files to MLflow.

    Args:
        evaluation: the folder with evaluation.json and answers.jsonl.
    """
    record.metrics({f"eval/{name}": value for name, value in result.figures().items()})
    record.note(f"{describe_evaluation(result)}\n\n{describe_traces(result.rows)}")
    rows = read_answers(evaluation)
    # What is read comes first: MLflow's table is wider than its page.
    columns = dict.fromkeys((*_FIRST_COLUMNS, *(key for row in rows for key in row if key != "id")))
    shown = [{name: row.get(name) for name in (*columns, "id")} for row in rows]
    record.table(shown, of=("", "run/"))
    record.outputs(evaluation)
    record.answers(evaluation)

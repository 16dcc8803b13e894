"""Evaluate on this machine or, with a cluster, in pods with accelerators."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig, write_config
from canvastune.evaluation.result import FILE_NAME, EvaluationResult, read_answers
from canvastune.io.atomic import atomic_directory
from canvastune.planner.evaluation import evaluation_layout
from canvastune.planner.planner import find_architecture
from canvastune.tracking import StepRun
from canvastune.tracking.descriptions import describe_evaluation, describe_traces
from components.jobs.backends import JobContext
from components.jobs.launcher import copy_to_workspace, run_job
from components.jobs.torchrun import run_ranks
from components.run_directory import BASE_RESULTS, read_run_id

_FIRST_COLUMNS = ("prompt", "reference", "before", "after", "score_before", "score_after")


def run_evaluation(
    config: RunConfig, dataset: Path, tuned: Path, run_folder: Path, out: Path, record: StepRun
) -> EvaluationResult:
    """Evaluate on this machine or, with a cluster, as a job, on the GPUs of `evaluate.gpus`.

    Args:
        tuned: the tuned model, on the workspace.
        run_folder: keeps the partial results of a killed attempt for the next one.
        out: folder for evaluation.json, answers.jsonl and film.json.
        record: the step's run in MLflow, which gets the job's name as tags.

    Raises:
        UserError: as `canvastune.evaluate`, and as `components.jobs.launcher.run_job`.
    """
    kept = run_folder.parent / BASE_RESULTS
    if config.cluster.backend == "local":
        cache = run_folder / ".evaluation.unfinished.jsonl"
        return evaluate_here(config, dataset, tuned, out, kept, cache)
    made = run_folder / "evaluation"
    recipe = run_folder / "train" / "recipe.yaml"  # written by the step `train`
    data = copy_to_workspace(dataset, run_folder)
    context = JobContext(
        run_id=read_run_id(run_folder),
        output=made,
        module=(*_module(recipe, data, tuned, made), "--base-results", str(kept)),
        role="evaluate",
    )
    record.tags(run_job(of_evaluation(config), context, made / FILE_NAME))
    with atomic_directory(out) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return EvaluationResult.read(out)


def of_evaluation(config: RunConfig) -> RunConfig:
    """Return the config of the evaluation's job, with the GPUs that it takes.

    Raises:
        UserError: as `evaluation_layout`.
    """
    gpus = evaluation_layout(config, find_architecture(config.model)).gpus
    nodes = max(1, gpus // config.parallel.nproc_per_node)
    cluster = {"nodes": nodes} | ({"rdma_resource": None} if nodes == 1 else {})
    processes = {"nproc_per_node": gpus // nodes, "ep": 1}
    return config.with_values("cluster", **cluster).with_values("parallel", **processes)


def evaluate_here(
    config: RunConfig,
    dataset: Path,
    tuned: Path,
    out: Path,
    kept: Path,
    cache: Path | None = None,
) -> EvaluationResult:
    """Evaluate in this process, or in several under torchrun where the plan takes several GPUs.

    Args:
        kept: folder of the bases' results.
        cache: file that saves partial results; None: one next to `out`.

    Raises:
        UserError: as `canvastune.evaluate`.
    """
    base = resolve_model(config.model)
    processes = evaluation_layout(config, base).gpus
    if processes == 1:
        # Loads torch, which the launcher of a job has no use for.
        from canvastune.evaluation.run import evaluate

        return evaluate(config, dataset, base, tuned, out, cache, kept)
    more = () if cache is None else ("--cache", str(cache))
    more = ("--base-results", str(kept), *more)
    _evaluate_in(processes, config, dataset, tuned, out, (cache or out.absolute()).parent, more)
    return EvaluationResult.read(out)


def sweep_here(config: RunConfig, dataset: Path, tuned: Path, out: Path) -> None:
    """Answer with a few settings of the sampler, in as many processes as `evaluate_here`.

    Raises:
        UserError: as `canvastune.evaluate`.
    """
    from canvastune.evaluation.ranks import Ranks
    from canvastune.evaluation.sweep import sweep

    base = resolve_model(config.model)
    processes = evaluation_layout(config, base).gpus
    if processes == 1:
        sweep(config, dataset, base, tuned, out, Ranks())
        return
    logs = out.absolute().parent
    _evaluate_in(processes, config, dataset, tuned, out, logs, ("--sweep",))


def _evaluate_in(
    processes: int,
    config: RunConfig,
    dataset: Path,
    tuned: Path,
    out: Path,
    logs: Path,
    more: tuple[str, ...],
) -> None:
    """Run `canvastune.evaluate` under torchrun.

    Args:
        logs: folder of the processes' logs.
        more: options.
    """
    with tempfile.TemporaryDirectory(prefix="canvastune-evaluate-") as scratch:
        recipe = Path(scratch) / "recipe.yaml"
        write_config(config, recipe)
        module = (*_module(recipe, dataset, tuned, out), *more)
        logs.mkdir(parents=True, exist_ok=True)
        run_ranks(module, processes, logs, config.train.stop_grace)


def _module(recipe: Path, data: Path, tuned: Path, out: Path) -> tuple[str, ...]:
    given = {"-c": recipe, "--data": data, "--tuned": tuned, "--output": out}
    options = [text for name, path in given.items() for text in (name, str(path))]
    return "canvastune.evaluate", *options


def publish(result: EvaluationResult, evaluation: Path, record: StepRun) -> None:
    """Log figures (`eval/NAME`), summary, answers as a table and as traces, and files to MLflow.

    Args:
        evaluation: the folder with evaluation.json and answers.jsonl.
    """
    record.metrics({f"eval/{name}": value for name, value in result.figures().items()})
    run = record.pipeline_run
    where = describe_traces(result.rows, run is None or run.config.tracking.log_texts)
    record.note(f"{describe_evaluation(result)}\n\n{where}")
    rows = read_answers(evaluation)
    # What is read comes first: MLflow's table is wider than its page.
    columns = dict.fromkeys((*_FIRST_COLUMNS, *(key for row in rows for key in row if key != "id")))
    shown = [{name: _shown(row.get(name)) for name in (*columns, "id")} for row in rows]
    record.table(shown, of=("", "run/"))
    record.outputs(evaluation)
    record.answers(evaluation)


def _shown(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value

"""Train a run where its config says, on this machine or on a cluster, and record its outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig, write_config
from canvastune.evaluation.preflight import describe_answers, log_remarks
from canvastune.tracking import StepRun, log_data
from components.jobs.backends import JobContext
from components.jobs.launcher import copy_to_workspace, run_job
from components.jobs.torchrun import run_ranks
from components.run_directory import read_run_id


def train(
    config: RunConfig,
    dataset: Path | None,
    output: Path,
    record: StepRun,
    task: Mapping[str, Any] | None = None,
) -> Path:
    """Train as `cluster.backend` says: in local processes, or as a job on Kubernetes.

    Args:
        dataset: a prepared data set; None: the trainer prepares its own.
        output: the training run's directory. Checkpoints in it are resumed from, and a finished
            run is kept as it is.
        record: the step's run in MLflow, which gets the metrics and the adapter.
        task: settings of the pipeline's task for the training pods (the fields of
            `dsl.TaskConfig`).

    Returns:
        The directory of the trained weights.

    Raises:
        UserError: training failed; the message ends with the failing rank's last lines.
    """
    output.mkdir(parents=True, exist_ok=True)
    if dataset is not None:
        log_remarks(describe_answers(config, dataset))
        record.dataset(dataset, "training")
        log_data(record.pipeline_run, dataset)  # sends the line above, too: training may take days
    write_config(config, output / "recipe.yaml")
    try:
        if config.cluster.backend == "local":
            data = ("--data", str(dataset)) if dataset else ()
            with record.live_curves(output / "metrics.jsonl"):  # the ranks need no MLflow
                run_ranks(
                    (*_module(output), *data),
                    config.parallel.nproc_per_node,
                    output,
                    config.train.stop_grace,
                )
        else:
            # The pods share its cache: their accelerators do not wait for a download.
            resolve_model(config.model)
            context = _job_context(dataset, output, record)
            record.tags(run_job(config, context, output / "result.json", task))
    finally:
        record.curves(output / "metrics.jsonl")
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    weights = output / result["export"]
    record.outputs(output)
    record.model(weights, "adapter" if config.train.method == "lora" else "full")
    record.note(
        f"{result['steps']} steps on {result['world_size']} ranks; the weights of step"
        f" {result['exported_step']} are exported."
    )
    return weights


def _job_context(dataset: Path | None, output: Path, record: StepRun) -> JobContext:
    data = ("--data", str(copy_to_workspace(dataset, output.parent))) if dataset else ()
    return JobContext(
        run_id=read_run_id(output.parent),
        output=output,
        module=(*_module(output), *data),
        mlflow=record.arguments(),
        environment=record.environment(),
    )


def _module(output: Path) -> tuple[str, ...]:
    return "canvastune.train", "-c", str(output / "recipe.yaml"), "--output", str(output)

"""Trains a run where its config says, here or on a cluster, and hands on what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig, write_config
from canvastune.tracking import StepRun, log_data
from components.jobs import launcher as jobs
from components.jobs.manifests import JobContext
from components.run_directory import run_id_of
from components.train import torchrun


def train(config: RunConfig, dataset: Path | None, output: Path, record: StepRun, task: Mapping[str, Any] | None = None) -> Path:
    """Train as `cluster.backend` says: in processes of this machine, or as a job on Kubernetes; returns the folder of the trained weights.

    Args:
        dataset: a prepared data set; None: the trainer prepares its own.
        output: the training run's folder. Checkpoints that stand there are resumed from, and a finished run is kept as it is.
        record: the step's run in MLflow, which gets the metrics and the adapter.
        task: what was set on the pipeline's task for the training pods (the fields of `dsl.TaskConfig`).

    Raises:
        UserError: training failed; its words are the failing rank's last ones.
    """
    output.mkdir(parents=True, exist_ok=True)
    if dataset is not None:
        log_data(record.pipeline_run, dataset)
        record.dataset(dataset, "training")
    write_config(config, output / "recipe.yaml")
    if config.cluster.backend == "local":
        torchrun.run(config, dataset, output, record.arguments(), record.environment())
    else:
        record.tags(jobs.run(config, _facts(dataset, output, record), output / "result.json", task))
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    weights = output / result["export"]
    record.curves(output / "metrics.jsonl")
    record.outputs(output)
    record.model(weights, "adapter" if config.train.method == "lora" else "full")
    record.note(f"{result['steps']} steps on {result['world_size']} ranks; the weights of step {result['exported_step']} are exported.")
    return weights


def _facts(dataset: Path | None, output: Path, record: StepRun) -> JobContext:
    data = ("--data", str(jobs.copy_to_workspace(dataset, output.parent))) if dataset else ()
    return JobContext(
        run_id=run_id_of(output.parent),
        output=output,
        module=("canvastune.train", "-c", str(output / "recipe.yaml"), "--output", str(output), *data),
        mlflow=record.arguments(),
        environment=record.environment(),
    )

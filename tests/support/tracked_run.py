"""A pipeline run as its steps record it, and what MLflow then has of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from canvastune import tracking
from canvastune.config import parse_config
from canvastune.tracking.client import Timeouts, connect, load_mlflow
from canvastune.tracking.model_registry import Score
from tests.fakes.tracking_server import (
    prepared,
    train_record,
)

STEPS = ("resolve", "prepare_data", "train", "merge_lora", "evaluate", "report")


def quick(uri: str, retry: float = 0.2) -> None:
    """Wait less for a server than in production."""
    connect(uri).timeouts = Timeouts(probe=1.0, retry=retry)


def pipeline_run(folder: Path, uri: str, name: str) -> tracking.PipelineRun:
    tree = {"name": "tiny_lora", "data": {"source": "openai/gsm8k"}}
    tracked = {"uri": uri, "experiment": "outages", "registered_model": name}
    quick(uri)
    run = tracking.PipelineRun(
        parse_config({**tree, "tracking": tracked}), folder / "runs" / name, "job"
    )
    (run.folder / "train").mkdir(parents=True)
    (run.folder / "train/metrics.jsonl").write_text(
        "".join(json.dumps(train_record(step)) + "\n" for step in range(1, 21))
    )
    (run.folder / "train/system.jsonl").write_text(
        json.dumps({"kind": "system", "step": 0, "time": 1.7e9, "cpu": 50.0}) + "\n"
    )
    (run.folder / "model").mkdir()
    (run.folder / "model/model.safetensors").write_bytes(b"weights")
    return run


def go_through(
    run: tracking.PipelineRun, scratch: Path, before: Callable[[str], object] = str
) -> list[float]:
    """A pipeline run as its steps record it; returns the seconds that each of them took.

    Args:
        scratch: for what only a step's own container holds, which is deleted after it.
        before: called with a step's name before the step begins.
    """
    seconds = []

    def timed(step: str, action: Callable[[], object]) -> None:
        before(step)
        started = time.monotonic()
        action()
        seconds.append(time.monotonic() - started)

    def in_step(step: Any, action: Callable[[tracking.StepRun], object]) -> None:
        def work() -> None:
            with tracking.step_run(run, step) as record:
                action(record)

        timed(step, work)

    data = prepared(scratch)
    timed("resolve", lambda: tracking.start(run, {"canvastune.pipeline_job": "job"}))
    timed("prepare_data", lambda: tracking.log_data(run, data))

    def train(record: tracking.StepRun) -> None:
        record.tags({"canvastune.job": "job-1"})
        record.curves(run.folder / "train/metrics.jsonl")

    def evaluate(record: tracking.StepRun) -> None:
        out = scratch / "evaluation"
        out.mkdir()
        (out / "evaluation.json").write_text("{}")
        record.dataset(data, "evaluation")
        record.evaluated_model()
        record.metrics({"eval/exact_match_after": 0.75})
        row: dict[str, Any] = {
            "id": "a",
            "prompt": "2+2?",
            "reference": "4",
            "before": "5",
            "after": "4",
        }
        row |= {"judge": "number", "correct_before": False, "correct_after": True}
        (out / "answers.jsonl").write_text(
            json.dumps(row | {"score_before": 0.0, "score_after": 1.0}) + "\n"
        )
        record.table([row], of=("", "run/"))
        record.outputs(out)
        record.answers(out)
        for file in out.iterdir():
            file.unlink()

    def report(record: tracking.StepRun) -> None:
        record.summary({"eval/exact_match_after": 0.75, "val/loss_last": 1.5}, data)
        record.promotion(Score(0.5, 0.75, "rows", verdict="better"), "better", "**Better**")

    in_step("train", train)
    in_step("merge_lora", lambda record: record.model(run.folder / "model", "merged"))
    in_step("evaluate", evaluate)
    in_step("report", report)
    return seconds


def seen(uri: str, name: str) -> dict[str, Any]:
    """Everything that MLflow has of a run, without ids, names and times that differ from run to
    run.
    """
    client = load_mlflow().MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("outages")
    found: dict[str, Any] = {}
    (parent,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    nested = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    for run in (parent, *nested):
        models = client.search_logged_models(
            [experiment.experiment_id], f"source_run_id = '{run.info.run_id}'"
        )
        histories = {
            key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        found[run.info.run_name.replace(f"{name}: ", "").replace(name, "parent")] = {
            "status": run.info.status,
            "ended": run.info.end_time >= run.info.start_time,
            "metrics": {key: sorted(points) for key, points in histories.items()},
            "parameters": {
                key: value
                for key, value in run.data.params.items()
                if not key.startswith("tracking.")
            },
            "tags": {
                key: re.sub(r"\d[-:\d]+", "TIME", value.replace(name, "N"))
                for key, value in run.data.tags.items()
                if key != "mlflow.parentRunId"
            },
            "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
            "data": sorted(
                (each.dataset.name, each.tags[0].value) for each in run.inputs.dataset_inputs
            ),
            "traces": sorted(
                (
                    trace.info.request_preview,
                    trace.data.spans[0].outputs,
                    sorted((each.name, each.value) for each in trace.info.assessments),
                    trace.info.tags["canvastune.change"],
                )
                for trace in client.search_traces(
                    locations=[experiment.experiment_id], run_id=run.info.run_id
                )
            ),
            "judged": len(
                client.get_run(run.info.run_id).inputs.model_inputs
            ),  # a search does not load them
            "models": [
                (
                    m.name.replace(name, "N"),
                    m.status,
                    m.tags["mlflow.note.content"],
                    sorted((f.key, f.value, f.dataset_name) for f in m.metrics),
                )
                for m in models
            ],
        }
    registered = client.get_registered_model(name)
    return found | {
        "aliases": {alias: str(version) for alias, version in registered.aliases.items()}
    }

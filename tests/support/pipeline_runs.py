"""Pipeline runs in an embedded store of MLflow, for tests of tracking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from canvastune import tracking
from canvastune.config import RunConfig, parse_config
from canvastune.tracking.client import load_mlflow


def config(**branches: Any) -> RunConfig:
    return parse_config({"name": "tiny_lora", "data": {"source": "openai/gsm8k"}, **branches})


def client_of(workspace: Path) -> Any:
    return load_mlflow().MlflowClient(tracking.tracking_uri(config(), workspace))


def pipeline_run(workspace: Path, name: str, **branches: Any) -> tracking.PipelineRun:
    return tracking.PipelineRun(config(**branches), workspace / "runs" / name, "job")


def nested_runs(client: Any, parent: str) -> list[Any]:
    return list(client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'"))

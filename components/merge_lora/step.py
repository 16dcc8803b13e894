"""Merge an adapter into its base model, in the run's directory."""

from __future__ import annotations

from pathlib import Path

from canvastune import merge
from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.tracking import StepRun


def merge_lora(config: RunConfig, adapter: Path, run_directory: Path, record: StepRun) -> Path:
    """Write the merged model below `run_directory`, add it to MLflow, and return its folder.

    Raises:
        UserError: as `canvastune.merge.merge_lora`.
    """
    folder = run_directory / "model"
    if not folder.exists():  # a retried step finds the complete model, or none
        merge.merge_lora(config, resolve_model(config.model), adapter, folder)
    record.outputs(folder)
    record.model(folder, "merged")
    return folder

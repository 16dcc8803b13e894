"""Find the runs that a report compares its own with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from canvastune.config import load_config, parse_config
from canvastune.errors import UserError
from canvastune.report import RunArtifacts
from components.run_directory import read_record

MOST_COMPARED = 5  # curves that can be told apart, beside the run's own


def find_run(folder: Path) -> RunArtifacts:
    """The run whose folder this is.

    Raises:
        UserError: no run's folder, or one of a run that has not begun to train.
    """
    record = read_record(folder)
    train = folder / "train" if record else folder
    recipe = next((file for file in (train / "config.yaml", train / "recipe.yaml") if file.is_file()), None)
    if record is None and recipe is None:
        raise UserError(
            f"{folder}: no folder of a run: expected run.json in it, or metrics.jsonl and config.yaml of a training that is finished. "
            "Give one such as workspace/runs/RUN, or the --output of canvastune.train"
        )
    if not (train / "metrics.jsonl").is_file():
        raise UserError(f"{train}: no metrics.jsonl: this run has not begun to train. Wait for its first step")
    made = {
        "data": "data/card.json",
        "plan": "plan/plan.json",
        "evaluation": "evaluation/evaluation.json",
        "merge": "model/merge_proof.json",
    }
    config = parse_config(record.config, f"{folder}/run.json") if record else load_config(str(recipe))
    found = {step: folder / file for step, file in made.items()}
    return RunArtifacts(
        name=folder.absolute().name,
        config=config,
        metrics=train / "metrics.jsonl",
        **{step: file.parent if file.is_file() else None for step, file in found.items()},
    )


def find_compared(folders: Sequence[Path]) -> list[RunArtifacts]:
    """The runs that a report lays over its own.

    Raises:
        UserError: one of the folders is no run's, or there are more than can be told apart.
    """
    if len(folders) > MOST_COMPARED:
        raise UserError(f"compare: found {len(folders)} runs, expected at most {MOST_COMPARED}. Leave some out")
    return [find_run(folder) for folder in folders]


def compared_folders(names: str, workspace: Path) -> list[Path]:
    """Folders that the pipeline's parameter `compare` names: runs of the workspace, or paths, with commas or line breaks between."""
    return [workspace / "runs" / name for name in filter(None, map(str.strip, re.split(r"[,\n]", names)))]  # a whole path stays as it is

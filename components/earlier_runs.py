"""Find the runs that a report compares with its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from canvastune.errors import UserError
from canvastune.evaluation.result import EvaluationResult
from canvastune.report.summary import RunArtifacts
from canvastune.tracking import read_metrics
from components.run_artifacts import find_run

MAX_COMPARED = 5  # runs whose lines are distinguishable, in addition to the run itself


def find_compared(folders: Sequence[Path], own: Path | None = None) -> list[RunArtifacts]:
    """Return the runs that a report overlays on its own.

    Args:
        own: folder of the report's run; None: it has none yet.

    Raises:
        UserError: a folder has no run that can be compared, or is there twice, or there are more
            runs than colors.
    """
    refuse_too_many(len(folders))
    seen = set() if own is None else {own.resolve()}
    for folder in folders:
        if (real := folder.resolve()) in seen:
            what = "the run itself" if own is not None and real == own.resolve() else "named twice"
            raise UserError(f"compare: {folder} is {what}", hint="Name it once, or leave it out.")
        seen.add(real)
    return [find_comparable(folder) for folder in folders]


def refuse_too_many(runs: int) -> None:
    """Raise: UserError, there are more runs to compare than colors."""
    if runs > MAX_COMPARED:
        raise UserError(
            f"compare: found {runs} runs, expected at most {MAX_COMPARED}",
            hint="Leave out some of them.",
        )


def find_comparable(folder: Path) -> RunArtifacts:
    """Return the run in a folder, after reading what a report shows of a compared run.

    Raises:
        UserError: as `find_run`; no training step yet, or an evaluation that cannot be read.
    """
    run = find_run(folder)
    if not any(record["kind"] == "train" for record in read_metrics(run.metrics)):
        raise UserError(
            f"{run.metrics}: found no training step",
            hint="Leave this run out, or wait until it has trained a step.",
        )
    if run.evaluation is not None:
        EvaluationResult.read(run.evaluation)
    return run


def compared_folders(names: str, workspace: Path) -> list[Path]:
    """Return the folders that the pipeline's parameter `compare` names.

    It lists names of the workspace's runs or paths, separated by commas or line breaks.
    """
    parts = filter(None, map(str.strip, re.split(r"[,\n]", names)))
    return [workspace / "runs" / name for name in parts]  # an absolute path stays as it is

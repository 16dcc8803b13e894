"""Estimate what a run needs of its hardware, and refuse what cannot fit."""

from __future__ import annotations

from pathlib import Path

from canvastune.config import RunConfig
from canvastune.planner.planner import find_architecture, make_plan, write_plan
from canvastune.tracking import StepRun


def plan(config: RunConfig, out: Path, record: StepRun) -> None:
    """Write the plan into `out`, print it, and add it to the step's run in MLflow.

    Raises:
        UserError: the run cannot fit.
    """
    write_plan(make_plan(config, find_architecture(config.model), config.world_size), config, out)
    print((out / "plan.txt").read_text(encoding="utf-8"), flush=True)
    record.outputs(out)

"""Estimate what a run needs of its hardware, and refuse what cannot fit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.io.byte_size import format_bytes
from canvastune.planner.plan import Plan
from canvastune.planner.planner import find_architecture, make_plan, write_plan
from canvastune.planner.render import summarize
from canvastune.tracking import StepRun

logger = logging.getLogger(__name__)

_WEIGHT_BYTES = 2  # of a stored weight: checkpoints are in bfloat16


def plan(config: RunConfig, run_folder: Path, out: Path, record: StepRun) -> None:
    """Write the plan into `out`, print its summary, and add it to the step's run in MLflow.

    Warn if the disk of `run_folder` seems too small for what train and merge will write there.

    Raises:
        UserError: the run cannot fit.
    """
    made = make_plan(config, find_architecture(config.model), config.world_size)
    write_plan(made, config, out)
    print(f"{summarize(made)}\nthe whole plan: {run_folder / 'plan' / 'plan.txt'}", flush=True)
    if shortage := describe_shortage(made, shutil.disk_usage(run_folder).free):
        logger.warning(f"{run_folder}: {shortage}")
    record.outputs(out)


def describe_shortage(plan: Plan, free: int) -> str | None:
    """Return a line if the run's checkpoints and its complete model exceed the free bytes.

    A warning only: a file system may report less or more than its quota.
    """
    checkpoints = plan.checkpoints * plan.checkpoint_bytes
    model = plan.parameters["total"].total * _WEIGHT_BYTES
    if checkpoints + model <= free:
        return None
    return (
        f"{format_bytes(free)} free, but the run writes up to {format_bytes(checkpoints)} of "
        f"checkpoints and a complete model of {format_bytes(model)}. Free some space before it "
        "trains, or lower train.keep_checkpoints"
    )

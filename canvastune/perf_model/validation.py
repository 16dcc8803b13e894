"""What the validations of a run cost: forward passes over the held-out rows, at each corruption level.

As `Trainer.validate` does them: every rank takes `train.micro_batch_size` of the rows at a time, and
all ranks as many passes. On a GPU, with one block of each row, the canvases of all levels share a
pass over the row's clean tokens; otherwise each level has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from canvastune.config.schema import Blocks, TrainConfig, block_count
from canvastune.perf_model.architecture import Architecture
from canvastune.perf_model.hardware import Accelerator
from canvastune.perf_model.memory import StepShape
from canvastune.perf_model.step_time import forward_time

MOST_SHARE = 0.05  # goal: of the time of all steps


@dataclass(frozen=True)
class ValidationTimes:
    """What validations cost a run, in seconds."""

    rows: int  # held-out rows that one takes
    forwards: int  # of each rank in one
    seconds: float  # one
    count: int  # of the base, every `train.validate_every` steps, and of the last step
    total: float  # all of them
    share: float  # total, of the time of all steps
    every_from: int | None  # least steps between two for `MOST_SHARE`; None: two of them exceed it


def validation_times(
    architecture: Architecture,
    step: StepShape,
    accelerator: Accelerator,
    train: TrainConfig,
    rows: int,
    step_seconds: float,
) -> ValidationTimes:
    """Return the times of the validations of `rows` held-out rows, as long as the step's examples.

    Args:
        step: of the training, with its micro-batch.
    """
    levels = len(train.validation_levels)
    blocks = validated_blocks(train.validation_blocks, step)
    together = step.device == "cuda" and train.validation_blocks == 1
    canvases = levels if together else blocks
    shape = replace(
        step,
        blocks=canvases,
        blocks_at_once=None,
        chosen_start=None,
        micro_steps=1,
        self_conditioning=0.0,
    )
    strides = math.ceil(rows / (step.world_size * step.micro_batch))
    forwards = strides * (1 if together else levels)
    seconds = forwards * forward_time(architecture, shape, accelerator)
    training = train.steps * step_seconds
    count = 1 + math.ceil(train.steps / train.validate_every)
    most = math.floor(MOST_SHARE * training / seconds)  # validations
    return ValidationTimes(
        rows=rows,
        forwards=forwards,
        seconds=seconds,
        count=count,
        total=count * seconds,
        share=count * seconds / training,
        every_from=math.ceil(train.steps / (most - 1)) if most > 1 else None,
    )


def validated_blocks(setting: Blocks, step: StepShape) -> int:
    """Return how many blocks of an example a validation scores, if all of it is response."""
    return block_count(setting, -(-step.clean // step.canvas))

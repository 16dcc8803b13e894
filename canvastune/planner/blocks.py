"""What `objective.blocks` costs and yields at each number of blocks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.config.schema import Blocks, block_count
from canvastune.errors import UserError
from canvastune.perf_model.architecture import Architecture
from canvastune.perf_model.flops import count_bytes, count_flops
from canvastune.perf_model.hardware import Accelerator
from canvastune.perf_model.memory import StepShape
from canvastune.perf_model.step_time import step_time
from canvastune.planner.estimate import largest_fitting, needed_bytes, step_shape

_CHOICES: tuple[Blocks, ...] = (1, 2, 4, 8, "all")


@dataclass(frozen=True)
class Answers:
    """How long a data set's answers are."""

    rows: Mapping[int, int]  # by the number of blocks
    prefix: int  # mean tokens before an answer
    held_out: int  # rows of the validation split
    measured: bool  # False: assumed, each fills `data.seq_length`
    trained: int = 0  # rows of the training split; 0: unknown

    @property
    def most(self) -> int:
        """Blocks of the longest answer."""
        return max(self.rows)

    @classmethod
    def assumed(cls, config: RunConfig, canvas: int) -> Answers:
        """Assume what a plan without data has to: examples that are all answer."""
        blocks = -(-config.data.seq_length // canvas)
        return cls({blocks: 1}, 0, _held_out(config), measured=False)

    @classmethod
    def read(cls, prepared: Path, canvas: int) -> Answers:
        """Read the data card of a prepared data set.

        Raises:
            UserError: no card there, or one for blocks of another length.
        """
        path = prepared / "card.json"
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            rows = {int(blocks): count for blocks, count in card["block_histogram"].items()}
            found, prefix = card["canvas_length"], round(card["prefix_tokens"]["mean"])
            held_out, trained = int(card["validation"]), int(card["train"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path}: found no data card ({error}), expected the folder of a prepared data set",
                hint="Pass the folder that `canvastune prepare --output` wrote.",
            ) from None
        if found != canvas:
            raise UserError(
                f"{path}: canvas_length is {found}, expected the model's {canvas}",
                hint="Prepare the data with this recipe's model.",
            )
        return cls(rows, prefix, held_out, measured=True, trained=trained)


def _held_out(config: RunConfig) -> int:
    """Assume the held-out rows of data that the run trains on once."""
    fraction, limit = config.data.validation_fraction, config.data.validation_rows
    trained = config.train.steps * config.train.global_batch_size
    rows = max(1, round(trained * fraction / (1 - fraction)))
    return rows if limit is None else min(rows, limit)


@dataclass(frozen=True)
class BlocksCost:
    """A step with one value of `objective.blocks`."""

    blocks: Blocks
    share: float  # of all blocks of the answers that an epoch denoises
    scored_tokens: float  # canvas tokens per step, over all ranks
    step_seconds: float
    scored_per_second: float
    scored_per_gpu_hour: float
    memory_bytes: int  # needed on each device, with the longest examples
    fits: bool


def block_costs(
    config: RunConfig,
    architecture: Architecture,
    accelerator: Accelerator,
    world_size: int,
    limit: int,
    answers: Answers,
) -> tuple[BlocksCost, ...]:
    """Return the cost of each number of blocks up to that of the longest answer, and of all."""
    chosen = [blocks for blocks in _CHOICES if blocks == "all" or blocks < answers.most]
    costs = []
    for blocks in chosen:
        changed = config.with_values("objective", blocks=blocks)
        needed = _needed(changed, architecture, accelerator, world_size)
        scored, seconds, share = _step(changed, architecture, accelerator, world_size, answers)
        costs.append(
            BlocksCost(
                blocks,
                share,
                scored,
                seconds,
                scored / seconds,
                scored / seconds * 3600 / world_size,
                needed,
                needed <= limit,
            )
        )
    return tuple(costs)


def largest_blocks(
    config: RunConfig,
    architecture: Architecture,
    accelerator: Accelerator,
    world_size: int,
    limit: int,
) -> int | None:
    """Return the most blocks of the longest example that fit; None: not even one."""

    def fits(blocks: int) -> bool:
        changed = config.with_values("objective", blocks=blocks)
        return _needed(changed, architecture, accelerator, world_size) <= limit

    return largest_fitting(fits, -(-config.data.seq_length // architecture.canvas))


def _needed(
    config: RunConfig, architecture: Architecture, accelerator: Accelerator, world_size: int
) -> int:
    longest = step_shape(config, architecture, world_size, longest=True)
    return needed_bytes(architecture, longest, accelerator)


def _step(
    config: RunConfig,
    architecture: Architecture,
    accelerator: Accelerator,
    world_size: int,
    answers: Answers,
) -> tuple[float, float, float]:
    """Return the scored tokens and the seconds of a step, and the share of all blocks that are
    denoised: the mean over the answers' lengths.
    """
    shape = step_shape(config, architecture, world_size, longest=False)
    scored = seconds = denoised = 0.0
    for blocks, rows in answers.rows.items():
        count = block_count(config.objective.blocks, blocks)
        step = _of_answers(shape, answers, blocks, count)
        flops, received = count_flops(architecture, step), count_bytes(architecture, step)
        seconds += rows * step_time(architecture, step, flops, received, accelerator).total
        scored += rows * count * step.canvas * step.micro_batch * step.micro_steps * world_size
        denoised += rows * count
    rows = sum(answers.rows.values())
    every = sum(blocks * count for blocks, count in answers.rows.items())
    return scored / rows, seconds / rows, denoised / every


def _of_answers(shape: StepShape, answers: Answers, blocks: int, count: int) -> StepShape:
    """Return the step of examples whose answers have this many blocks, `count` of them denoised."""
    clean = answers.prefix + blocks * shape.canvas if answers.measured else shape.clean
    # Of one block, as many come before it as after it, on average.
    start = clean - (blocks + 1) * shape.canvas // 2 if count == 1 else None
    return dataclasses.replace(
        shape, clean=clean, blocks=count, chosen_start=max(0, start) if start is not None else None
    )

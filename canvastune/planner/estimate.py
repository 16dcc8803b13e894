"""Estimate the bytes and seconds of a recipe on a number of ranks."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

from canvastune.config import RunConfig
from canvastune.config.schema import block_count
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.errors import UserError
from canvastune.perf_model.architecture import Architecture
from canvastune.perf_model.hardware import FRAGMENTATION, Accelerator
from canvastune.perf_model.memory import StepShape, memory_timeline, peak

# Bytes that bfloat16 adds to a CPU process: reordered weights, kernels (measured).
_BFLOAT16_KERNELS = 250_000_000


def step_shape(
    config: RunConfig, architecture: Architecture, world_size: int, *, longest: bool
) -> StepShape:
    """Return the shape of one rank's step.

    Args:
        longest: assume the longest examples, as memory has to: the last block is filled after the
            cut to `seq_length`.
    """
    train = config.train
    micro = train.micro_batch_size or train.global_batch_size // world_size
    step = StepShape(
        world_size=world_size,
        ep=config.parallel.ep,
        micro_batch=micro,
        micro_steps=train.global_batch_size // (world_size * micro),
        clean=config.data.seq_length,
        canvas=architecture.canvas,
        checkpointing=train.activation_checkpointing,
        self_conditioning=config.objective.self_conditioning_probability,
        device="cpu" if config.hardware.accelerator == "cpu" else "cuda",
        # Of an example that is all response.
        blocks=block_count(
            config.objective.blocks, -(-config.data.seq_length // architecture.canvas)
        ),
        blocks_at_once=train.micro_batch_blocks,
    )
    return with_longest_example(step, config.data.seq_length, config) if longest else step


def with_longest_example(step: StepShape, seq_length: int, config: RunConfig) -> StepShape:
    """Return the shape with examples of `seq_length` tokens and a filled last block."""
    return dataclasses.replace(
        step,
        clean=seq_length + step.canvas - 1,
        blocks=block_count(config.objective.blocks, -(-seq_length // step.canvas)),
    )


def device_memory_timeline(
    architecture: Architecture, step: StepShape, accelerator: Accelerator
) -> dict[str, dict[str, int]]:
    """Return `memory_timeline`, with what the process itself holds on a CPU."""
    process = round(accelerator.process * 1e9)
    if process and architecture.compute_bytes == 2:
        process += _BFLOAT16_KERNELS
    if process and step.world_size > 1:
        # gloo copies what it gathers, of which the embedding is the largest.
        process += architecture.vocabulary * architecture.hidden * architecture.compute_bytes
    return {
        moment: parts | ({"process": process} if process else {})
        for moment, parts in memory_timeline(architecture, step).items()
    }


def needed_bytes(architecture: Architecture, step: StepShape, accelerator: Accelerator) -> int:
    """Return the bytes that must be free on each device."""
    size = sum(peak(device_memory_timeline(architecture, step, accelerator))[1].values())
    return size + reserved_bytes(size, accelerator)


def reserved_bytes(peak_bytes: int, accelerator: Accelerator) -> int:
    """Return the bytes needed in addition to the allocator's peak: driver, collectives,
    fragmentation.
    """
    return round(accelerator.outside * 1e9 + FRAGMENTATION * peak_bytes)


def available_bytes(config: RunConfig, accelerator: Accelerator) -> int:
    """Return the bytes that a device has."""
    return round((config.hardware.gpu_memory or accelerator.memory or 0) * 1e9)


def largest_fitting(fits: Callable[[int], bool], most: int) -> int | None:
    """Return the largest number from 1 to `most` that fits, given that all smaller ones do; None if
    1 does not.
    """
    return bisect.bisect(range(1, most + 1), False, key=lambda number: not fits(number)) or None


def check_layout(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    """Check that experts and global batch divide over the ranks.

    Raises:
        UserError: as `ParallelDims.of`, and for less than one rank.
    """
    if world_size < 1:
        raise UserError(
            f"--gpus: found {world_size}, expected at least 1",
            hint="Pass the number of GPUs of all nodes.",
        )
    ParallelDims.of(
        config,
        world_size,
        experts=architecture.experts,
        hidden=architecture.hidden,
        expert_size=architecture.expert_size,
    )

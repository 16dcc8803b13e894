"""Estimate the bytes and seconds of a recipe on a number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from canvastune.config import RunConfig
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.errors import UserError
from canvastune.perf_model.architecture import (
    Architecture,
)
from canvastune.perf_model.hardware import (
    FRAGMENTATION,
    Accelerator,
)
from canvastune.perf_model.memory import StepShape, memory_timeline, peak

_BFLOAT16_KERNELS = 250_000_000  # bytes that a CPU process holds more with bfloat16: reordered weights, kernels (measured)


def _step(config: RunConfig, architecture: Architecture, world_size: int, *, longest: bool) -> StepShape:
    """A rank's step with examples of `seq_length`; for memory, of the longest: the fill of the last block comes after the cut."""
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
    )
    return _of_length(step, config.data.seq_length) if longest else step


def _of_length(step: StepShape, seq_length: int) -> StepShape:
    return dataclasses.replace(step, clean=seq_length + step.canvas - 1)


def _memory_timeline(architecture: Architecture, step: StepShape, accelerator: Accelerator) -> dict[str, dict[str, int]]:
    process = round(accelerator.process * 1e9)
    if process and architecture.compute_bytes == 2:
        process += _BFLOAT16_KERNELS
    if process and step.world_size > 1:  # gloo copies what it gathers, the embedding above all
        process += architecture.vocabulary * architecture.hidden * architecture.compute_bytes
    return {moment: parts | ({"process": process} if process else {}) for moment, parts in memory_timeline(architecture, step).items()}


def _needed(architecture: Architecture, step: StepShape, accelerator: Accelerator) -> int:
    size = sum(peak(_memory_timeline(architecture, step, accelerator))[1].values())
    return size + _reserved(size, accelerator)


def _reserved(peak_bytes: int, accelerator: Accelerator) -> int:
    return round(accelerator.outside * 1e9 + FRAGMENTATION * peak_bytes)


def _limit(config: RunConfig, accelerator: Accelerator) -> int:
    return round((config.hardware.gpu_memory or accelerator.memory or 0) * 1e9)


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to `most` that fits, where all smaller ones do; None if 1 does not."""
    if not fits(1):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _check_layout(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    if world_size < 1:
        raise UserError(f"--gpus: found {world_size}, expected at least 1. Give the number of GPUs of all nodes")
    ParallelDims.of(config, world_size, experts=architecture.experts, hidden=architecture.hidden, expert_size=architecture.expert_size)

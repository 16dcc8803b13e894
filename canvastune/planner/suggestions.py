"""Find the smallest changes of a recipe that fit the hardware."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.perf_model.architecture import Architecture, read_architecture
from canvastune.perf_model.hardware import Accelerator
from canvastune.planner.estimate import check_layout, needed_bytes, step_shape
from canvastune.planner.plan import Change

_MAX_RANKS = 4096
# A changed recipe, its number of ranks, and the settings that changed.
Candidate = tuple[RunConfig, int, tuple[str, ...]]
Candidates = Iterator[Candidate]


def smallest_changes(
    config: RunConfig, model: Path, world_size: int, accelerator: Accelerator, limit: int
) -> Iterator[Change]:
    """Yield changes that fit, the mildest first, of at most three levers; none that contains a
    smaller one.
    """

    @functools.cache
    def architecture_with(method: Literal["lora", "full"], experts: bool) -> Architecture:
        changed = config.with_values("train", method=method).with_values("lora", experts=experts)
        return read_architecture(changed, model)

    def needed(changed: RunConfig, ranks: int) -> int | None:
        try:
            architecture = architecture_with(changed.train.method, changed.lora.experts)
            check_layout(changed, architecture, ranks)
        except UserError:
            return None
        return needed_bytes(
            architecture, step_shape(changed, architecture, ranks, longest=True), accelerator
        )

    combinations = [
        levers for count in (1, 2, 3) for levers in itertools.combinations(_LEVERS, count)
    ]
    found: list[set[Callable[..., Candidates]]] = []
    for levers in sorted(combinations, key=lambda levers: sum(_LEVERS[lever] for lever in levers)):
        if any(smaller <= set(levers) for smaller in found):
            continue
        candidates: list[Candidate] = [(config, world_size, ())]
        for lever in levers:
            candidates = [
                (changed, ranks, (*settings, *more))
                for start, count, settings in candidates
                for changed, ranks, more in lever(start, count)
            ]
        for changed, ranks, settings in candidates:
            size = needed(changed, ranks)
            if size is not None and size <= limit:
                yield Change(settings, size)
                found.append(set(levers))
                break


def _checkpoint(config: RunConfig, ranks: int) -> Candidates:
    if config.train.activation_checkpointing is not True:
        yield _setting(config, ranks, "train.activation_checkpointing", True)


def _fewer_examples(config: RunConfig, ranks: int) -> Candidates:
    size = (config.train.micro_batch_size or config.train.global_batch_size // ranks) // 2
    while size >= 1:
        yield _setting(config, ranks, "train.micro_batch_size", size)
        size //= 2


def _fewer_blocks_at_once(config: RunConfig, ranks: int) -> Candidates:
    blocks = config.objective.blocks
    most = config.data.seq_length if blocks == "all" else blocks  # far more than there are
    at_once = config.train.micro_batch_blocks or most
    while at_once > 1:
        at_once = -(-at_once // 2)
        yield _setting(config, ranks, "train.micro_batch_blocks", at_once)


def _fewer_blocks(config: RunConfig, ranks: int) -> Candidates:
    # An example has fewer blocks than tokens: the first counts may be those of all blocks.
    most, blocks = config.data.seq_length, config.objective.blocks
    count = (most if blocks == "all" else min(blocks, most)) // 2
    while count >= 1:
        yield _setting(config, ranks, "objective.blocks", count)
        count //= 2


def _shorten(config: RunConfig, ranks: int) -> Candidates:
    length = config.data.seq_length * 3 // 4 // 64 * 64
    while length >= 256:
        yield _setting(config, ranks, "data.seq_length", length)
        length = length * 3 // 4 // 64 * 64


def _more_ranks(config: RunConfig, ranks: int) -> Candidates:
    more = ranks * 2
    while more <= _MAX_RANKS:
        batch = config.train.global_batch_size
        each = config.train.micro_batch_size or 1
        grown = -(-batch // (more * each)) * more * each
        changed, _, settings = _setting(config, more, "train.global_batch_size", grown)
        yield changed, more, (f"{more} ranks", *(settings if grown != batch else ()))
        more *= 2


def _adapters(config: RunConfig, ranks: int) -> Candidates:
    if config.train.method == "full":
        yield _setting(config, ranks, "train.method", "lora")


def _fewer_adapters(config: RunConfig, ranks: int) -> Candidates:
    if config.train.method == "lora" and config.lora.experts:
        yield _setting(config, ranks, "lora.experts", False)


# What a change costs its user: time, then data, then a different kind of training or more machines.
_LEVERS: dict[Callable[[RunConfig, int], Candidates], int] = {
    _checkpoint: 1,
    _fewer_examples: 1,
    _fewer_blocks_at_once: 1,
    _fewer_blocks: 2,
    _shorten: 2,
    _fewer_adapters: 3,
    _adapters: 4,
    _more_ranks: 4,
}


def _setting(config: RunConfig, ranks: int, name: str, value: bool | int | str) -> Candidate:
    section, key = name.split(".")
    written = str(value).lower() if isinstance(value, bool) else value
    return config.with_values(section, **{key: value}), ranks, (f"{name}={written}",)

"""Compare what a recipe asks for with this machine's accelerators, memory and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.io.byte_size import format_bytes
from canvastune.planner.plan import Plan, refuse_if_too_big
from canvastune.planner.planner import find_architecture, make_plan
from pipelines.doctor.finding import Finding
from pipelines.doctor.machine import Gpu, find_gpus, host_memory, hub_cache, usable_cpus

_WEIGHT_BYTES = 2  # of a stored weight: checkpoints are in bfloat16
_CLOSE = 0.97  # a GPU reports a little less memory than its datasheet's


def check_hardware(
    config: RunConfig,
    workspace: Path,
    *,
    submitted: bool = False,
    gpus: Callable[[], Sequence[Gpu]] = find_gpus,
    memory: Callable[[], float] = host_memory,
    disk_usage: Callable[[Path], Any] = shutil.disk_usage,
) -> Iterator[Finding]:
    """Plan the run, and compare it with this machine.

    Args:
        submitted: the run is for Kubeflow, whatever backend the recipe names.
        gpus: the GPUs that torch can use.
        memory: bytes of host memory.
        disk_usage: as `shutil.disk_usage`.
    """
    try:
        plan = make_plan(config, find_architecture(config.model), config.world_size)
        refuse_if_too_big(plan)
    except UserError as error:
        yield Finding("plan", "problem", str(error), error.hint or "correct the recipe")
        return
    needed, limit = (format_bytes(size) for size in (plan.needed_bytes, plan.limit_bytes))
    found = f"{plan.world_size} ranks on {plan.accelerator}, {needed} of {limit} each"
    yield Finding("plan", "ok", found)
    if submitted or config.cluster.backend != "local":
        found = "the run is for a cluster, whose nodes are not checked from here"
        yield Finding("accelerators", "skipped", found)
        return
    if config.hardware.accelerator.lower() == "cpu":
        yield _check_processor(config, plan, memory())
    else:
        yield from _check_gpus(config, plan, gpus())
        yield from _check_host_copies(plan, memory())
    yield from _check_space(config, plan, workspace, disk_usage)


def _check_processor(config: RunConfig, plan: Plan, memory: float) -> Finding:
    processes, own = config.world_size, usable_cpus()
    needed = processes * plan.needed_bytes
    found = (
        f"{processes} processes on {own} cores, {format_bytes(needed)} of {format_bytes(memory)}"
    )
    if needed > memory:
        fix = "use fewer processes (parallel.nproc_per_node), a smaller model or another machine"
        return Finding("accelerators", "problem", found, fix)
    if processes > own:
        fix = f"--set parallel.nproc_per_node={own}, and parallel.ep to match"
        return Finding("accelerators", "warning", f"{found}: they share cores", fix)
    return Finding("accelerators", "ok", found)


def _check_gpus(config: RunConfig, plan: Plan, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    wanted = f"{config.world_size} GPUs ({config.hardware.accelerator})"
    if not gpus:
        fix = (
            "run it on a machine that has them, submit it to a cluster, or train on the CPU: "
            "--set hardware.accelerator=cpu"
        )
        found = f"the recipe asks for {wanted}; torch finds none here"
        yield Finding("accelerators", "problem", found, fix)
        return
    names = "; ".join(dict.fromkeys(gpu.name for gpu in gpus))
    found = f"the recipe asks for {wanted}; this machine has {len(gpus)} ({names})"
    if len(gpus) < config.world_size:
        fix = f"--set parallel.nproc_per_node={len(gpus)}, and parallel.ep to match"
        yield Finding("accelerators", "problem", found, fix)
        return
    smallest = min(gpu.memory for gpu in gpus[: config.world_size])
    if smallest < _CLOSE * plan.limit_bytes:
        found = f"{found}, with {format_bytes(smallest)} each; planned for {plan.limit_bytes / 1e9:g} GB"
        fix = f"--set hardware.gpu_memory={int(smallest / 1e9)}, which plans for them"
        too_small = plan.needed_bytes > smallest
        yield Finding("accelerators", "problem" if too_small else "warning", found, fix)
    else:
        yield Finding("accelerators", "ok", found)


def _check_host_copies(plan: Plan, memory: float) -> Iterator[Finding]:
    if plan.host_bytes > memory:
        found = (
            f"a checkpoint is copied to host memory before it is written: "
            f"{format_bytes(plan.host_bytes)}, and this machine has {format_bytes(memory)}"
        )
        yield Finding("memory", "problem", found, "--set train.async_checkpoints=false")


def _check_space(
    config: RunConfig, plan: Plan, workspace: Path, disk_usage: Callable[[Path], Any]
) -> Iterator[Finding]:
    """Compare what a run writes with the free space, by file system: two folders may share one."""
    weights = plan.parameters["total"].total * _WEIGHT_BYTES
    parts = {
        workspace: [
            ("checkpoints", plan.checkpoints * plan.checkpoint_bytes),
            ("a complete model", weights),
        ]
    }
    if not Path(config.model.id).exists() and not _is_cached(config):
        parts[hub_cache()] = [("the base model", weights)]
    by_disk: dict[int, list[tuple[Path, list[tuple[str, int]]]]] = {}
    for folder, written in parts.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        by_disk.setdefault(os.stat(there).st_dev, []).append((there, written))
    for places in by_disk.values():
        free = disk_usage(places[0][0]).free
        written = [part for _, each in places for part in each]
        total = sum(size for _, size in written)
        what = ", ".join(f"{name} {format_bytes(size)}" for name, size in written)
        where = " and ".join(dict.fromkeys(str(place) for place, _ in places))
        found = f"the run writes up to {format_bytes(total)} ({what}) to {where}, "
        found += f"which has {format_bytes(free)} free"
        if total > free:
            fix = "free some space, use --workspace and HF_HOME on a larger disk, or lower "
            yield Finding("space", "problem", found, f"{fix}train.keep_checkpoints")
        else:
            yield Finding("space", "ok", found)


def _is_cached(config: RunConfig) -> bool:
    """Return whether the Hub's cache has the weights: the index is downloaded with them."""
    files = ("model.safetensors", "model.safetensors.index.json")
    kept = (
        try_to_load_from_cache(config.model.id, file, revision=config.model.revision)
        for file in files
    )
    return any(isinstance(path, str) for path in kept)

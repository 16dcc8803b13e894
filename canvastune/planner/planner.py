"""`canvastune plan`: what a run will need of its hardware, from the model's config.json alone, and a refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from canvastune.io.provenance import write_provenance
from canvastune.perf_model.architecture import (
    count_parameters,
    read_architecture,
)
from canvastune.perf_model.flops import count_bytes, count_flops
from canvastune.perf_model.hardware import (
    Accelerator,
    find_accelerator,
    peak_rate,
    step_time,
)
from canvastune.perf_model.memory import highest_by_phase, peak
from canvastune.planner.estimate import _check_layout, _largest, _limit, _memory_timeline, _needed, _of_length, _reserved, _step
from canvastune.planner.plan import Plan, as_tree, refuse_if_too_big
from canvastune.planner.render import render
from canvastune.planner.suggestions import _CHANGES_NAMED, _MOST_EXAMPLES, _smallest_changes

RELEASED = "google/diffusiongemma-26B-A4B-it"
SHIPPED = Path(__file__).parents[1] / "perf_model" / "diffusiongemma-26b-a4b.json"
_CHECKPOINT_BYTES = 12  # per trained parameter: weight and two moments in float32


def find_architecture(config: ModelConfig) -> Path:
    """The folder with the model's config.json; for the released model, where the Hub cannot be reached, the copy that is shipped.

    Raises:
        UserError: another model that cannot be found.
    """
    try:
        return resolve_model(config, weights=False)
    except UserError:
        if config.id != RELEASED:
            raise
        return SHIPPED


def make_plan(config: RunConfig, model: Path, world_size: int) -> Plan:
    """Plan a run on `world_size` ranks, without weights and without a GPU.

    Args:
        model: a checkpoint's folder, of which config.json alone is read, or a config.json.

    Raises:
        UserError: the ranks, experts and batch do not divide, or the model or the accelerator is not known. A plan that does not
            fit the memory is made all the same; `refuse_if_too_big` and `write_plan` refuse it.
    """
    architecture = read_architecture(config, model)
    accelerator = find_accelerator(config.hardware.accelerator)
    _check_layout(config, architecture, world_size)
    longest = _step(config, architecture, world_size, longest=True)
    step = _step(config, architecture, world_size, longest=False)
    found = _memory_timeline(architecture, longest, accelerator)
    moment, parts = peak(found)
    flops, received = count_flops(architecture, step), count_bytes(architecture, step)
    seconds = step_time(architecture, step, flops, received, accelerator)
    limit = _limit(config, accelerator)
    memory_bytes = sum(parts.values())
    parameters = count_parameters(architecture)
    checkpoint = parameters["total"].trained * _CHECKPOINT_BYTES
    plan = Plan(
        name=config.name,
        model=config.model.id,
        notes=tuple(_notes(config, model, accelerator)),
        method=config.train.method,
        precision=config.train.precision,
        accelerator=accelerator.title,
        world_size=world_size,
        ep=step.ep,
        efsdp=step.efsdp,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=step.micro_batch,
        micro_steps=step.micro_steps,
        seq_length=config.data.seq_length,
        canvas_length=architecture.canvas,
        activation_checkpointing=config.train.activation_checkpointing,
        parameters=parameters,
        memory=parts,
        moment=moment,
        phases=highest_by_phase(found),
        memory_bytes=memory_bytes,
        reserved_bytes=_reserved(memory_bytes, accelerator),
        limit_bytes=limit,
        checkpoint_bytes=checkpoint,
        checkpoints=config.train.keep_checkpoints + 2,
        host_copy_bytes=checkpoint // world_size if config.train.async_checkpoints else 0,
        flops_by_pass=flops.by_pass,
        flops_by_part=flops.by_part,
        model_flops=flops.model * world_size,
        bytes_received=received,
        seconds=seconds,
        step_seconds=seconds.total,
        run_seconds=seconds.total * config.train.steps,
        model_flops_utilisation=flops.model / (seconds.total * peak_rate(architecture, accelerator)),
        tokens_per_step=config.train.global_batch_size * (step.clean + step.canvas),
        largest_micro_batch=_largest(
            lambda size: _needed(architecture, dataclasses.replace(longest, micro_batch=size), accelerator) <= limit, _MOST_EXAMPLES
        ),
        largest_sequence=_largest(
            lambda length: _needed(architecture, _of_length(longest, length), accelerator) <= limit, architecture.longest
        ),
        changes=(),
    )
    if plan.fits:
        return plan
    return dataclasses.replace(
        plan, changes=tuple(itertools.islice(_smallest_changes(config, model, world_size, accelerator, limit), _CHANGES_NAMED))
    )


def write_plan(plan: Plan, config: RunConfig, out: Path) -> None:
    """Write `plan.json` and `plan.txt` to a new folder.

    Raises:
        UserError: the plan does not fit, or the folder already holds something.
    """
    refuse_if_too_big(plan)
    with atomic_directory(out) as partial:
        (partial / "plan.json").write_text(json.dumps(as_tree(plan), indent=2) + "\n", encoding="utf-8")
        (partial / "plan.txt").write_text(render(plan), encoding="utf-8")
        write_provenance(partial, "plan", config, {})


def _notes(config: RunConfig, model: Path, accelerator: Accelerator) -> Iterator[str]:
    if model == SHIPPED:
        yield "config.json cannot be had from the Hub: planned from the copy of this model's architecture that canvastune ships."
    if accelerator.process:
        yield "On CPU, small models are bound by the cost of calls: the estimated time is a floor."
    memory = config.hardware.gpu_memory
    if accelerator.memory and memory and abs(memory - accelerator.memory) > 0.01 * accelerator.memory:
        yield f"hardware.gpu_memory is {memory:g} GB; an {accelerator.title} has {accelerator.memory:g} GB."

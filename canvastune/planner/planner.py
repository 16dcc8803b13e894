"""`canvastune plan`: plan what a run needs of its hardware from the model's config.json, and refuse
what cannot fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.config.cluster import parse_quantity
from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from canvastune.io.json_text import to_json_text
from canvastune.io.provenance import write_provenance
from canvastune.perf_model.architecture import (
    Architecture,
    count_parameters,
    read_architecture,
)
from canvastune.perf_model.checkpoints import checkpoint_times
from canvastune.perf_model.flops import count_bytes, count_flops
from canvastune.perf_model.hardware import Accelerator, find_accelerator, peak_rate
from canvastune.perf_model.launches import count_grouped_products, count_launches, count_waits
from canvastune.perf_model.memory import StepShape, peak, peak_by_phase
from canvastune.perf_model.step_time import step_time
from canvastune.perf_model.validation import validation_times
from canvastune.planner.blocks import Answers, block_costs, largest_blocks
from canvastune.planner.estimate import (
    available_bytes,
    check_layout,
    device_memory_timeline,
    largest_fitting,
    needed_bytes,
    reserved_bytes,
    step_shape,
    with_longest_example,
)
from canvastune.planner.evaluation import plan_evaluation
from canvastune.planner.plan import Plan, as_tree, refuse_if_too_big
from canvastune.planner.render import render
from canvastune.planner.suggestions import smallest_changes

RELEASED = "google/diffusiongemma-26B-A4B-it"
SHIPPED_CONFIG = Path(__file__).parents[1] / "perf_model" / "diffusiongemma-26b-a4b.json"
# Per trained parameter: weight and two moments in float32; the last checkpoint has only the weights.
_CHECKPOINT_BYTES, _LAST_BYTES = 12, 4
_COUNTED_BYTES = 10**9  # of a file whose rows are counted, which takes a second
_MAX_EXAMPLES = 4096  # of a micro-batch
_CHANGES_SHOWN = 3


def find_architecture(config: ModelConfig) -> Path:
    """Return the folder with the model's config.json.

    For the released model a shipped copy is used if the Hub cannot be reached.

    Raises:
        UserError: another model that cannot be found.
    """
    try:
        return resolve_model(config, weights=False)
    except UserError:
        if config.id != RELEASED:
            raise
        return SHIPPED_CONFIG


def make_plan(
    config: RunConfig, model: Path, world_size: int, prepared: Path | None = None
) -> Plan:
    """Plan a run on `world_size` ranks, without weights and without a GPU.

    Args:
        model: a checkpoint's folder, of which only config.json is read, or a config.json.
        prepared: the folder of a prepared data set, whose answers decide what `objective.blocks`
            costs and gives; None: answers that fill `data.seq_length`.

    Raises:
        UserError: ranks, experts and batch do not divide, or the model or the accelerator is
            unknown. A plan that does
            not fit the memory is returned; `refuse_if_too_big` and `write_plan` refuse it.
    """
    architecture = read_architecture(config, model)
    accelerator = find_accelerator(config.hardware.accelerator)
    check_layout(config, architecture, world_size)
    longest = step_shape(config, architecture, world_size, longest=True)
    step = step_shape(config, architecture, world_size, longest=False)
    timeline = device_memory_timeline(architecture, longest, accelerator)
    moment, parts = peak(timeline)
    flops, received = count_flops(architecture, step), count_bytes(architecture, step)
    seconds = step_time(architecture, step, flops, received, accelerator)
    limit = available_bytes(config, accelerator)
    memory_bytes = sum(parts.values())
    answers = (
        Answers.assumed(config, architecture.canvas)
        if prepared is None
        else Answers.read(prepared, architecture.canvas)
    )
    length = largest_fitting(
        lambda length: (
            needed_bytes(architecture, with_longest_example(longest, length, config), accelerator)
            <= limit
        ),
        architecture.longest,
    )
    parameters = count_parameters(architecture)
    trained = parameters["total"].trained
    checkpoint = trained * _CHECKPOINT_BYTES
    # The complete model is written instead of the last checkpoint; a run that is stopped writes one.
    last_bytes = 0 if config.train.method == "full" else trained * _LAST_BYTES
    saves = math.ceil(config.train.steps / config.train.checkpoint_every) - (not last_bytes)
    host_copy = checkpoint // world_size if config.train.async_checkpoints else 0
    plan = Plan(
        name=config.name,
        model=config.model.id,
        notes=tuple(_notes(config, model, accelerator, answers)),
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
        phases=peak_by_phase(timeline),
        memory_bytes=memory_bytes,
        reserved_bytes=reserved_bytes(memory_bytes, accelerator),
        limit_bytes=limit,
        checkpoint_bytes=checkpoint,
        checkpoints=max(1, min(config.train.keep_checkpoints + 2, saves)),
        checkpoint_times=checkpoint_times(
            checkpoint,
            last_bytes,
            config.train.steps,
            config.train.checkpoint_every,
            seconds.total,
            asynchronous=config.train.async_checkpoints,
            ranks=world_size,
            host_rate=accelerator.host_link * 1e9,
            pinned=step.device == "cuda",
            until_update=seconds.total - seconds.update,
        ),
        host_copy_bytes=host_copy,
        host_bytes=min(world_size, config.parallel.nproc_per_node) * host_copy,
        host_limit_bytes=_pod_memory(config),
        flops_by_pass=flops.by_pass,
        flops_by_part=flops.by_part,
        model_flops=flops.model * world_size,
        bytes_received=received,
        seconds=seconds,
        **_host_counts(architecture, step, accelerator),
        step_seconds=seconds.total,
        run_seconds=seconds.total * config.train.steps,
        validation=validation_times(
            architecture,
            step,
            accelerator,
            config.train,
            config.train.validated_rows(answers.held_out),
            seconds.total,
        ),
        model_flops_utilisation=flops.model
        / (seconds.total * peak_rate(architecture, accelerator)),
        tokens_per_step=config.train.global_batch_size * (step.clean + step.canvas_rows),
        largest_micro_batch=largest_fitting(
            lambda size: (
                needed_bytes(
                    architecture, dataclasses.replace(longest, micro_batch=size), accelerator
                )
                <= limit
            ),
            _MAX_EXAMPLES,
        ),
        blocks=longest.blocks,
        forwards_per_example=len(longest.forwards),
        largest_sequence=length,
        sequence_limit=(
            _sequence_limit(config, architecture, longest, length, accelerator) if length else None
        ),
        largest_blocks=largest_blocks(config, architecture, accelerator, world_size, limit),
        block_costs=block_costs(config, architecture, accelerator, world_size, limit, answers),
        answer_blocks=dict(answers.rows) if answers.measured else None,
        evaluation=plan_evaluation(config, architecture, accelerator, answers),
        changes=(),
        hour_price=config.cluster.gpu_hour_price,
        currency=config.cluster.currency,
    )
    if plan.fits:
        return plan
    changes = smallest_changes(config, model, world_size, accelerator, limit)
    return dataclasses.replace(plan, changes=tuple(itertools.islice(changes, _CHANGES_SHOWN)))


def _host_counts(
    architecture: Architecture, step: StepShape, accelerator: Accelerator
) -> dict[str, int]:
    """Return how often the host of a GPU launches, waits and loops over experts in a step."""
    if not accelerator.launch:
        return {"launches": 0, "waits": 0, "expert_loops": 0}
    loops = accelerator.loops(architecture)
    products = count_grouped_products(architecture, step)
    return {
        "launches": count_launches(architecture, step, loops_over_experts=loops),
        "waits": count_waits(architecture, step, loops_over_experts=loops),
        "expert_loops": round(products) if loops else 0,
    }


def _pod_memory(config: RunConfig) -> int | None:
    """Return the bytes of a training pod's memory limit; None: the run is local, or has no limit."""
    limit = config.cluster.memory_limit
    if config.cluster.backend == "local" or limit is None:
        return None
    return int(parse_quantity(limit))


def _sequence_limit(
    config: RunConfig,
    architecture: Architecture,
    longest: StepShape,
    length: int,
    accelerator: Accelerator,
) -> str:
    """Say what a sequence longer than the longest one that fits would exceed: the model's positions,
    or the memory of the part that grows most with the length.
    """
    if length == architecture.longest:
        return "the model's positions"
    moment, parts = peak(
        device_memory_timeline(
            architecture, with_longest_example(longest, length, config), accelerator
        )
    )
    half = with_longest_example(longest, max(1, length // 2), config)
    before = device_memory_timeline(architecture, half, accelerator)[moment]
    grown = max(parts, key=lambda part: parts[part] - before.get(part, 0))
    return f"memory in {moment}: {grown}, {parts[grown] / 1e9:.1f} GB"


def write_plan(plan: Plan, config: RunConfig, out: Path) -> None:
    """Write `plan.json` and `plan.txt` to a new folder.

    Raises:
        UserError: training or evaluation does not fit, or the folder is not empty.
    """
    refuse_if_too_big(plan)
    with atomic_directory(out) as partial:
        (partial / "plan.json").write_text(to_json_text(as_tree(plan), indent=2), encoding="utf-8")
        (partial / "plan.txt").write_text(render(plan), encoding="utf-8")
        write_provenance(partial, "plan", config, {})


def _notes(
    config: RunConfig, model: Path, accelerator: Accelerator, answers: Answers
) -> Iterator[str]:
    if model == SHIPPED_CONFIG:
        yield (
            "config.json is not available from the Hub, so the plan uses the copy that ships with"
            " Canvastune."
        )
    if accelerator.process:
        yield (
            "On CPU, call overhead dominates the time of small models: the estimated time is a"
            " lower bound."
        )
    memory = config.hardware.gpu_memory
    if (
        accelerator.memory
        and memory
        and abs(memory - accelerator.memory) > 0.01 * accelerator.memory
    ):
        yield (
            f"hardware.gpu_memory is {memory:g} GB; an {accelerator.title} has"
            f" {accelerator.memory:g} GB."
        )
    yield _epochs(config, answers)


def _epochs(config: RunConfig, answers: Answers) -> str:
    """Say how often the steps see each row of the data, or how to know it."""
    seen = config.train.steps * config.train.global_batch_size
    said = f"All steps see {seen:,} examples"
    rows, of = answers.trained, "prepared examples"
    file = Path(config.data.source or "").expanduser()
    if (
        not rows
        and file.suffix == ".jsonl"
        and file.is_file()
        and file.stat().st_size <= _COUNTED_BYTES
    ):
        of = "rows of data.source"
        with file.open("rb") as lines:
            rows = sum(not line.isspace() for line in lines)
    if not rows:
        return f"{said}. For epochs, pass the folder of prepared data: --data DIR."
    return f"{said}: {seen / rows:.3g} x the {rows:,} {of}."

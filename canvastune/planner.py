"""`canvastune plan`: what a run will need of its hardware, from the model's config.json alone, and a refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from canvastune.config import Checkpointing, ModelConfig, RunConfig
from canvastune.errors import UserError
from canvastune.layout import check_layout
from canvastune.model.source import resolve_model
from canvastune.outputs import whole_folder, write_provenance
from canvastune.plan.accelerators import FRAGMENTATION, Accelerator, Seconds, find_accelerator, peak_rate, step_time
from canvastune.plan.memory import Step, highest_by_phase, moments, peak
from canvastune.plan.page import plan_text
from canvastune.plan.sizes import Architecture, ParameterCount, count_parameters, read_architecture
from canvastune.plan.work import count_bytes, count_flops

RELEASED = "google/diffusiongemma-26B-A4B-it"
SHIPPED = Path(__file__).parent / "model" / "diffusiongemma-26b-a4b.json"
_MOST_GPUS = 4096
_MOST_EXAMPLES = 4096
_CHANGES_NAMED = 3
_BFLOAT16_KERNELS = 250_000_000  # bytes that a CPU process holds more with bfloat16: reordered weights, kernels (measured)
_CHECKPOINT_BYTES = 12  # per trained parameter: weight and two moments in float32


@dataclass(frozen=True)
class Change:
    """A change of the recipe with which the run fits."""

    settings: tuple[str, ...]
    memory_bytes: int  # per rank, all told


@dataclass(frozen=True)
class Plan:
    """What a run needs. Sizes are bytes, per rank where nothing else is said; a step is one optimiser step of the whole world."""

    name: str
    model: str
    notes: tuple[str, ...]
    method: str
    precision: str
    accelerator: str
    world_size: int
    ep: int
    efsdp: int
    global_batch_size: int
    micro_batch_size: int
    micro_steps: int
    seq_length: int
    canvas_length: int
    activation_checkpointing: Checkpointing
    parameters: dict[str, ParameterCount]
    memory: dict[str, int]  # by part at the moment of the peak
    moment: str  # of the peak
    phases: dict[str, int]  # the highest moment of each phase of a step
    memory_bytes: int  # at the peak, as the trainer measures it: the allocator's on a GPU, the process's on CPU
    reserved_bytes: int  # beside the peak: driver, collectives, fragmentation
    limit_bytes: int
    checkpoint_bytes: int  # of a resume checkpoint on disk, over all ranks
    checkpoints: int  # that stand at once: the newest, the best and the one that is being written
    host_copy_bytes: int  # in host memory, while a checkpoint is written beside the training
    flops_by_pass: dict[str, float]  # of a rank's step
    flops_by_part: dict[str, float]
    model_flops: float  # of a step over all ranks, without what is computed twice
    bytes_received: dict[str, float]  # by collective, of a rank's step
    seconds: Seconds
    step_seconds: float
    run_seconds: float  # of all steps, without validation and checkpoints
    model_flops_utilisation: float
    tokens_per_step: int
    largest_micro_batch: int | None  # None: not even one example fits
    largest_sequence: int | None
    changes: tuple[Change, ...]  # if it does not fit: the smallest that would

    @property
    def needed_bytes(self) -> int:
        """What must be free on each device."""
        return self.memory_bytes + self.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.limit_bytes

    def __str__(self) -> str:
        return plan_text(self)


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
    found = _moments(architecture, longest, accelerator)
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


def refuse_if_too_big(plan: Plan) -> None:
    """Let a plan that fits pass.

    Raises:
        UserError: names what does not fit, by part, and the smallest change that would.
    """
    if plan.fits:
        return
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in plan.memory.items() if size >= 5e7)
    text = (
        f"{plan.name}: each rank needs {plan.needed_bytes / 1e9:.1f} GB, and has {plan.limit_bytes / 1e9:.1f} GB "
        f"(at its peak, {plan.moment}: {parts}, beside it {plan.reserved_bytes / 1e9:.1f}). "
    )
    if not plan.changes:
        raise UserError(text + "No change of batch, sequence, method or number of ranks fits; use accelerators with more memory")
    first, *others = (
        f"{' '.join(_as_option(setting) for setting in change.settings)} ({change.memory_bytes / 1e9:.1f} GB)" for change in plan.changes
    )
    raise UserError(text + f"The smallest change that fits: {first}" + (f"; or {'; or '.join(others)}" if others else ""))


def write_plan(plan: Plan, config: RunConfig, out: Path) -> None:
    """Write `plan.json` and `plan.txt` to a new folder.

    Raises:
        UserError: the plan does not fit, or the folder already holds something.
    """
    refuse_if_too_big(plan)
    with whole_folder(out) as partial:
        (partial / "plan.json").write_text(json.dumps(as_tree(plan), indent=2) + "\n", encoding="utf-8")
        (partial / "plan.txt").write_text(plan_text(plan), encoding="utf-8")
        write_provenance(partial, "plan", config, {})


def as_tree(plan: Plan) -> dict[str, Any]:
    """The plan as plan.json holds it."""
    return {**dataclasses.asdict(plan), "needed_bytes": plan.needed_bytes, "fits": plan.fits}


def _step(config: RunConfig, architecture: Architecture, world_size: int, *, longest: bool) -> Step:
    """A rank's step with examples of `seq_length`; for memory, of the longest: the fill of the last block comes after the cut."""
    train = config.train
    micro = train.micro_batch_size or train.global_batch_size // world_size
    step = Step(
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


def _of_length(step: Step, seq_length: int) -> Step:
    return dataclasses.replace(step, clean=seq_length + step.canvas - 1)


def _moments(architecture: Architecture, step: Step, accelerator: Accelerator) -> dict[str, dict[str, int]]:
    process = round(accelerator.process * 1e9)
    if process and architecture.compute_bytes == 2:
        process += _BFLOAT16_KERNELS
    if process and step.world_size > 1:  # gloo copies what it gathers, the embedding above all
        process += architecture.vocabulary * architecture.hidden * architecture.compute_bytes
    return {moment: parts | ({"process": process} if process else {}) for moment, parts in moments(architecture, step).items()}


def _needed(architecture: Architecture, step: Step, accelerator: Accelerator) -> int:
    size = sum(peak(_moments(architecture, step, accelerator))[1].values())
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
    check_layout(config, world_size, experts=architecture.experts, hidden=architecture.hidden, expert_size=architecture.expert_size)


def _notes(config: RunConfig, model: Path, accelerator: Accelerator) -> Iterator[str]:
    if model == SHIPPED:
        yield "config.json cannot be had from the Hub: planned from the copy of this model's architecture that canvastune ships."
    if accelerator.process:
        yield "On CPU, small models are bound by the cost of calls: the estimated time is a floor."
    memory = config.hardware.gpu_memory
    if accelerator.memory and memory and abs(memory - accelerator.memory) > 0.01 * accelerator.memory:
        yield f"hardware.gpu_memory is {memory:g} GB; an {accelerator.title} has {accelerator.memory:g} GB."


Tried = Iterator[tuple[RunConfig, int, tuple[str, ...]]]  # a changed recipe, its number of ranks, and what was changed


def _smallest_changes(config: RunConfig, model: Path, world_size: int, accelerator: Accelerator, limit: int) -> Iterator[Change]:
    """Changes that fit, at most three levers together, the mildest first; none that holds a smaller one."""

    @functools.cache
    def under(method: Literal["lora", "full"], experts: bool) -> Architecture:
        return read_architecture(_with(_with(config, "train", method=method), "lora", experts=experts), model)

    def needed(changed: RunConfig, ranks: int) -> int | None:
        try:
            architecture = under(changed.train.method, changed.lora.experts)
            _check_layout(changed, architecture, ranks)
        except UserError:
            return None
        return _needed(architecture, _step(changed, architecture, ranks, longest=True), accelerator)

    together = [levers for count in (1, 2, 3) for levers in itertools.combinations(_LEVERS, count)]
    found: list[set[Callable[..., Tried]]] = []
    for levers in sorted(together, key=lambda levers: sum(_LEVERS[lever] for lever in levers)):
        if any(smaller <= set(levers) for smaller in found):
            continue
        tried: list[tuple[RunConfig, int, tuple[str, ...]]] = [(config, world_size, ())]
        for lever in levers:
            tried = [
                (changed, ranks, (*settings, *more)) for start, count, settings in tried for changed, ranks, more in lever(start, count)
            ]
        for changed, ranks, settings in tried:
            size = needed(changed, ranks)
            if size is not None and size <= limit:
                yield Change(settings, size)
                found.append(set(levers))
                break


def _checkpoint(config: RunConfig, ranks: int) -> Tried:
    if config.train.activation_checkpointing is not True:
        yield _with(config, "train", activation_checkpointing=True), ranks, ("train.activation_checkpointing=true",)


def _fewer_examples(config: RunConfig, ranks: int) -> Tried:
    size = (config.train.micro_batch_size or config.train.global_batch_size // ranks) // 2
    while size >= 1:
        yield _with(config, "train", micro_batch_size=size), ranks, (f"train.micro_batch_size={size}",)
        size //= 2


def _shorten(config: RunConfig, ranks: int) -> Tried:
    length = config.data.seq_length * 3 // 4 // 64 * 64
    while length >= 256:
        yield _with(config, "data", seq_length=length), ranks, (f"data.seq_length={length}",)
        length = length * 3 // 4 // 64 * 64


def _more_ranks(config: RunConfig, ranks: int) -> Tried:
    more = ranks * 2
    while more <= _MOST_GPUS:
        batch = config.train.global_batch_size
        each = config.train.micro_batch_size or 1
        grown = -(-batch // (more * each)) * more * each
        settings = (f"{more} ranks", *((f"train.global_batch_size={grown}",) if grown != batch else ()))
        yield _with(config, "train", global_batch_size=grown), more, settings
        more *= 2


def _adapters(config: RunConfig, ranks: int) -> Tried:
    if config.train.method == "full":
        yield _with(config, "train", method="lora"), ranks, ("train.method=lora",)


def _fewer_adapters(config: RunConfig, ranks: int) -> Tried:
    if config.train.method == "lora" and config.lora.experts:
        yield _with(config, "lora", experts=False), ranks, ("lora.experts=false",)


# What a change costs its user: time, then data, then another kind of training or other machines.
_LEVERS: dict[Callable[[RunConfig, int], Tried], int] = {
    _checkpoint: 1,
    _fewer_examples: 1,
    _shorten: 2,
    _fewer_adapters: 3,
    _adapters: 4,
    _more_ranks: 4,
}


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _as_option(setting: str) -> str:
    return f"--set {setting}" if "=" in setting else setting

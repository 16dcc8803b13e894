"""A plan: what a run needs of its hardware, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from canvastune.config.schema import Checkpointing
from canvastune.errors import UserError
from canvastune.perf_model.architecture import (
    ParameterCount,
)
from canvastune.perf_model.checkpoints import CheckpointTimes
from canvastune.perf_model.step_time import Seconds
from canvastune.perf_model.validation import ValidationTimes
from canvastune.planner.blocks import BlocksCost


@dataclass(frozen=True)
class Change:
    """A change of the recipe with which the run fits."""

    settings: tuple[str, ...]
    memory_bytes: int  # per rank, in total


@dataclass(frozen=True)
class EvaluationPlan:
    """What answering the held-out questions before and after needs; sizes are bytes on each GPU."""

    gpus: int
    ep: int  # GPUs that the experts are divided over
    rows: int  # questions
    batch_size: int  # questions that a GPU answers at once
    memory: dict[str, int]  # by part
    memory_bytes: int
    reserved_bytes: int
    limit_bytes: int
    largest_batch_size: int | None  # None: not even one question fits
    blocks_per_answer: float  # mean
    seconds: float  # at most: answers of both models whose blocks take all denoising steps

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be free on each GPU."""
        return self.memory_bytes + self.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Sizes are bytes, per rank unless stated otherwise; a step is one optimizer step of all ranks.
    """

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
    moment: str  # when the peak occurs
    phases: dict[str, int]  # the peak of each phase of a step
    # at the peak, as the trainer measures it: the allocator's on a GPU, the process's on CPU
    memory_bytes: int
    reserved_bytes: int  # in addition to the peak: driver, collectives, fragmentation
    limit_bytes: int
    checkpoint_bytes: int  # of a resume checkpoint on disk, over all ranks
    checkpoints: (
        int  # on disk at the same time: the newest ones, the best and the one being written
    )
    checkpoint_times: CheckpointTimes
    host_copy_bytes: int  # of a rank's part of a checkpoint in host memory; 0: it is not copied
    host_bytes: int  # the copies of all ranks of a node
    host_limit_bytes: int | None  # memory of a pod; None: the recipe does not say
    flops_by_pass: dict[str, float]  # of a rank's step
    flops_by_part: dict[str, float]
    model_flops: float  # of a step over all ranks, without recomputation
    bytes_received: dict[str, float]  # by collective, of a rank's step
    seconds: Seconds
    launches: int  # of kernels, in a rank's step; 0 on a CPU
    waits: int  # of the host for the GPU, in a rank's step
    expert_loops: int  # grouped matmuls of a rank's step that wait and loop over its experts
    step_seconds: float
    run_seconds: float  # of all steps, without validation and checkpoints
    validation: ValidationTimes
    model_flops_utilisation: float  # prose: ok (a key of plan.json)
    tokens_per_step: int
    largest_micro_batch: int | None  # None: not even one example fits
    largest_sequence: int | None
    sequence_limit: str | None  # what a longer sequence would exceed
    blocks: int  # of the longest example, that a step denoises
    forwards_per_example: int  # that these blocks take
    largest_blocks: int | None  # the largest objective.blocks that fits
    block_costs: tuple[BlocksCost, ...]  # by `objective.blocks`
    answer_blocks: dict[int, int] | None  # answers by their blocks; None: no data was given
    evaluation: EvaluationPlan
    changes: tuple[Change, ...]  # if it does not fit: the smallest changes that would
    hour_price: float | None = None  # of an accelerator
    currency: str = "USD"

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be free on each device."""
        return self.memory_bytes + self.reserved_bytes

    @property
    def accelerator_hours(self) -> float:
        """Of all steps, without validation and checkpoints."""
        return self.world_size * self.run_seconds / 3600

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.limit_bytes

    @property
    def copies_fit(self) -> bool:
        """Whether the copies of a checkpoint fit a pod's memory, where the recipe limits it."""
        return self.host_limit_bytes is None or self.host_bytes <= self.host_limit_bytes


def refuse_if_too_big(plan: Plan) -> None:
    """Refuse a plan whose training, checkpoints or evaluation do not fit.

    Raises:
        UserError: names what does not fit, by part; the hint, the smallest change that would.
    """
    if plan.fits:
        _refuse_copies(plan)
        refuse_evaluation(plan.name, plan.evaluation)
        return
    parts = ", ".join(
        f"{part_name(part)} {size / 1e9:.1f}" for part, size in plan.memory.items() if size >= 5e7
    )
    message = (
        f"{plan.name}: each rank needs {plan.needed_bytes / 1e9:.1f} GB, but has"
        f" {plan.limit_bytes / 1e9:.1f} GB (peak in {plan.moment}: {parts}; reserved"
        f" {plan.reserved_bytes / 1e9:.1f})"
    )
    if not plan.changes:
        raise UserError(
            message,
            hint=(
                "No change of batch, sequence, method or number of ranks would make it fit; use"
                " accelerators with more memory."
            ),
        )
    changes = (
        f"{' '.join(_as_option(setting) for setting in change.settings)}"
        f" ({change.memory_bytes / 1e9:.1f} GB)"
        for change in plan.changes
    )
    raise UserError(message, hint=f"The smallest change that fits: {'; or '.join(changes)}.")


def _refuse_copies(plan: Plan) -> None:
    if plan.copies_fit or plan.host_limit_bytes is None:
        return
    ranks = plan.host_bytes // plan.host_copy_bytes
    gibibytes = -(-plan.host_bytes // 2**30)
    raise UserError(
        f"{plan.name}: a checkpoint's copies in host memory take {plan.host_bytes / 1e9:.1f} GB in"
        f" each pod ({ranks} ranks of {plan.host_copy_bytes / 1e9:.1f} GB), and cluster.memory is"
        f" {plan.host_limit_bytes / 1e9:.1f} GB",
        hint=f"Raise cluster.memory well above {gibibytes}Gi, or set"
        " train.async_checkpoints=false, with which training waits for the files of each checkpoint.",
    )


def refuse_evaluation(name: str, plan: EvaluationPlan) -> None:
    """Refuse an evaluation that does not fit.

    Raises:
        UserError: names what does not fit, by part; the hint, a change that would.
    """
    if plan.fits:
        return
    parts = ", ".join(
        f"{part} {size / 1e9:.1f}" for part, size in plan.memory.items() if size >= 5e7
    )
    where = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"
    if plan.largest_batch_size:
        hint = f"Set evaluate.batch_size={plan.largest_batch_size}, or more evaluate.gpus."
    else:
        hint = "Raise evaluate.gpus, over which the experts are divided, or use larger GPUs."
    raise UserError(
        f"{name}: evaluation on {where} needs {plan.needed_bytes / 1e9:.1f} GB on each, but each has "
        f"{plan.limit_bytes / 1e9:.1f} GB ({parts}; reserved {plan.reserved_bytes / 1e9:.1f})",
        hint=hint,
    )


def part_name(part: str) -> str:
    """Return how a part of the memory is written; plan.json keeps an older spelling."""
    return {"optimiser": "optimizer"}.get(part, part)  # prose: ok (a key of plan.json)


def as_tree(plan: Plan) -> dict[str, Any]:
    """Return the plan as plan.json holds it."""
    return {**dataclasses.asdict(plan), "needed_bytes": plan.needed_bytes, "fits": plan.fits}


def _as_option(setting: str) -> str:
    return f"--set {setting}" if "=" in setting else setting

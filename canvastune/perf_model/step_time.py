"""The time of a step, and of a forward pass of a validation, on an accelerator: the largest of its bounds."""

from __future__ import annotations

from dataclasses import dataclass

from canvastune.perf_model.architecture import EXPERT_KINDS, Architecture
from canvastune.perf_model.flops import (
    EXCHANGE,
    EXPERTS_GATHER,
    EXPERTS_REDUCE,
    IDLE,
    PASS_1,
    Flops,
    any_self_conditioning_share,
    count_forward_bytes,
    count_forward_flops,
    recomputed_share,
    slowest_self_conditioning,
)
from canvastune.perf_model.hardware import (
    BANDWIDTH_SHARE,
    LINK_SHARE,
    MATMUL_SHARE,
    Accelerator,
    peak_rate,
)
from canvastune.perf_model.launches import (
    WAIT_SECONDS,
    count_expert_launches,
    count_forward_launches,
    count_forward_waits,
    count_launches,
    count_waits,
)
from canvastune.perf_model.memory import StepShape, fsdp_units, local_numel

# Per trained weight and step: its norm, the clipping, and AdamW over four float32 tensors.
UPDATE_BYTES = 40
LAUNCHES = "kernel launches"  # names of bounds
WAITS = "host waits for each grouped matmul"


@dataclass(frozen=True)
class Seconds:
    """The time of an optimizer step, by part."""

    experts: float
    everything_else: float  # the rest of the computation
    gathering: float  # FSDP's collectives, overlapped with the computation
    exchange: float  # all-to-all of expert rows, not overlapped
    update: float
    launches: float  # the host's, of kernels; the device computes meanwhile
    expert_launches: float  # of them, of matmuls of single experts, each group after a wait
    waits: float  # of the host for the device, in which neither does anything else

    @property
    def computation(self) -> float:
        return self.experts + self.everything_else

    @property
    def bounds(self) -> dict[str, float]:
        """Return what a step cannot be faster than, by name.

        A GPU computes while its host launches what follows, unless the host waits: where a loop over
        experts begins with a wait, one of the loop and what is between two loops overlap with
        themselves only.
        """
        others = self.exchange + self.update
        found = {
            "computation": self.computation + others + self.waits,
            "all-gather and reduce-scatter": self.gathering + others + self.waits,
            LAUNCHES: self.launches + self.waits,
        }
        if self.expert_launches:
            between = max(self.everything_else + others, self.launches - self.expert_launches)
            loops = max(self.experts, self.expert_launches)
            found[WAITS] = between + loops + self.waits
        return found

    @property
    def bound(self) -> str:
        """Name the largest bound; of equal ones the first."""
        found = self.bounds
        most = max(found.values())
        return next(name for name, size in found.items() if size >= (1 - 1e-9) * most)

    @property
    def total(self) -> float:
        return max(self.bounds.values())


def step_time(
    architecture: Architecture,
    step: StepShape,
    flops: Flops,
    received: dict[str, float],
    accelerator: Accelerator,
) -> Seconds:
    """Estimate the time of a step: each part takes the longer of its arithmetic and reading its
    weights.

    The rank with the most self-conditioned examples determines the time of the self-conditioning
    pass, since the others wait in its collectives.
    """
    rate = peak_rate(architecture, accelerator) * MATMUL_SHARE
    bandwidth = accelerator.bandwidth * 1e9 * BANDWIDTH_SHARE
    computed = flops.total
    if step.self_conditioning:  # padding passes run while the slowest rank runs its own pass
        computed += (
            flops.by_pass[PASS_1] * (slowest_self_conditioning(step) / step.self_conditioning - 1)
            - flops.by_pass[IDLE]
        )
    in_experts = computed * sum(flops.by_part.get(kind, 0.0) for kind in EXPERT_KINDS) / flops.total
    # Each pass reads the weights once; the backward pass does for the gradients of inputs and of
    # weights.
    passes = step.micro_steps * sum(
        3 + recomputed_share(architecture, part) + any_self_conditioning_share(part)
        for part in step.forwards
    )
    compute_bytes = architecture.compute_bytes
    expert_bytes = (
        sum(weight.numel for weight in architecture.weights if weight.expert)
        // step.ep
        * compute_bytes
    )
    groups = fsdp_units(architecture, step)
    all_bytes = sum(group.gathered for group in (groups.root, *groups.layers)) + (
        expert_bytes if step.ep > 1 else 0
    )
    trained = sum(local_numel(weight, step) for weight in architecture.weights if weight.trained)
    everywhere = _rate(accelerator, 1, step.world_size)
    across_nodes = _rate(accelerator, step.ep, step.efsdp)
    gathered = [(name, size) for name, size in received.items() if name != EXCHANGE]
    loops = accelerator.loops(architecture)
    return Seconds(
        experts=max(in_experts / rate, passes * expert_bytes / bandwidth),
        everything_else=max(
            (computed - in_experts) / rate, passes * (all_bytes - expert_bytes) / bandwidth
        ),
        gathering=sum(
            size / (across_nodes if name in (EXPERTS_GATHER, EXPERTS_REDUCE) else everywhere)
            for name, size in gathered
        ),
        exchange=received[EXCHANGE] / _exchange_rate(accelerator, step),
        update=trained * UPDATE_BYTES / bandwidth,
        launches=accelerator.launch * count_launches(architecture, step, loops_over_experts=loops),
        expert_launches=accelerator.launch * count_expert_launches(architecture, step)
        if loops
        else 0.0,
        waits=WAIT_SECONDS * count_waits(architecture, step, loops_over_experts=loops)
        if accelerator.launch
        else 0.0,
    )


def forward_time(architecture: Architecture, step: StepShape, accelerator: Accelerator) -> float:
    """Estimate the seconds of a forward pass of a validation, of `step.blocks` canvases of each
    example: the largest of its bounds, which are those of a step.
    """
    flops = count_forward_flops(architecture, step)
    gathered, exchanged = count_forward_bytes(architecture, step)
    groups = fsdp_units(architecture, step)
    read = sum(unit.gathered for unit in (groups.root, *groups.layers))
    if step.ep > 1:
        experts = sum(weight.numel for weight in architecture.weights if weight.expert)
        read += experts // step.ep * architecture.compute_bytes
    others = exchanged / _exchange_rate(accelerator, step)
    loops = accelerator.loops(architecture)
    launches = accelerator.launch * count_forward_launches(
        architecture, step, loops_over_experts=loops
    )
    waits = count_forward_waits(architecture, step, loops_over_experts=loops)
    bounds = (
        others + flops / (peak_rate(architecture, accelerator) * MATMUL_SHARE),
        others + read / (accelerator.bandwidth * 1e9 * BANDWIDTH_SHARE),
        others + gathered / _rate(accelerator, 1, step.world_size),
        launches,
    )
    return max(bounds) + (waits * WAIT_SECONDS if accelerator.launch else 0.0)


def _exchange_rate(accelerator: Accelerator, step: StepShape) -> float:
    """Return the bytes/s of an all-to-all of expert rows."""
    if step.ep <= accelerator.per_node:
        return _rate(accelerator, 1, step.ep)
    return accelerator.network * LINK_SHARE * 1e9


def _rate(accelerator: Accelerator, stride: int, ranks: int) -> float:
    """Return the bytes/s that each rank receives in a ring whose members are `stride` ranks apart.

    Across nodes a ring uses the adapters of all its members on a node: a ring of all ranks uses
    every adapter, a ring of experts' shards, with one member per node, only that member's.
    """
    rate = accelerator.link
    if stride * ranks > accelerator.per_node:
        rate = min(rate, accelerator.network * max(1, accelerator.per_node // stride))
    return rate * 1e9 * LINK_SHARE

"""The table of accelerators, from the vendors' public datasheets, and the time of a step on one.

Dense bfloat16 and float32 TFLOP/s (no sparsity, no TF32), memory in GB, memory bandwidth and links
in GB/s. `link` is what one GPU sends to others of its node, one way (half of the datasheets'
bidirectional figure); `network` is its share of the node's adapters.

- h100, h200: NVIDIA H100 and H200 Tensor Core GPU datasheets, SXM: 989 TFLOP/s (1,979 with
  sparsity), 67 in float32, NVLink 900 GB/s both ways; 80 GB at 3.35 TB/s, 141 GB at 4.8 TB/s. One
  400 Gb/s adapter per GPU (DGX H100 datasheet).
- a100: NVIDIA A100 80GB SXM datasheet: 312 TFLOP/s, 19.5 in float32, 2,039 GB/s, NVLink 600 GB/s;
  200 Gb/s adapters (DGX A100).
- b200: NVIDIA HGX B200 and DGX B200 datasheets, per GPU: 2.25 PFLOP/s (4.5 with sparsity), 75
  TFLOP/s in float32, 180 GB at 8 TB/s, NVLink 1.8 TB/s.
- l40s: NVIDIA L40S datasheet: 362 TFLOP/s (733 with sparsity), 91.6 in float32, 48 GB at 864 GB/s,
  PCIe 4.0 x16 at 64 GB/s.
- cpu: one core per rank of a server with AVX-512, measured: a 1,024-wide matmul, a large copy, gloo
  over loopback. Call overhead dominates the time of small models; it is not counted.

`host_link` is what a GPU writes to pinned host memory, in GB/s, over 16 lanes of PCIe:
- Gen 4 (a100, l40s): 25, as nvbandwidth measures on an A100 (NVIDIA/nvbandwidth#53, #42); Azure
  accepts its A100 nodes from 24 on (azurehpc-health-checks, nd96amsr_a100_v4.conf). Two GPUs behind
  one switch of PCIe, as in an HGX A100, copy at half of it when both do.
- Gen 5 (h100, h200, b200): 45, measured on eight H800 that copy at once; one copies at 55 (53 on an H100,
  NVIDIA/nvbandwidth#24). Azure accepts its H100 and H200 nodes from 48 on.
- cpu: half of `bandwidth`: a copy reads and writes.
Into pageable memory, PyTorch copies at a ninth of it (1.4 instead of 12.6, pytorch#138018).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from canvastune.errors import UserError
from canvastune.perf_model.architecture import EXPERT_KINDS, FLOAT, Architecture
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
from canvastune.perf_model.launches import (
    LAUNCH_SECONDS,
    WAIT_SECONDS,
    count_expert_launches,
    count_forward_launches,
    count_forward_waits,
    count_launches,
    count_waits,
)
from canvastune.perf_model.memory import StepShape, fsdp_units, local_numel

# Of the peak, over a whole step: what well-tuned mixture-of-experts training reaches.
MATMUL_SHARE = 0.45
BANDWIDTH_SHARE = 0.8  # of memory bandwidth
LINK_SHARE = 0.7  # of a link
# Per trained weight and step: its norm, the clipping, and AdamW over four float32 tensors.
UPDATE_BYTES = 40
LAUNCHES = "kernel launches"  # names of bounds
WAITS = "host waits for each grouped matmul"
FRAGMENTATION = 0.04  # of the peak: what the allocator cannot reuse


@dataclass(frozen=True)
class Accelerator:
    """A row of the table."""

    title: str
    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s
    memory: float | None  # GB; None: what the recipe says
    bandwidth: float  # GB/s
    link: float  # GB/s
    network: float  # GB/s
    host_link: float  # GB/s
    per_node: int
    outside: float  # GB outside the allocator: driver context, buffers of collectives
    launch: float = LAUNCH_SECONDS  # the host's seconds for one kernel
    # GB of interpreter and libraries, if memory is measured as that of the process.
    process: float = 0.0
    loops_over_experts: bool = False  # no kernel of torch's multiplies all experts at once

    def loops(self, architecture: Architecture) -> bool:
        """Return whether a grouped matmul is a loop over experts: in float32 it is on every GPU."""
        return self.launch > 0 and (self.loops_over_experts or architecture.compute_bytes == FLOAT)


ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 SXM", 989, 67, 80, 3350, 450, 50, 45, 8, 1.5),
    "h200": Accelerator("NVIDIA H200 SXM", 989, 67, 141, 4800, 450, 50, 45, 8, 1.5),
    "a100": Accelerator(
        "NVIDIA A100 80GB SXM",
        312,
        19.5,
        80,
        2039,
        300,
        25,
        25,
        8,
        1.5,
        loops_over_experts=True,
    ),
    "b200": Accelerator("NVIDIA B200", 2250, 75, 180, 8000, 900, 50, 45, 8, 1.5),
    "l40s": Accelerator(
        "NVIDIA L40S", 362, 91.6, 48, 864, 32, 12.5, 25, 8, 1.0, loops_over_experts=True
    ),
    "cpu": Accelerator(
        "CPU, one core per rank",
        0.2,
        0.094,
        None,
        20,
        1,
        1,
        10,
        1024,
        outside=0.0,
        launch=0.0,
        process=0.55,
    ),
}


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


def find_accelerator(name: str) -> Accelerator:
    """Look up an accelerator by its key.

    Raises:
        UserError: unknown key.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
        raise UserError(
            f"hardware.accelerator: found {name!r}, expected one of {', '.join(ACCELERATORS)}",
            hint=f"Did you mean {close[0]!r}?" if close else "Choose one of these.",
        )
    return found


def accelerator_of(device: str) -> Accelerator | None:
    """Look up a CUDA device by the name that its driver reports.

    Returns None for a part of a GPU (MIG), a slower variant (PCIe, NVL) or any other device.
    """
    if re.search(r"\b(MIG|PCIe|NVL)\b", device, re.IGNORECASE):
        return None
    return next(
        (
            row
            for name, row in ACCELERATORS.items()
            if re.search(rf"\b{name}\b", device, re.IGNORECASE)
        ),
        None,
    )


def peak_rate(architecture: Architecture, accelerator: Accelerator) -> float:
    """Return the FLOP/s of a matmul in the compute dtype."""
    return (accelerator.bfloat16 if architecture.compute_bytes == 2 else accelerator.float32) * 1e12


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

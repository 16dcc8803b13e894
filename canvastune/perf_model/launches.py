"""Kernels that a step launches on a GPU, which bound the time of small batches, and how often the
host waits for the GPU.

The host runs eagerly: a launch costs it `LAUNCH_SECONDS`, however little the kernel computes. Counts
per layer are those of `tools/gpu_dry_run.py`, with `train.triton_kernels`; `tests/unit/test_gpu_dry_run.py`
compares.

The host waits once in each layer and pass, under expert parallelism, for the number of rows that it
will receive (`model.moe.dispatch`), and once in a step, for its losses (`Trainer.train_step`). Where
torch 2.13 has no kernel for a grouped matmul, `_grouped_mm_fallback` (ATen/native/GroupedMMUtils.h)
waits for the ends of the groups and launches a matmul for each: on GPUs that are neither sm_90 nor
sm_100, and everywhere in float32 (`_grouped_mm_cuda`, ATen/native/cuda/GroupedBlas.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from canvastune.model.attention_calls import sliding_calls
from canvastune.perf_model.architecture import Architecture
from canvastune.perf_model.flops import any_self_conditioning_share, recomputed_share
from canvastune.perf_model.memory import StepShape

# Between a driver's 5 us and the 13.6 us that NVIDIA measured on this model in eager PyTorch: NeMo
# AutoModel 0.7.0, grad_norm.py, 5,434 launches in 74 ms.
LAUNCH_SECONDS = 10e-6
# The GPU is idle while the host learns that it is done, 12 us (11,616 reads of a byte in 0.137 s on an
# A100, intel/torch-xpu-ops#2157), and launches the next kernel.
WAIT_SECONDS = 12e-6 + LAUNCH_SECONDS
MOST_LAUNCHES = 7_000  # goal for a step of the gsm8k recipes


@dataclass(frozen=True)
class Counts:
    """Launches of one layer with one example in a forward, and of a step outside of its layers; and
    grouped matmuls of its experts.
    """

    forward: int
    backward: int
    outside: int
    grouped_forward: int
    grouped_backward: int


FULL = Counts(38, 122, 328, 2, 4)
LORA = Counts(51, 90, 213, 2, 2)
LORA_WITH_EXPERTS = Counts(63, 141, 198, 6, 10)
# Of each further example or block in a forward: attention runs on each by itself.
_FURTHER_FORWARD, _FURTHER_BACKWARD, _FURTHER_OUTSIDE = 7, 12, 12
# Of each further call of a sliding layer, which takes half a window of a long example at a time.
_SLIDING_FORWARD, _SLIDING_BACKWARD = 4, 8
_VALIDATION_OUTSIDE = 120  # launches of a validation's forward outside of its layers
_GROUPED = 2  # launches of a grouped matmul that is one kernel


def count_launches(
    architecture: Architecture, step: StepShape, *, loops_over_experts: bool = False
) -> int:
    """Return how many kernels a rank launches in a step.

    Args:
        loops_over_experts: a grouped matmul is a matmul for each expert.
    """
    counts = _counts(architecture)
    layers = len(architecture.layers)
    more = architecture.experts // step.ep - _GROUPED if loops_over_experts else 0
    total = 0.0
    for part in step.forwards:
        further = part.micro_batch * part.blocks - 1
        passes = _passes(architecture, part)
        forward = counts.forward + more * counts.grouped_forward + further * _FURTHER_FORWARD
        backward = counts.backward + more * counts.grouped_backward + further * _FURTHER_BACKWARD
        total += layers * (passes * forward + backward)
        if part.clean > architecture.window:
            calls = len(list(sliding_calls(part.clean, architecture.window))) - 1
            calls *= part.micro_batch * sum(layer.sliding for layer in architecture.layers)
            total += calls * (passes * _SLIDING_FORWARD + _SLIDING_BACKWARD)
        total += counts.outside + further * _FURTHER_OUTSIDE
    return round(step.micro_steps * total)


def count_expert_launches(architecture: Architecture, step: StepShape) -> int:
    """Return how many of a step's kernels are matmuls of single experts, where it loops over them."""
    return round(count_grouped_products(architecture, step) * architecture.experts / step.ep)


def count_waits(
    architecture: Architecture, step: StepShape, *, loops_over_experts: bool = False
) -> int:
    """Return how often a rank's host waits for its GPU in a step.

    Args:
        loops_over_experts: each grouped matmul waits once.
    """
    total = 1.0
    if step.ep > 1:
        passes = sum(_passes(architecture, part) for part in step.forwards)
        total += step.micro_steps * len(architecture.layers) * passes
    if loops_over_experts:
        total += count_grouped_products(architecture, step)
    return round(total)


def count_grouped_products(architecture: Architecture, step: StepShape) -> float:
    """Return how many grouped matmuls a step has."""
    counts = _counts(architecture)
    each = sum(
        _passes(architecture, part) * counts.grouped_forward + counts.grouped_backward
        for part in step.forwards
    )
    return step.micro_steps * len(architecture.layers) * each


def count_forward_launches(
    architecture: Architecture, step: StepShape, *, loops_over_experts: bool = False
) -> int:
    """Return how many kernels a rank launches in one forward pass of a validation."""
    counts, layers = _counts(architecture), len(architecture.layers)
    further = step.micro_batch * step.blocks - 1
    total = layers * (counts.forward + further * _FURTHER_FORWARD) + _VALIDATION_OUTSIDE
    if loops_over_experts:
        more = architecture.experts // step.ep - _GROUPED
        total += layers * more * counts.grouped_forward
    if step.clean > architecture.window:
        calls = len(list(sliding_calls(step.clean, architecture.window))) - 1
        calls *= step.micro_batch * sum(layer.sliding for layer in architecture.layers)
        total += calls * _SLIDING_FORWARD
    return total


def count_forward_waits(
    architecture: Architecture, step: StepShape, *, loops_over_experts: bool = False
) -> int:
    """Return how often a rank's host waits in one forward pass of a validation: once more than in its
    layers, to agree on whether to stop.
    """
    a_layer = int(step.ep > 1)
    if loops_over_experts:
        a_layer += _counts(architecture).grouped_forward
    return len(architecture.layers) * a_layer + 1


def _counts(architecture: Architecture) -> Counts:
    if architecture.full:
        return FULL
    return LORA_WITH_EXPERTS if architecture.expert_rank else LORA


def _passes(architecture: Architecture, step: StepShape) -> float:
    """Return how often a forward's layers run, without their backward pass."""
    return 1 + recomputed_share(architecture, step) + any_self_conditioning_share(step)

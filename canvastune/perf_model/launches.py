"""Kernels that a step launches on a GPU, which bound the time of small batches.

The host runs eagerly: a launch costs it `LAUNCH_SECONDS`, however little the kernel computes. Counts
per layer are those of `tools/gpu_dry_run.py`, with `train.triton_kernels`; `tests/unit/test_gpu_dry_run.py`
compares.
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
_GROUPED = 2  # launches of a grouped matmul that is one kernel


def count_launches(
    architecture: Architecture, step: StepShape, *, loops_over_experts: bool = False
) -> int:
    """Return how many kernels a rank launches in a step.

    Args:
        loops_over_experts: a grouped matmul is a matmul for each expert. That each also waits for
            the device once is not counted.
    """
    counts = FULL
    if not architecture.full:
        counts = LORA_WITH_EXPERTS if architecture.expert_rank else LORA
    layers = len(architecture.layers)
    more = architecture.experts // step.ep - _GROUPED if loops_over_experts else 0
    total = 0.0
    for part in step.forwards:
        further = part.micro_batch * part.blocks - 1
        passes = 1 + recomputed_share(architecture, part) + any_self_conditioning_share(part)
        forward = counts.forward + more * counts.grouped_forward + further * _FURTHER_FORWARD
        backward = counts.backward + more * counts.grouped_backward + further * _FURTHER_BACKWARD
        total += layers * (passes * forward + backward)
        if part.clean > architecture.window:
            calls = len(list(sliding_calls(part.clean, architecture.window))) - 1
            calls *= part.micro_batch * sum(layer.sliding for layer in architecture.layers)
            total += calls * (passes * _SLIDING_FORWARD + _SLIDING_BACKWARD)
        total += counts.outside + further * _FURTHER_OUTSIDE
    return round(step.micro_steps * total)

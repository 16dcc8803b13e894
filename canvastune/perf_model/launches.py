"""Kernels that a step launches on a GPU, which bound the time of small batches.

The host runs eagerly: a launch costs it `LAUNCH_SECONDS`, however little the kernel computes. Counts
per layer are those of `tools/gpu_dry_run.py`; `tests/unit/test_gpu_dry_run.py` compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from canvastune.perf_model.architecture import Architecture
from canvastune.perf_model.flops import any_self_conditioning_share, recomputed_share
from canvastune.perf_model.memory import StepShape

# Between a driver's 5 us and the 13.6 us that NVIDIA measured on this model in eager PyTorch: NeMo
# AutoModel 0.7.0, grad_norm.py, 5,434 launches in 74 ms.
LAUNCH_SECONDS = 10e-6


@dataclass(frozen=True)
class Counts:
    """Launches of one layer with one example in a forward, and of a step outside of its layers."""

    forward: int
    backward: int
    outside: int


FULL = Counts(109, 208, 346)
LORA = Counts(136, 196, 198)
LORA_WITH_EXPERTS = Counts(148, 256, 180)
# Of each further example or block in a forward: attention runs on each by itself.
_FURTHER = Counts(7, 12, 12)


def count_launches(architecture: Architecture, step: StepShape) -> int:
    """Return how many kernels a rank launches in a step."""
    counts = FULL
    if not architecture.full:
        counts = LORA_WITH_EXPERTS if architecture.expert_rank else LORA
    layers = len(architecture.layers)
    total = 0.0
    for part in step.forwards:
        further = part.micro_batch * part.blocks - 1
        passes = 1 + recomputed_share(architecture, part) + any_self_conditioning_share(part)
        of_layer = passes * (counts.forward + further * _FURTHER.forward)
        of_layer += counts.backward + further * _FURTHER.backward
        total += layers * of_layer + counts.outside + further * _FURTHER.outside
    return round(step.micro_steps * total)

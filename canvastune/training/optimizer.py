"""AdamW parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from canvastune.config.schema import OptimizerConfig


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over sharded parameters.

    One group per mesh, as a fused update takes tensors of one mesh, and per weight decay.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        decays = config.decay_vectors or parameter.ndim > 1
        groups.setdefault((getattr(parameter, "device_mesh", None), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": config.weight_decay if decays else 0.0}
            for (_, decays), group in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of step 1, 2, ....

    Linear warm-up from lr / warmup_steps, then the schedule, to min_lr at the last step.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    passed = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    left = 1 - passed if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed))
    return config.min_lr + (config.lr - config.min_lr) * left

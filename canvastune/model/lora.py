"""Adapters on the shared stack, one per shared weight, used for the encoder's and the decoder's
rows alike.

Linear layers carry PEFT's LoRA layers. Experts carry separate factors, which `model.moe` multiplies
with: PEFT would add the update to every expert's weight in each forward pass.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextExperts

from canvastune.config.schema import LoraConfig
from canvastune.model.parameter_names import (
    ADAPTER,
    EXPERT_WEIGHTS,
    TARGETS,
    check_expert_rank,
)
from canvastune.noise import dropout_mask, dropout_module_key, weight_generator

_ROW_KEYS: ContextVar[torch.Tensor | None] = ContextVar("row_keys", default=None)


class ExpertFactors(nn.Module):
    """One factor of each of a layer's expert weights: A [E, r, in] or B [E, out, r], on the device
    of the weights.
    """

    def __init__(self, experts: Any, factor: str, rank: int) -> None:
        super().__init__()
        for name in EXPERT_WEIGHTS:
            weight = getattr(experts, name)
            count, out_features, in_features = weight.shape
            shape = (count, rank, in_features) if factor == "A" else (count, out_features, rank)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device)))


class CounterBasedDropout(nn.Module):
    """Dropout whose mask depends only on the run's seed, the row's example and position, and the
    module's name.

    It is active inside `keyed_dropout`, and the identity elsewhere.
    """

    def __init__(self, probability: float, name: str) -> None:
        super().__init__()
        self.probability, self.key = probability, dropout_module_key(name)

    def is_active(self) -> bool:
        """Return whether entries are dropped here and now."""
        return self.training and _ROW_KEYS.get() is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero entries of x [..., rows, features] with `probability`, and divide the others by 1 -
        probability.
        """
        rows = _ROW_KEYS.get()
        if rows is None or not self.training:
            return x
        return x.masked_fill(dropout_mask(rows, x.shape[-1], self.key, self.probability), 0) * (
            1 / (1 - self.probability)
        )


@contextlib.contextmanager
def keyed_dropout(row_keys: torch.Tensor | None) -> Iterator[None]:
    """Make adapters inside the block apply dropout by these keys, int64[rows]; None: no dropout."""
    token = _ROW_KEYS.set(row_keys)
    try:
        yield
    finally:
        _ROW_KEYS.reset(token)


def add_adapters(model: nn.Module, config: LoraConfig, compute: torch.dtype) -> None:
    """Add an adapter to every targeted linear layer, and to the experts if the recipe says so, in
    place.

    Args:
        model: on the meta device.
        compute: dtype in which the factors are multiplied.

    Raises:
        UserError: a LoRA rank that the grouped matmul does not support.
    """
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=TARGETS,
        bias="none",
        use_rslora=config.rslora,
    )
    inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for name, module in list(model.named_modules()):
        if config.dropout and isinstance(module, LoraLayer):
            module.lora_dropout[ADAPTER] = CounterBasedDropout(config.dropout, name)
        if config.experts and isinstance(module, DiffusionGemmaTextExperts):
            _adapt_experts(module, config, compute)


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the whole initial factor in float32.

    A is uniform in +-1/sqrt(in) (LoRA's Kaiming initialization with a = sqrt 5), B is zero.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=weight_generator(seed, name))


def lora_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield each adapted weight's name in the checkpoint with its factors A [(E,) r, in] and B
    [(E,) out, r].
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        module, found, weight = name.partition(f".lora_A.{ADAPTER}.")
        if found:
            yield f"{module}.{weight}", parameter, parameters[name.replace(".lora_A.", ".lora_B.")]


def _adapt_experts(experts: Any, config: LoraConfig, compute: torch.dtype) -> None:
    check_expert_rank(config.rank, str(compute).removeprefix("torch."), compute.itemsize)
    # The names that PEFT gives its layers' factors.
    experts.lora_A = nn.ModuleDict({ADAPTER: ExpertFactors(experts, "A", config.rank)})
    experts.lora_B = nn.ModuleDict({ADAPTER: ExpertFactors(experts, "B", config.rank)})
    experts.lora_scale = config.scale

"""Adapters on the shared stack: PEFT's LoRA layers, one per shared weight, seen by the encoder's and the decoder's rows alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import nn

from canvastune.config import LoraConfig
from canvastune.noise import weight_generator

ADAPTER = "default"  # PEFT's name of the only adapter
# Full names: bare ones would also hit the vision tower and the self-conditioning block.
TARGETS = r"model\.decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put an adapter on every targeted linear layer, in place, on the meta device."""
    peft_config = PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS, bias="none")
    inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter factor's."""
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name


def base_name(name: str) -> str:
    """A parameter's name in the checkpoint, where PEFT's wrappers do not exist."""
    return name.replace(".base_layer.", ".")


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The whole initial factor, float32: A uniform in +-1/sqrt(in) (LoRA's Kaiming initialisation with a = sqrt 5), B zero."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=weight_generator(seed, name))


def factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Each adapted module's name with its factors A [r, in] and B [out, r]."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        module, found, _ = name.partition(f".lora_A.{ADAPTER}.")
        if found:
            yield module, parameter, parameters[name.replace(".lora_A.", ".lora_B.")]

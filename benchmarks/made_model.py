"""The released model's layers at their real size, as many of them as fit, with random weights that
are made in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import DiffusionGemmaConfig

from benchmarks.synthetic_checkpoint import checkpoint_specs, described, synthetic_value
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.planner.planner import SHIPPED_CONFIG

Found = TypeVar("Found")

_BLOCK = (
    2**20
)  # random values that are repeated to fill a tensor: billions of fresh ones would take minutes
_SMALL = {"hidden": 128, "experts": 16, "vocabulary": 4096, "canvas": 32}
SMALL_LAYERS = 6


class SyntheticCheckpoint(CheckpointReader):
    """A checkpoint that is nowhere: each tensor is made when it is read."""

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        self.folder = Path("synthetic")
        self._specs = checkpoint_specs(config)

    def names(self) -> list[str]:
        return list(self._specs)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name][1]

    def get(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        count = math.prod(shape)
        if count <= _BLOCK:
            return synthetic_value(name, shape, seed=0)
        return (
            synthetic_value(name, (_BLOCK,), seed=0).repeat(-(-count // _BLOCK))[:count].view(shape)
        )

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.get(name)[slices]


def largest_model(
    folder: Path, small: bool, fits: Callable[[Path], Found | None]
) -> tuple[DiffusionGemmaConfig, Found]:
    """Find the model with the most layers that fits; write its config.json to `folder` and return
    what `fits` found.

    Args:
        small: layers of a small model instead, for a CPU.
        fits: is given the folder; None: that is too large.
    """
    released = json.loads(SHIPPED_CONFIG.read_text(encoding="utf-8"))
    text = released["text_config"]
    folder.mkdir(parents=True, exist_ok=True)
    for layers in range(SMALL_LAYERS if small else text["num_hidden_layers"], 0, -1):
        last = {"num_hidden_layers": layers, "layer_types": text["layer_types"][-layers:]}
        config = (
            described(layers, **_SMALL)
            if small
            else DiffusionGemmaConfig.from_dict(released | {"text_config": text | last})
        )
        config.save_pretrained(folder)
        found = fits(folder)
        if found is not None:
            return config, found
    raise SystemExit("benchmarks.gpu: not even one layer fits this device")

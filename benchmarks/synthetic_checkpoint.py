"""`python -m benchmarks.synthetic_checkpoint DIR [--gb 5]`: a DiffusionGemma of any size with the
26B model's proportions.

Seeded random bfloat16 values in the Hub's layout, with index, vision tower and encoder scalars;
written tensor by tensor.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from canvastune.checkpoint.hf_format import CheckpointWriter, Specs
from canvastune.checkpoint.load import DECODER_SCALAR, ENCODER_SCALAR
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.parameter_names import VISION
from canvastune.noise import weight_generator

SHARD_BYTES = 10**9
_STD = 0.02
_SHOWN_SECONDS = 5.0
_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SMALLEST_VISION = {  # for models whose vision tower only has to be there
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def described(
    layers: int, hidden: int = 1024, experts: int = 128, vocabulary: int = 65536, canvas: int = 64
) -> DiffusionGemmaConfig:
    """Return a config with the released proportions: dense MLP 3/4, experts 1/4 of hidden, five
    sliding layers to a full one.
    """
    head = hidden // 8
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 4,
        "num_hidden_layers": layers,
        "layer_types": [
            "full_attention" if index % 6 == 5 or index == layers - 1 else "sliding_attention"
            for index in range(layers)
        ],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": head,
        "global_head_dim": 2 * head,
        "num_global_key_value_heads": 1,
        "sliding_window": 4 * canvas,
        "num_experts": experts,
        "top_k_experts": 8,
        "moe_intermediate_size": hidden // 4,
    }
    return DiffusionGemmaConfig(
        text_config=text, vision_config=_VISION, canvas_length=canvas, dtype="bfloat16"
    )


def described_by_size(gigabytes: float) -> DiffusionGemmaConfig:
    """Return the config whose checkpoint just exceeds a size (1e9 bytes)."""
    one, two = (_bytes(checkpoint_specs(described(layers))) for layers in (1, 2))
    return described(1 + max(0, math.ceil((gigabytes * 1e9 - one) / (two - one))))


def checkpoint_specs(config: DiffusionGemmaConfig) -> Specs:
    """Return the names and shapes of the Hub's checkpoint, all in bfloat16."""
    with torch.device("meta"):
        stock = DiffusionGemmaForBlockDiffusion(config).state_dict()
        shared = WeightTiedDiffusionGemma(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in shared.named_parameters()}
    for index in range(config.text_config.num_hidden_layers):
        shapes |= {form.format(index): (1,) for form in (DECODER_SCALAR, ENCODER_SCALAR)}
    shapes |= {name: tuple(value.shape) for name, value in stock.items() if name.startswith(VISION)}
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def write_synthetic(
    folder: Path, config: DiffusionGemmaConfig, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a checkpoint of random values; memory is one tensor. Returns its bytes."""
    specs = checkpoint_specs(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    total, written, shown = _bytes(specs), 0, time.monotonic()
    with CheckpointWriter(folder, specs, shard_bytes) as writer:
        for name, (shape, _) in specs.items():
            value = synthetic_value(name, shape, seed)
            writer.write(name, value)
            written += value.nbytes
            if time.monotonic() - shown > _SHOWN_SECONDS:
                shown = time.monotonic()
                print(
                    f"synthetic checkpoint: {written / 1e9:.1f} of {total / 1e9:.1f} GB",
                    file=sys.stderr,
                    flush=True,
                )
    return total


def synthetic_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of the checkpoint: random weights, norms and scales of one."""
    if name.endswith(
        "q_norm.weight"
    ):  # attention has scale 1: with unit q_norm its softmax would be one-hot
        return torch.full(shape, shape[0] ** -0.5, dtype=torch.bfloat16)
    if "norm" in name or "scale" in name or name.endswith("layer_scalar"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(
        0, _STD, generator=weight_generator(seed, name)
    )


def _bytes(specs: Specs) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs.values())


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.synthetic_checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=5.0)
    options = parser.parse_args()
    total = write_synthetic(options.folder, described_by_size(options.gb))
    print(f"{options.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""A small DiffusionGemma for numerics, well conditioned in float32, and ragged examples that
exercise every boundary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from benchmarks.instruments import ranks
from benchmarks.synthetic_checkpoint import SMALLEST_VISION
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.config import RunConfig, parse_config
from canvastune.config.schema import Checkpointing
from canvastune.data.packing import Example, pack
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.noise import NoiseSample, training_block_draws
from canvastune.objective import losses

ranks.preload(__name__)  # most tests that run on several ranks use it

CANVAS, WINDOW, VOCABULARY, EOS = 8, 16, 256, 1
MIDDLING_CANVAS = 32


def model_config(sliding: int = 3) -> DiffusionGemmaConfig:
    """Some sliding layers and a full one, eight experts of which two, a window of two canvases."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": sliding + 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * sliding + ["full_attention"],
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    return DiffusionGemmaConfig(
        text_config=text, vision_config=SMALLEST_VISION, canvas_length=CANVAS
    )


def write_checkpoint(folder: Path, sliding: int = 3) -> None:
    """Random weights, large enough that every part matters to the loss; layer scalars other than
    one.
    """
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(model_config(sliding))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "scale" not in name:
                parameter.mul_(3)
        for index, (layer, twin) in enumerate(
            zip(model.model.decoder.layers, model.model.encoder.language_model.layers, strict=True)
        ):
            layer.self_attn.q_norm.weight.mul_(
                layer.self_attn.head_dim**-0.5
            )  # attention has scale 1: unit q_norm is ill-conditioned
            layer.router.per_expert_scale.copy_(torch.linspace(0.5, 1.5, 8))
            layer.layer_scalar.fill_(0.8 + 0.1 * index)
            twin.layer_scalar.copy_(layer.layer_scalar)
    model.save_pretrained(folder, max_shard_size="200KB")


def stock_model(folder: Path) -> DiffusionGemmaForBlockDiffusion:
    """The checkpoint as stock transformers loads it."""
    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder)


def run_config(
    method: str = "full", ep: int = 1, lora: dict[str, object] | None = None, **train: object
) -> RunConfig:
    """A recipe in float32, with adapters of rank 8."""
    tree = {
        "name": "test",
        "data": {"source": "none"},
        "train": {"method": method, "precision": "float32", **train},
        "parallel": {"ep": ep},
        "lora": {"rank": 8, **(lora or {})},
    }
    return parse_config(tree)


def shared_model(folder: Path, config: RunConfig) -> WeightTiedDiffusionGemma:
    """The engine's model in one process, unsharded."""
    model = build_model(config, read_model_config(folder))
    load_weights(model, CheckpointReader(folder), torch.device("cpu"), config.seed)
    return model


def examples_and_draws() -> tuple[list[Example], list[NoiseSample]]:
    """Eight ragged examples: one to five blocks, several windows long, one cut, one with the
    padding id, every coin seen twice.
    """
    generator = torch.Generator().manual_seed(3)
    examples, draws = [], []
    shapes = [(12, 20), (40, 33), (7, 8), (60, 5), (3, 40), (21, 16), (50, 24), (9, 1)]
    for position, (prefix, response) in enumerate(shapes):
        tokens = torch.randint(0, VOCABULARY, (prefix + response,), generator=generator)
        tokens[2] = 0  # the padding id: its lookup has no gradient
        if position != 1:  # that one lost its end to the cut: no fill
            tokens = torch.cat([tokens, tokens.new_full((-response % CANVAS,), EOS)])
        example = Example(tokens, prefix, CANVAS, str(position))
        draw = noise(position, example.blocks)
        examples.append(example)
        draws.append(
            dataclasses.replace(
                draw, block=(position * 3) % example.blocks, self_condition=position % 2 == 1
            )
        )
    return examples, draws


def examples_and_blocks(count: int) -> tuple[list[Example], list[tuple[NoiseSample, ...]]]:
    """The same examples, with `count` blocks of each denoised, or all that it has."""
    examples, _ = examples_and_draws()
    return examples, [
        training_block_draws(
            5,
            position,
            count,
            blocks=example.blocks,
            canvas_length=CANVAS,
            vocab_size=VOCABULARY,
            min_corruption=0.001,
            self_conditioning_probability=0.5,
        )
        for position, example in enumerate(examples)
    ]


def noise(position: int, blocks: int, seed: int = 5) -> NoiseSample:
    """The engine's draws with this model's sizes."""
    return training_block_draws(
        seed,
        position,
        1,
        blocks=blocks,
        canvas_length=CANVAS,
        vocab_size=VOCABULARY,
        min_corruption=0.001,
        self_conditioning_probability=0.5,
    )[0]


def counts(
    examples: list[Example], draws: Sequence[NoiseSample | Sequence[NoiseSample]]
) -> tuple[int, int]:
    """(scored canvas rows, scored pairs) of a global batch, counted from the definition."""
    canvas = sum(
        min(CANVAS, len(e.tokens) - e.prefix_length - d.block * CANVAS)
        for e, own in zip(examples, draws, strict=True)
        for d in ([own] if isinstance(own, NoiseSample) else own)
    )
    return canvas, sum(len(e.tokens) - 1 for e in examples)


def loss_and_gradients(
    model: WeightTiedDiffusionGemma,
    batches: list[tuple[list[Example], list[NoiseSample]]],
    checkpointing: Checkpointing = False,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a global batch that is cut into these micro-batches."""
    examples = [e for part, _ in batches for e in part]
    draws = [d for _, part in batches for d in part]
    canvas_rows, pairs = counts(examples, draws)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part, part_draws in batches:
        coin = any(draw.self_condition for draw in part_draws)
        loss, _, _ = model.run_under_fsdp(
            losses,
            pack(part, part_draws),
            (1 / canvas_rows, 1 / pairs),
            any_self_conditioned=coin,
            checkpointing=checkpointing,
        )
        loss.backward()
        total += float(loss.detach())
    return total, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def worst_difference(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest relative difference |found - expected| / |expected| over all names, and its name."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    scale = max(float(value.norm()) for value in expected.values())
    return max(
        (float((found[n] - e).norm()) / max(float(e.norm()), 1e-6 * scale), n)
        for n, e in expected.items()
    )


def write_middling(folder: Path) -> None:
    """Write the config.json of a model where weights, activations and logits all matter."""
    text = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "sliding_window": 64,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 32,
    }
    DiffusionGemmaConfig(
        text_config=text, vision_config=SMALLEST_VISION, canvas_length=MIDDLING_CANVAS
    ).save_pretrained(folder)

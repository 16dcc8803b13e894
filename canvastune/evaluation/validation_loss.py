"""The held-out loss as training's validation measures it, through the stock model.

Corruption levels and noise are fixed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_from_disk
from transformers import DiffusionGemmaConfig

from canvastune.config.schema import Blocks, TrainConfig, block_count
from canvastune.data.packing import Example, make_example, pack, pad_token
from canvastune.model.diffusion_gemma import CACHE
from canvastune.noise import validation_block_draws


def held_out_examples(
    dataset: Path, train: TrainConfig, model: DiffusionGemmaConfig
) -> list[Example]:
    """Return the examples that training validates on, in its order."""
    rows: Any = load_from_disk(str(dataset / "validation"))
    eos = pad_token(model.text_config.eos_token_id)
    chosen = rows.select(range(train.validated_rows(len(rows))))
    return [make_example(row, model.canvas_length, eos) for row in chosen]


@torch.no_grad()
def denoising_loss(
    model: Any, examples: Sequence[Example], levels: Sequence[float], setting: Blocks = 1
) -> dict[str, Any]:
    """Compute the cross-entropy of the chosen blocks under the conditions of inference.

    The tokens before a block are encoded, and the block is denoised once.

    Args:
        setting: `train.validation_blocks`.

    Returns:
        {"sums": by level, "tokens": scored at each, "seconds"}
    """
    device = model.lm_head.weight.device
    started = time.perf_counter()
    sums, count = torch.zeros(len(levels), dtype=torch.float64), 0
    for example in examples:
        at_levels = [
            validation_block_draws(
                example.id,
                level,
                block_count(setting, example.blocks),
                blocks=example.blocks,
                canvas_length=example.canvas_length,
                vocab_size=model.config.text_config.vocab_size,
            )
            for level in levels
        ]
        for draws in zip(*at_levels, strict=True):  # of one block, which is the same at every level
            packed = [pack([example], [draw]) for draw in draws]
            (start,) = packed[0].block_starts
            targets, positions = (
                packed[0].canvas_targets.to(device),
                packed[0].canvas_positions.to(device),
            )
            cache = model.model.encoder(input_ids=example.tokens[None, :start].to(device))[CACHE]
            cache.batch_repeat_interleave(len(levels))
            canvases = torch.stack([batch.canvas for batch in packed]).to(device)
            logits = model(
                **{CACHE: cache},
                decoder_input_ids=canvases,
                decoder_position_ids=positions[None],
            ).logits
            each = F.cross_entropy(
                logits.flatten(0, 1), targets.repeat(len(levels)), reduction="none"
            )
            sums += each.view(len(levels), -1).double().sum(1).cpu()
            count += len(targets)
    return {"sums": sums.tolist(), "tokens": count, "seconds": time.perf_counter() - started}


def mean_losses(
    parts: Sequence[dict[str, Any]], levels: Sequence[float]
) -> tuple[float, dict[str, float]]:
    """Return the mean over the levels and the loss by level, as training's validation does."""
    tokens = sum(part["tokens"] for part in parts)
    by_level = [sum(part["sums"][index] for part in parts) / tokens for index in range(len(levels))]
    losses = {str(level): loss for level, loss in zip(levels, by_level, strict=True)}
    return sum(by_level) / len(levels), losses

"""The plain step: stock modules called twice per example, whole logits, explicit masks. What the
engine must equal.

Written from objective.md alone and for one example at a time, so that nothing here is shared with
the engine but the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from canvastune.data.packing import Example
from canvastune.model.diffusion_gemma import CACHE
from canvastune.noise import NoiseSample

Stage = Callable[[tuple[NoiseSample, str] | None], None]


def plain_loss(
    model: DiffusionGemmaForBlockDiffusion,
    examples: list[Example],
    draws: Sequence[NoiseSample | Sequence[NoiseSample]],
    encoder_loss_weight: float = 1.0,
    stage: Stage = lambda _: None,
) -> tuple[torch.Tensor, float, float]:
    """(total with gradient, diffusion mean, autoregressive mean) of a global batch on a stock
    model. Each of several blocks of an example is denoised by itself.

    `stage` is called before each pass with whose rows it runs, and "clean" or "canvas"; None: all
    of pass 1.
    """
    diffusion, autoregressive = [], []
    for example, own in zip(examples, draws, strict=True):
        for draw in [own] if isinstance(own, NoiseSample) else own:
            logits, targets, encoder_logits = plain_forward(model, example, draw, stage)
            diffusion.append(F.cross_entropy(logits, targets, reduction="none"))
        autoregressive.append(
            F.cross_entropy(encoder_logits[:-1], example.tokens[1:], reduction="none")
        )
    diffusion_loss, autoregressive_loss = (
        torch.cat(diffusion).mean(),
        torch.cat(autoregressive).mean(),
    )
    return (
        diffusion_loss + encoder_loss_weight * autoregressive_loss,
        float(diffusion_loss.detach()),
        float(autoregressive_loss.detach()),
    )


def plain_forward(
    model: DiffusionGemmaForBlockDiffusion,
    example: Example,
    draw: NoiseSample,
    stage: Stage = lambda _: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(canvas logits [C, V], targets [C], encoder logits [S, V]) of one example, both passes in
    full.
    """
    window = model.config.text_config.sliding_window
    length, start = len(example.tokens), example.prefix_length + draw.block * example.canvas_length
    targets = example.tokens[start : start + example.canvas_length]
    canvas = torch.where(draw.corrupted[: len(targets)], draw.replacement[: len(targets)], targets)

    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = column <= row
    encoder_mask = {"full_attention": causal, "sliding_attention": causal & (column > row - window)}

    def encode() -> tuple[DynamicCache, torch.Tensor]:
        cache = (
            DynamicCache()
        )  # without a config: with one, sliding layers would forget the block's past
        masks = {k: m[None, None] for k, m in encoder_mask.items()}
        encoded = model.model.encoder(
            input_ids=example.tokens[None], attention_mask=masks, **{CACHE: cache}
        )
        return cache, encoded.last_hidden_state

    past = torch.arange(length)[None].expand(len(targets), -1)
    own = torch.ones(len(targets), len(targets), dtype=torch.bool)
    decoder_mask = {
        "full_attention": torch.cat([past < start, own], 1),
        "sliding_attention": torch.cat([(past < start) & (past > start - window), own], 1),
    }

    def denoise(cache: DynamicCache, logits: torch.Tensor | None) -> torch.Tensor:
        return model(
            decoder_input_ids=canvas[None],
            **{CACHE: cache},
            decoder_position_ids=torch.arange(start, start + len(targets))[None],
            decoder_attention_mask={k: m[None, None] for k, m in decoder_mask.items()},
            self_conditioning_logits=logits,
        ).logits

    first = None
    if draw.self_condition:
        stage(None)
        with torch.no_grad():
            first = denoise(encode()[0], None)
    stage((draw, "clean"))
    cache, encoded = encode()
    stage((draw, "canvas"))
    logits = denoise(cache, first)
    cap = model.final_logit_softcapping
    encoder_logits = torch.tanh(model.lm_head(encoded).float() / cap) * cap
    return logits[0], targets, encoder_logits[0]

"""The plain step: what an engineer would write on Hugging Face's modules, as the published recipes
do. Yardstick and numerical oracle.

A right-padded batch, whole float32 logits, dense boolean masks, and a second full call for
self-conditioning that every example
takes part in. Two variants: all response blocks decoded and one of them scored (as NeMo AutoModel's
recipe does), or the
chosen block only (as TRL's example does). Unlike either, its masks are right everywhere.

Shape letters: B examples, S longest example, K blocks decoded per example, C canvas length, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from canvastune.data.packing import Example
from canvastune.model.diffusion_gemma import CACHE
from canvastune.noise import NoiseSample

IGNORED = -100  # target of a position that is not scored


@dataclass(frozen=True)
class PlainBatch:
    """A right-padded batch with its noise, and the masks of both calls."""

    tokens: torch.Tensor  # int64[B, S]
    next_targets: torch.Tensor  # int64[B, S]
    canvas: torch.Tensor  # int64[B, K*C]
    canvas_targets: torch.Tensor  # int64[B, K*C]
    canvas_positions: torch.Tensor  # int64[B, K*C]
    coins: torch.Tensor  # bool[B]
    encoder_masks: dict[str, torch.Tensor]  # by layer type: bool[B, 1, S, S]
    decoder_masks: dict[str, torch.Tensor]  # by layer type: bool[B, 1, K*C, S + K*C]

    @classmethod
    def of(
        cls,
        examples: list[Example],
        draws: list[NoiseSample],
        sliding_window: int,
        *,
        all_blocks: bool,
    ) -> PlainBatch:
        """Pad and mask; the noise of a block that is decoded and not scored is that of the chosen
        one.
        """
        size = examples[0].canvas_length
        longest = max(len(example.tokens) for example in examples)
        blocks = max(example.blocks for example in examples) if all_blocks else 1
        tokens = torch.zeros(len(examples), longest, dtype=torch.int64)
        next_targets = torch.full_like(tokens, IGNORED)
        canvas = torch.zeros(len(examples), blocks * size, dtype=torch.int64)
        canvas_targets = torch.full_like(canvas, IGNORED)
        canvas_positions = torch.zeros_like(canvas)
        starts = torch.zeros(
            len(examples), blocks * size, dtype=torch.int64
        )  # of the block that a canvas position is in
        valid = torch.zeros_like(canvas, dtype=torch.bool)
        for row, (example, draw) in enumerate(zip(examples, draws, strict=True)):
            length = len(example.tokens)
            tokens[row, :length] = example.tokens
            next_targets[row, : length - 1] = example.tokens[1:]
            for place, block in enumerate(range(example.blocks) if all_blocks else [draw.block]):
                start = example.prefix_length + block * size
                clean = example.tokens[start : start + size]
                there = slice(place * size, place * size + len(clean))
                noisy = torch.where(
                    draw.corrupted[: len(clean)], draw.replacement[: len(clean)], clean
                )
                canvas[row, there] = noisy
                canvas_positions[row, there] = torch.arange(start, start + len(clean))
                starts[row, place * size : (place + 1) * size] = start
                valid[row, there] = True
                if block == draw.block:
                    canvas_targets[row, there] = clean
        lengths = torch.tensor([len(example.tokens) for example in examples])
        own_block = torch.arange(blocks * size) // size
        column, row_ = torch.arange(longest)[None], torch.arange(longest)[:, None]
        causal = (column <= row_) & (column < lengths[:, None, None])
        causal = causal | (
            column == row_
        )  # a padded row sees itself, since a softmax over nothing is not a number
        own = (own_block[:, None] == own_block[None]) & valid[:, None] | torch.eye(
            blocks * size, dtype=torch.bool
        )
        past = torch.arange(longest)[None, None] < starts[:, :, None]
        near = torch.arange(longest)[None, None] > starts[:, :, None] - sliding_window
        return cls(
            tokens,
            next_targets,
            canvas,
            canvas_targets,
            canvas_positions,
            torch.tensor([draw.self_condition for draw in draws]),
            {
                "full_attention": causal[:, None],
                "sliding_attention": (causal & (column > row_ - sliding_window))[:, None],
            },
            {
                "full_attention": torch.cat([past, own], 2)[:, None],
                "sliding_attention": torch.cat([past & near, own], 2)[:, None],
            },
        )

    def to(self, device: torch.device) -> PlainBatch:
        """Return the batch with its tensors on `device`."""
        return PlainBatch(**tree_map(lambda tensor: tensor.to(device), vars(self)))


def plain_twin(model: nn.Module, config: DiffusionGemmaConfig) -> DiffusionGemmaForBlockDiffusion:
    """Hugging Face's model on another model's own weights and buffers, found by their names: it
    takes no memory for them.

    Args:
        model: the shared stack, whose names are the decoder's.
        config: read again, so that attention and experts are Hugging Face's own, whatever the other
            model has set in it.
    """
    with torch.device("meta"):
        twin = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(config.to_dict()))
    twin.model.encoder.vision_tower = twin.model.encoder.embed_vision = (
        None  # no text goes through them
    )
    for kind in ("parameters", "buffers"):
        found = dict(getattr(model, f"named_{kind}")(remove_duplicate=False))
        for name, _ in list(getattr(twin, f"named_{kind}")(remove_duplicate=False)):
            module, _, leaf = name.rpartition(".")
            getattr(twin.get_submodule(module), f"_{kind}")[leaf] = found[
                name.replace("model.encoder.language_model.", "model.decoder.")
            ]
    return twin


def plain_loss(
    model: DiffusionGemmaForBlockDiffusion, batch: PlainBatch, encoder_loss_weight: float = 1.0
) -> torch.Tensor:
    """Compute the batch's loss, with gradient."""

    def call(conditioning: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(
            input_ids=batch.tokens,
            attention_mask=batch.encoder_masks,
            **{CACHE: DynamicCache()},
            decoder_input_ids=batch.canvas,
            decoder_position_ids=batch.canvas_positions,
            decoder_attention_mask=batch.decoder_masks,
            self_conditioning_logits=conditioning,
            self_conditioning_mask=None if conditioning is None else batch.coins,
        )
        return out.logits, out.encoder_last_hidden_state

    first = None
    if bool(batch.coins.any()):
        with torch.no_grad():
            first, _ = call(None)
    logits, encoded = call(first)
    cap = model.final_logit_softcapping
    encoder_logits = torch.tanh(model.lm_head(encoded).float() / cap) * cap
    diffusion = F.cross_entropy(
        logits.flatten(0, 1), batch.canvas_targets.flatten(), ignore_index=IGNORED
    )
    autoregressive = F.cross_entropy(
        encoder_logits.flatten(0, 1), batch.next_targets.flatten(), ignore_index=IGNORED
    )
    return diffusion + encoder_loss_weight * autoregressive


def plain_step(model: DiffusionGemmaForBlockDiffusion, batch: PlainBatch) -> torch.Tensor:
    """Forward and backward of the plain step."""
    loss = plain_loss(model, batch)
    loss.backward()
    return loss.detach()

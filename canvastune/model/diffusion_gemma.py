"""DiffusionGemma as one shared stack: encoder and decoder use the same Hugging Face modules.

Shape letters: N clean tokens and M canvas tokens of a packed batch, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaDecoderTextAttention,
    DiffusionGemmaDecoderTextLayer,
)

from canvastune.config.schema import Checkpointing, is_recomputed
from canvastune.data.packing import PackedBatch
from canvastune.model import attention, fused, kernels, moe
from canvastune.model.attention import Packing
from canvastune.model.flex_attention import FlexPacking
from canvastune.model.lora import keyed_dropout
from canvastune.model.memory_efficient import make_memory_efficient
from canvastune.model.tied_embedding import SharedEmbedding

Result = TypeVar("Result")

# Name of the cache in arguments and outputs: `cache` since transformers 5.24.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(DiffusionGemmaDecoderTextAttention.forward).parameters
)


class WeightTiedDiffusionGemma(DiffusionGemmaForBlockDiffusion):
    """A DiffusionGemma whose encoder and decoder call one list of layers, one norm, one embedding
    and one rotary module.

    Every shared weight has one name, the decoder's. The vision tower is left out: text training
    never calls it, and its tensors are copied from checkpoint to checkpoint. Stock `generate()`
    works.
    """

    def __init__(
        self, config: DiffusionGemmaConfig, packing: type[Packing] | type[FlexPacking] = Packing
    ) -> None:
        """
        Args:
            packing: how the rows of a batch attend.
        """
        config._attn_implementation = attention.NAME
        config._experts_implementation = moe.NAME
        super().__init__(config)
        self._packing = packing
        decoder, encoder = self.model.decoder, self.model.encoder
        encoder.vision_tower = encoder.embed_vision = None
        for layer in decoder.layers:
            layer.__class__ = _SharedLayer
            # The decoder's own, and able to write the encoder's cache.
            layer.self_attn.__class__ = _SharedAttention
        decoder.embed_tokens.__class__ = SharedEmbedding
        make_memory_efficient(decoder)
        text = encoder.language_model
        # Outside the module tree, so that each weight is registered once, under the decoder's name.
        for name, shared in {
            "layers": [_EncoderView(layer) for layer in decoder.layers],
            "norm": decoder.norm,
            "embed_tokens": decoder.embed_tokens,
            "rotary_emb": decoder.rotary_emb,
        }.items():
            delattr(text, name)
            object.__setattr__(text, name, shared)
        self.lm_head.weight = decoder.embed_tokens.weight

    def run_under_fsdp(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call `function(self, ...)` as a forward pass of this module, with FSDP's root gathered."""
        return function(self, *args, **kwargs)

    def packing(self, batch: PackedBatch) -> Packing | FlexPacking:
        """Lay out which rows of a batch attend to which, for `hidden_states`."""
        return self._packing.of(batch, self.config.text_config.sliding_window)

    def embed_canvas(self, canvas: torch.Tensor, signal: torch.Tensor | None) -> torch.Tensor:
        """Embed canvas tokens [M] with the self-conditioning signal [M, H] -> [M, H].

        Args:
            signal: None stands for zeros; the self-conditioning block runs on them too.
        """
        decoder = self.model.decoder
        embedded = decoder.embed_tokens(canvas)
        return decoder.self_conditioning(
            embedded, torch.zeros_like(embedded) if signal is None else signal
        )

    def hidden_states(
        self,
        batch: PackedBatch,
        canvas: torch.Tensor,
        packing: Packing | FlexPacking,
        *,
        checkpointing: Checkpointing,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the stack once over `[clean ; canvas]`.

        Args:
            canvas: [M, H] embedded canvas, self-conditioning applied.
            checkpointing: which layers keep only their input and are recomputed in the backward
                pass.

        Returns:
            The last hidden states of the clean rows [N, H] and of the canvas rows [M, H].
        """
        decoder = self.model.decoder
        hidden = torch.cat(
            [decoder.embed_tokens(batch.clean), canvas.to(decoder.embed_tokens.weight.dtype)]
        )[None]
        positions = torch.cat([batch.clean_positions, batch.canvas_positions])[None]
        rotary = {
            kind: decoder.rotary_emb(hidden, positions, kind) for kind in decoder.unique_layer_types
        }
        layer_types = self.config.text_config.layer_types
        for index, (layer, kind) in enumerate(zip(decoder.layers, layer_types, strict=True)):
            if is_recomputed(checkpointing, index):
                hidden = checkpoint(
                    _run_layer,
                    layer,
                    hidden,
                    rotary[kind],
                    packing,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = _run_layer(layer, hidden, rotary[kind], packing)
        hidden = decoder.norm(hidden)[0]
        return hidden[: packing.clean_rows], hidden[packing.clean_rows :]


def _run_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    packing: Packing | FlexPacking,
) -> torch.Tensor:
    # Inside, so that a recomputed layer drops the same inputs.
    with keyed_dropout(packing.row_keys):
        return layer(hidden, position_embeddings=rotary, attention_mask=None, packing=packing)


class _SharedLayer(DiffusionGemmaDecoderTextLayer):
    """The stock layer with expert dispatch overlapped with the dense MLP under expert parallelism.

    On one rank the operations run in the same order, so that gradients are summed in that order
    too.
    """

    encoder_scalar: torch.Tensor | None = None  # [1]; None: the decoder's `layer_scalar` is both's

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[1, T, H] -> [1, T, H]."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        if kernels.available(hidden_states):
            return self._forward_in_kernels(hidden_states, attended, **kwargs)
        residual = hidden_states + self.post_attention_layernorm(attended)
        tokens = residual.flatten(0, -2)
        if fused.few_launches(tokens):
            weights, index = fused.route(self.router, tokens)
        else:
            _, weights, index = self.router(tokens)
        rows, sent = self.pre_feedforward_layernorm_2(tokens), None
        if moe.is_expert_parallel(self.experts):
            sent = moe.dispatch(self.experts, rows, index, weights)
        dense = self.post_feedforward_layernorm_1(
            self.mlp(self.pre_feedforward_layernorm(residual))
        )
        if sent is not None:
            rows, weights = sent.wait()
        routed = self.post_feedforward_layernorm_2(
            self.experts(rows, index, weights, sent=sent).view_as(residual)
        )
        out = residual + self.post_feedforward_layernorm(dense + routed)
        # In place, to keep the dtype: the scalar is float32.
        out *= self._scalar(out.shape[-2], **kwargs)
        return out

    def _forward_in_kernels(
        self, hidden_states: torch.Tensor, attended: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        residual, dense, rows, scored = kernels.before_experts(hidden_states, attended, self)
        router, rows = self.router, rows.flatten(0, -2)
        weights, index = kernels.choose(
            router.proj(scored.flatten(0, -2)), router.config.top_k_experts, router.per_expert_scale
        )
        sent = None
        if moe.is_expert_parallel(self.experts):
            sent = moe.dispatch(self.experts, rows, index, weights)
        dense = self.mlp(dense)
        if sent is not None:
            rows, weights = sent.wait()
        routed = self.experts(rows, index, weights, sent=sent).view_as(residual)
        scalar = self._scalar(residual.shape[-2], **kwargs)
        return kernels.after_experts(residual, dense, routed, self, scalar)

    def _scalar(
        self,
        rows: int,
        packing: Packing | FlexPacking | None = None,
        write_cache: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        """Return the layer's scalar, [1], or one for each row, [T, 1], where clean and canvas rows
        have different ones.
        """
        if self.encoder_scalar is None:
            return self.layer_scalar
        if packing is None:
            return self.encoder_scalar if write_cache else self.layer_scalar
        clean = packing.clean_rows
        kinds = [self.encoder_scalar.expand(clean), self.layer_scalar.expand(rows - clean)]
        return torch.cat(kinds)[:, None]


class _EncoderView:
    """A shared layer as the encoder calls it: causal, and it writes its keys and values to the
    cache.
    """

    def __init__(self, layer: DiffusionGemmaDecoderTextLayer) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = kwargs.get(CACHE)
        kwargs[CACHE] = None if cache is None else _WrittenCache(cache)
        return self._layer(*args, write_cache=True, **kwargs)


class _WrittenCache:
    """Mark a cache as writable: the decoder's attention reads a cache without changing it."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache


class _SharedAttention(DiffusionGemmaDecoderTextAttention):
    """The decoder's attention, which updates the cache when the encoder calls it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[1, T, H] -> [1, T, H]; over a packed batch on a GPU, in few kernels."""
        packing = kwargs.get("packing")
        if packing is None or not fused.few_launches(hidden_states):
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        modules = [self.q_proj, self.k_proj] + ([] if self.v_proj is None else [self.v_proj])
        rows = [
            part.unflatten(-1, (-1, self.head_dim))
            for part in fused.project(modules, hidden_states)
        ]
        if kernels.available(hidden_states):
            query, key, value = kernels.turn_heads(
                rows[0], rows[1], rows[-1], self, *position_embeddings
            )
        else:
            cos, sin = (part.unsqueeze(2) for part in position_embeddings)
            query = fused.rotate(self.q_norm(rows[0]), cos, sin)
            key = fused.rotate(self.k_norm(rows[1]), cos, sin)
            value = self.v_norm(rows[-1])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = packing.attend(self.layer_type, query, key, value, self.scaling)
        (out,) = fused.project((self.o_proj,), attended.transpose(1, 2).flatten(2))
        return out, None

    def append_to_cache(
        self, cache: Any, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(cache, _WrittenCache):
            return cache.cache.update(key_states, value_states, self.layer_idx)
        return super().append_to_cache(cache, key_states, value_states)

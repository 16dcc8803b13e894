"""The two losses of a step from hidden states, in chunks: no [rows, V] tensor outlives its chunk (objective.md sections 4, 5).

Shape letters: R scored rows, N clean and M canvas tokens of a packed batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from canvastune.data.batches import PackedBatch
from canvastune.model.attention import Packing
from canvastune.model.shared import SharedModel

CHUNK_ELEMENTS = 2**24  # logits alive at once: 64 MiB in float32


def losses(
    model: SharedModel, batch: PackedBatch, weights: tuple[float, float], *, any_coin: bool, checkpointing: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a packed batch, to be called through `model.inside`.

    Args:
        weights: (diffusion, autoregressive) weight of one scored row: 1 / global count, and `encoder_loss_weight` / its count.
        any_coin: whether any rank denoises an example twice: then all ranks run pass 1, since their collectives must match.

    Returns:
        (loss [], diffusion [], autoregressive []): the weighted sum, with gradient, and the plain sums of cross-entropy, without.
    """
    embedding, softcap = model.lm_head.weight, model.final_logit_softcapping
    signal = _self_conditioning_signal(model, batch) if any_coin else None
    packing = Packing.of(batch, model.config.text_config.sliding_window)
    canvas = model.embed_canvas(batch.canvas, signal)
    clean_hidden, canvas_hidden = model.hidden_states(batch, canvas, packing, checkpointing=checkpointing)
    canvas_rows = len(batch.canvas_targets)
    hidden = torch.cat([canvas_hidden, clean_hidden[batch.next_rows]])
    targets = torch.cat([batch.canvas_targets, batch.next_targets])
    row_weights = torch.full((len(targets),), weights[1], dtype=torch.float32, device=hidden.device)
    row_weights[:canvas_rows] = weights[0]
    loss, each = _WeightedCrossEntropy.apply(hidden, embedding, targets, row_weights, softcap)
    return loss, each[:canvas_rows].sum(), each[canvas_rows:].sum()


def _self_conditioning_signal(model: SharedModel, batch: PackedBatch) -> torch.Tensor:
    """Pass 1: denoise the examples with a coin from a zero signal -> [M, H], zero for the other examples.

    A rank that has no such example while another has one runs pass 1 on its first example and uses nothing of it.
    """
    coins = list(batch.coins)
    used = any(coins)
    twice, rows = batch.select(coins if used else [True] + [False] * (len(coins) - 1))
    packing = Packing.of(twice, model.config.text_config.sliding_window)
    with torch.no_grad():
        _, hidden = model.hidden_states(twice, model.embed_canvas(twice.canvas, None), packing, checkpointing=False)
    signal = hidden.new_zeros(len(batch.canvas), hidden.shape[1])
    if not used:
        return signal
    scale = model.model.decoder.embed_tokens.embed_scale.to(hidden.dtype)
    soft = _SoftEmbedding.apply(hidden, model.lm_head.weight, model.final_logit_softcapping) * scale
    return signal.index_copy(0, rows, soft)


def softcapped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(logits / cap)` in float32, shapes alike."""
    return torch.tanh(logits.float() / cap) * cap


class _WeightedCrossEntropy(torch.autograd.Function):
    """sum_r weight_r * CE(softcap(hidden_r . E^T), target_r), and each row's CE without gradient.

    The gradients are formed beside the logits in the forward pass, chunk by chunk, so no logit is computed twice or kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        each = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        need_hidden, need_embedding = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        embedding_grad = torch.zeros_like(embedding, dtype=torch.float32) if need_embedding else None
        for rows in _chunks(len(hidden), len(embedding)):
            part, target = hidden[rows], targets[rows, None]
            capped = softcapped(part @ embedding.T, cap)
            log_total = capped.logsumexp(dim=-1, keepdim=True)
            each[rows] = (log_total - capped.gather(1, target)).squeeze(1)
            if not (need_hidden or need_embedding):
                continue
            # d/dlogit = (softmax - onehot) * (1 - tanh^2), in place of the probabilities
            gradient = (capped - log_total).exp_()
            gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            gradient.mul_(weights[rows, None]).mul_(capped.div_(cap).square_().neg_().add_(1))
            gradient = gradient.to(embedding.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = gradient @ embedding
            if embedding_grad is not None:
                embedding_grad += gradient.T @ part
        ctx.save_for_backward(hidden_grad, embedding_grad)
        ctx.embedding_dtype = embedding.dtype
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden_grad, embedding_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * upstream
        if embedding_grad is not None:
            embedding_grad = (embedding_grad * upstream).to(ctx.embedding_dtype)
        return hidden_grad, embedding_grad, None, None, None


class _SoftEmbedding(torch.autograd.Function):
    """softmax(softcap(hidden . E^T)) @ E without keeping probabilities: [R, H], [V, H] -> [R, H].

    The probabilities are detached (no gradient reaches `hidden`); E receives its gradient through the product alone.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, embedding: torch.Tensor, cap: float) -> torch.Tensor:
        ctx.save_for_backward(hidden, embedding)
        ctx.cap = cap
        out = torch.empty_like(hidden)
        for rows in _chunks(len(hidden), len(embedding)):
            out[rows] = _probabilities(hidden[rows], embedding, cap) @ embedding
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        hidden, embedding = ctx.saved_tensors
        gradient = torch.zeros_like(embedding, dtype=torch.float32)
        for rows in _chunks(len(hidden), len(embedding)):
            gradient += _probabilities(hidden[rows], embedding, ctx.cap).T @ upstream[rows]
        return None, gradient.to(embedding.dtype), None


def _probabilities(hidden: torch.Tensor, embedding: torch.Tensor, cap: float) -> torch.Tensor:
    return F.softmax(softcapped(hidden @ embedding.T, cap), dim=-1).to(embedding.dtype)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

"""The two losses of a step from hidden states, in chunks: no [rows, V] tensor outlives its chunk (objective.md sections 4, 5).

Shape letters: R scored rows, N clean and M canvas tokens of a packed batch, H hidden size, V vocabulary, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from canvastune.data.batches import PackedBatch
from canvastune.model.embedding import TableGradient, collecting
from canvastune.model.shared import SharedModel

# Logits alive at once, in float32. A CPU's caches want few. A GPU reads the whole table once per chunk, which costs nothing beside
# the multiplication only where a chunk has hundreds of rows.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**23, 2**27
_LARGEST_CAP = 60.0  # e^cap times the vocabulary stays well inside float32


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
    table, cap = model.lm_head.weight, model.final_logit_softcapping
    gradient = TableGradient() if torch.is_grad_enabled() and table.requires_grad else None
    with collecting(gradient):
        signal = _self_conditioning_signal(model, batch, gradient) if any_coin else None
        packing = model.packing(batch)
        canvas = model.embed_canvas(batch.canvas, signal)
        clean_hidden, canvas_hidden = model.hidden_states(batch, canvas, packing, checkpointing=checkpointing)
    canvas_rows = len(batch.canvas_targets)
    hidden = torch.cat([canvas_hidden, clean_hidden[batch.next_rows]])
    targets = torch.cat([batch.canvas_targets, batch.next_targets])
    row_weights = torch.full((len(targets),), weights[1], dtype=torch.float32, device=hidden.device)
    row_weights[:canvas_rows] = weights[0]
    loss, each = _WeightedCrossEntropy.apply(hidden, table, targets, row_weights, cap, gradient)
    return loss, each[:canvas_rows].sum(), each[canvas_rows:].sum()


def _self_conditioning_signal(model: SharedModel, batch: PackedBatch, gradient: TableGradient | None) -> torch.Tensor:
    """Pass 1: denoise the examples with a coin from a zero signal -> [M, H], zero for the other examples.

    A rank that has no such example while another has one takes part with two tokens, and uses nothing of it.
    """
    used = any(batch.coins)
    twice, rows = batch.select(list(batch.coins)) if used else (_two_tokens(batch), batch.clean[:0])
    twice = twice.before_blocks()
    packing = model.packing(twice)
    with torch.no_grad():
        _, hidden = model.hidden_states(twice, model.embed_canvas(twice.canvas, None), packing, checkpointing=False)
    signal = hidden.new_zeros(len(batch.canvas), hidden.shape[1])
    if not used:
        return signal
    scale = model.model.decoder.embed_tokens.embed_scale.to(hidden.dtype)
    soft = _SoftEmbedding.apply(hidden, model.lm_head.weight, model.final_logit_softcapping, gradient) * scale
    return signal.index_copy(0, rows, soft)


def _two_tokens(batch: PackedBatch) -> PackedBatch:
    """A clean token and a canvas of one."""
    one = {name: getattr(batch, name)[:1] for name in ("clean", "clean_positions", "canvas", "canvas_positions", "canvas_targets")}
    none = {name: getattr(batch, name)[:0] for name in ("next_rows", "next_targets")}
    lengths: dict[str, Any] = dict.fromkeys(("clean_lengths", "canvas_lengths", "block_starts"), (1,))
    return replace(batch, **one, **none, **lengths, self_condition=batch.self_condition[:1], coins=(False,), row_keys=None)


class _WeightedCrossEntropy(torch.autograd.Function):
    """sum_r weight_r * CE(softcap(hidden_r . E^T), target_r), and each row's CE without gradient.

    The gradients are formed beside the logits in the forward pass, chunk by chunk, so no logit is computed twice or kept. With
    t = tanh(logit / cap), the softmax's terms are e^(cap t), which need no maximum taken off: they are bounded. The gradient by a
    logit is weight * (softmax - onehot) * (1 - t^2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        table: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        cap: float,
        gradient: TableGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        each = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        need_hidden, need_table = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        table_grad = torch.zeros_like(table, dtype=torch.float32) if need_table else None
        for rows in _chunks(hidden, table):
            part, target = hidden[rows], targets[rows, None]
            tanh, terms, total = softmax_terms(part, table, cap)
            at_target = tanh.gather(1, target)
            each[rows] = (total.log() - cap * at_target).squeeze(1)
            if need_hidden or need_table:
                logits_grad = terms.mul_(tanh.square_().neg_().add_(1))
                logits_grad.scatter_add_(1, target, total * (at_target.square() - 1))
                logits_grad.mul_(weights[rows, None] / total)
                del tanh, terms
                logits_grad = logits_grad.to(table.dtype)
                if hidden_grad is not None:
                    torch.mm(logits_grad, table, out=hidden_grad[rows])
                if table_grad is not None:
                    _add_product(table_grad, logits_grad, part)
                del logits_grad
        ctx.save_for_backward(hidden_grad, table_grad)
        ctx.table_dtype, ctx.gradient = table.dtype, gradient
        if need_table and gradient is not None:
            gradient.announce()
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, table_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * upstream
        if table_grad is not None:
            table_grad = table_grad.mul_(upstream).to(ctx.table_dtype)  # in place: a second backward pass through it is refused
            if ctx.gradient is not None:
                ctx.gradient.sum = table_grad
                table_grad = ctx.gradient.hand_over()
        return hidden_grad, table_grad, None, None, None, None


class _SoftEmbedding(torch.autograd.Function):
    """softmax(softcap(hidden . E^T)) @ E without keeping probabilities: [R, H], [V, H] -> [R, H].

    The probabilities are detached (no gradient reaches `hidden`); E receives its gradient through the product alone.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: torch.Tensor, cap: float, gradient: TableGradient | None) -> torch.Tensor:
        ctx.save_for_backward(hidden, table)
        ctx.cap, ctx.gradient = cap, gradient
        if ctx.needs_input_grad[1] and gradient is not None:
            gradient.announce()
        out = torch.empty_like(hidden)
        for rows in _chunks(hidden, table):
            torch.mm(_probabilities(hidden[rows], table, cap), table, out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        hidden, table = ctx.saved_tensors
        found = ctx.gradient.sum if ctx.gradient is not None else None
        total = torch.zeros_like(table) if found is None else found
        for rows in _chunks(hidden, table):
            _add_product(total, _probabilities(hidden[rows], table, ctx.cap), upstream[rows])
        if ctx.gradient is None:
            return None, total, None, None
        ctx.gradient.sum = total
        return None, ctx.gradient.hand_over(), None, None


def softmax_terms(hidden: torch.Tensor, table: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [r, H], table [V, H] -> tanh(logits / cap) [r, V], e^(cap * tanh) [r, V] and its sum [r, 1], in float32."""
    if cap > _LARGEST_CAP:
        raise ValueError(f"final_logit_softcapping is {cap}: expected at most {_LARGEST_CAP}, so that e^cap can be summed in float32")
    tanh = (hidden @ table.T).float().div_(cap).tanh_()
    terms = (tanh * cap).exp_()
    return tanh, terms, terms.sum(dim=-1, keepdim=True)


def _probabilities(hidden: torch.Tensor, table: torch.Tensor, cap: float) -> torch.Tensor:
    """[r, V] in the table's dtype."""
    _, terms, total = softmax_terms(hidden, table, cap)
    return terms.div_(total).to(table.dtype)


def _add_product(total: torch.Tensor, rows: torch.Tensor, part: torch.Tensor) -> None:
    """total [V, H] += rows [r, V]^T @ part [r, H]; where the dtypes agree, without a product beside it."""
    if total.dtype == rows.dtype == part.dtype:
        total.addmm_(rows.T, part)
    else:
        total += rows.T @ part


def _chunks(hidden: torch.Tensor, table: torch.Tensor) -> Iterator[slice]:
    size = chunk_rows(len(table), hidden.device.type)
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows whose logits are alive at once."""
    return max(1, (CHUNK_ELEMENTS if device == "cpu" else GPU_CHUNK_ELEMENTS) // vocabulary)

"""The two losses of a step from hidden states, in chunks: no [rows, V] tensor outlives its chunk.

Shape letters: R scored rows, N clean and M canvas tokens of a packed batch, H hidden size, V
vocabulary, r rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from canvastune.config.schema import Checkpointing
from canvastune.data.packing import PackedBatch, padding_batch
from canvastune.logit_chunks import chunk_rows, tile_columns
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.scratch import borrow
from canvastune.model.tied_embedding import SharedGradBuffer, accumulate_gradients

LossWeights = tuple[float | torch.Tensor, float | torch.Tensor]
_MINUS_ONE = torch.tensor(-1.0)
_MAX_CAP = 60.0  # e^cap times the vocabulary stays well within float32's range


def losses(
    model: WeightTiedDiffusionGemma,
    batch: PackedBatch,
    weights: LossWeights,
    *,
    any_self_conditioned: bool,
    checkpointing: Checkpointing,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the loss of a packed batch; call it through `model.run_under_fsdp`.

    The arguments are those of `row_losses`.

    Returns:
        (loss [], diffusion [], autoregressive []): the weighted sum, with gradient, and the plain
        sums of cross-entropy, without.
    """
    loss, canvas, pairs = row_losses(
        model,
        batch,
        weights,
        any_self_conditioned=any_self_conditioned,
        checkpointing=checkpointing,
    )
    return loss, canvas.sum(), pairs.sum()


def row_losses(
    model: WeightTiedDiffusionGemma,
    batch: PackedBatch,
    weights: LossWeights,
    *,
    any_self_conditioned: bool,
    checkpointing: Checkpointing,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the loss of a packed batch, and the cross-entropy of each scored row; call it through
    `model.run_under_fsdp`.

    Args:
        weights: (diffusion, autoregressive) weight of one scored row: 1 / global count, and
            `encoder_loss_weight` / its count; numbers, or tensors [] on the device, which need no
            synchronization.
        any_self_conditioned: whether any rank has a self-conditioned canvas: then all ranks run
            the self-conditioning pass, since their collectives must match.

    Returns:
        (loss [], canvas rows [M], pairs of `next_rows` [N - B]): the weighted sum, with gradient,
        and each row's cross-entropy, without.
    """
    table, cap = model.lm_head.weight, model.final_logit_softcapping
    gradient = SharedGradBuffer() if torch.is_grad_enabled() and table.requires_grad else None
    with accumulate_gradients(gradient):
        signal = _self_conditioning_signal(model, batch, gradient) if any_self_conditioned else None
        packing = model.packing(batch)
        canvas = model.embed_canvas(batch.canvas, signal)
        clean_hidden, canvas_hidden = model.hidden_states(
            batch, canvas, packing, checkpointing=checkpointing
        )
    canvas_rows = len(batch.canvas_targets)
    hidden = torch.cat([canvas_hidden, clean_hidden[batch.next_rows]])
    targets = torch.cat([batch.canvas_targets, batch.next_targets])
    row_weights = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    row_weights[:canvas_rows], row_weights[canvas_rows:] = weights
    loss, each = _WeightedCrossEntropy.apply(hidden, table, targets, row_weights, cap, gradient)
    return loss, each[:canvas_rows], each[canvas_rows:]


def _self_conditioning_signal(
    model: WeightTiedDiffusionGemma, batch: PackedBatch, gradient: SharedGradBuffer | None
) -> torch.Tensor:
    """Run the self-conditioning pass: denoise the chosen canvases from a zero signal -> [M, H],
    zero for the others.

    A rank without such a canvas takes part with two padding tokens, for the collectives only.
    """
    used = any(batch.self_conditioned)
    if used:
        twice, rows = batch.select(list(batch.self_conditioned))
    else:
        names = ("clean", "canvas", "canvas_positions")
        tokens = {name: getattr(batch, name)[:1] for name in names}
        twice = replace(padding_batch().to(batch.clean.device), **tokens)
    twice = twice.before_blocks()
    packing = model.packing(twice)
    with torch.no_grad():
        _, hidden = model.hidden_states(
            twice, model.embed_canvas(twice.canvas, None), packing, checkpointing=False
        )
    signal = hidden.new_zeros(len(batch.canvas), hidden.shape[1])
    if not used:
        return signal
    scale = model.model.decoder.embed_tokens.embed_scale.to(hidden.dtype)
    soft = (
        _SoftEmbedding.apply(hidden, model.lm_head.weight, model.final_logit_softcapping, gradient)
        * scale
    )
    return signal.index_copy(0, rows, soft)


class _WeightedCrossEntropy(torch.autograd.Function):
    """sum_r weight_r * CE(softcap(hidden_r . E^T), target_r), and each row's CE without gradient.

    The gradients are computed together with the logits in the forward pass, chunk by chunk, so that
    no logit is computed twice or kept. With t = tanh(logit / cap), the softmax's terms are
    e^(cap t): they are bounded, so no maximum needs to be subtracted. The gradient of a logit is
    weight * (softmax - onehot) * (1 - t^2); factors that are constant over a row are applied to the
    row's other operand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        table: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        cap: float,
        gradient: SharedGradBuffer | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        each = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        need_hidden, need_table = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        table_grad = torch.empty_like(table, dtype=torch.float32) if need_table else None
        rows_at_once = min(len(hidden), chunk_rows(len(table), hidden.device.type))
        scratch = _scratch(len(hidden), rows_at_once, table)
        # Of a chunk's logits, for their gradients.
        with borrow((len(table) * rows_at_once,), each) as kept:
            for start in range(0, len(hidden), rows_at_once):
                part = hidden[start : start + rows_at_once]
                rows = slice(start, start + len(part))
                total = at_target = each.new_zeros(len(part))
                tiles = list(_tiles(len(part), table, scratch, kept))
                for columns, tanh, terms in tiles:
                    total = total + softmax_terms(part, table[columns], cap, (tanh, terms))[2]
                    inside, index = _index_in_tile(targets[None, rows], columns)
                    at_target = torch.where(inside, tanh.gather(0, index), at_target)[0]
                    terms.addcmul_(terms, tanh.square_(), value=-1)
                each[rows] = total.log() - cap * at_target
                if not (need_hidden or need_table):
                    continue
                whole = kept[: len(table) * len(part)].view(len(table), -1)
                whole.scatter_add_(0, targets[None, rows], (total * (at_target.square() - 1))[None])
                scale = (weights[rows] / total)[:, None]
                scaled = (part * scale).to(table.dtype)
                sums = each.new_zeros(part.shape)
                for columns in [columns for columns, _, _ in tiles]:
                    logits_grad = whole[columns].to(table.dtype)
                    if need_hidden:
                        _add_product(sums, logits_grad.T, table[columns])
                    if table_grad is not None:
                        _add_product(
                            table_grad[columns], logits_grad, scaled, to_nothing=start == 0
                        )
                    del logits_grad
                if hidden_grad is not None:
                    hidden_grad[rows] = sums.mul_(scale)
        ctx.save_for_backward(hidden_grad, table_grad)
        ctx.table_dtype, ctx.gradient = table.dtype, gradient
        if need_table and gradient is not None:
            gradient.register_use()
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, table_grad = ctx.saved_tensors
        # A GPU is not waited for to know it.
        is_one = upstream.device.type == "cpu" and bool(upstream == 1)
        if hidden_grad is not None and not is_one:
            hidden_grad = hidden_grad * upstream
        if table_grad is not None:
            if not is_one:
                table_grad.mul_(upstream)  # in place: a second backward pass is refused
            table_grad = table_grad.to(ctx.table_dtype)
            if ctx.gradient is not None:
                ctx.gradient.sum = table_grad
                table_grad = ctx.gradient.release()
        return hidden_grad, table_grad, None, None, None, None


class _SoftEmbedding(torch.autograd.Function):
    """softmax(softcap(hidden . E^T)) @ E without keeping probabilities: [R, H], [V, H] -> [R, H].

    The probabilities are detached (no gradient reaches `hidden`); E receives its gradient through
    the product only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        table: torch.Tensor,
        cap: float,
        gradient: SharedGradBuffer | None,
    ) -> torch.Tensor:
        totals = hidden.new_zeros(len(hidden), 1, dtype=torch.float32)
        sums = torch.zeros_like(hidden, dtype=torch.float32)
        for rows, columns, terms in _softmax_tiles(hidden, table, cap):
            totals[rows, 0] += terms.sum(dim=0)
            _add_product(sums[rows], terms.T.to(table.dtype), table[columns])
        ctx.save_for_backward(hidden, table, totals)
        ctx.cap, ctx.gradient = cap, gradient
        if ctx.needs_input_grad[1] and gradient is not None:
            gradient.register_use()
        return sums.div_(totals).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        hidden, table, totals = ctx.saved_tensors
        found = ctx.gradient.sum if ctx.gradient is not None else None
        total = torch.zeros_like(table) if found is None else found
        scaled = (upstream / totals).to(table.dtype)
        for rows, columns, terms in _softmax_tiles(hidden, table, ctx.cap):
            _add_product(total[columns], terms.to(table.dtype), scaled[rows])
        if ctx.gradient is None:
            return None, total, None, None
        ctx.gradient.sum = total
        return None, ctx.gradient.release(), None, None


def softmax_terms(
    hidden: torch.Tensor,
    table: torch.Tensor,
    cap: float,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the softmax's terms in float32.

    Args:
        hidden: [r, H].
        table: [v, H].
        into: buffers for the first two results; None: allocate them.

    Returns:
        tanh(logits / cap) [v, r], e^(cap * tanh) [v, r] and its sum over v [r].
    """
    if cap > _MAX_CAP:
        raise ValueError(
            f"final_logit_softcapping is {cap}: expected at most {_MAX_CAP}, so that e^cap can be"
            " summed in float32"
        )
    empty = hidden.new_empty(0, dtype=torch.float32)
    tanh, terms = into or (
        empty.new_empty(len(table), len(hidden)),
        empty.new_empty(len(table), len(hidden)),
    )
    on_cpu = hidden.device.type == "cpu"
    scale = (2 if on_cpu else 1) / cap
    if hidden.dtype == torch.float32:
        torch.addmm(tanh, table, hidden.T, beta=0, alpha=scale, out=tanh)
    else:
        tanh.copy_(table @ hidden.T).mul_(scale)
    if on_cpu:
        # tanh(x) = 2 sigmoid(2x) - 1 and e^x = 2^(x log2(e)), which torch vectorizes itself: it takes
        # tanh and exp from MKL, where they are slow on a CPU of AMD.
        torch.add(_MINUS_ONE, tanh.sigmoid_(), alpha=2, out=tanh)
        torch.mul(tanh, cap / math.log(2), out=terms).exp2_()
    else:
        torch.mul(tanh.tanh_(), cap, out=terms).exp_()
    return tanh, terms, terms.sum(dim=0)


def _softmax_tiles(
    hidden: torch.Tensor, table: torch.Tensor, cap: float
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield rows, columns, and the softmax's terms [columns, rows] there."""
    rows_at_once = min(len(hidden), chunk_rows(len(table), hidden.device.type))
    scratch, second = (_scratch(len(hidden), rows_at_once, table) for _ in range(2))
    for start in range(0, len(hidden), rows_at_once):
        part = hidden[start : start + rows_at_once]
        for columns, tanh, terms in _tiles(len(part), table, scratch, second, keeps=False):
            yield (
                slice(start, start + len(part)),
                columns,
                softmax_terms(part, table[columns], cap, (tanh, terms))[1],
            )


def _scratch(rows: int, rows_at_once: int, table: torch.Tensor) -> torch.Tensor:
    """Return a float32 buffer for a tile of any chunk: one for all, as two exist at once otherwise,
    a chunk's and the next one's.
    """
    sizes = {rows_at_once, rows % rows_at_once or rows_at_once}  # the last chunk may be smaller
    vocabulary, device = len(table), table.device.type
    size = max(rows * tile_columns(rows, vocabulary, device) for rows in sizes)
    return table.new_empty(size, dtype=torch.float32)


def _tiles(
    rows: int,
    table: torch.Tensor,
    scratch: torch.Tensor,
    second: torch.Tensor,
    *,
    keeps: bool = True,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield tiles of a chunk's logits: columns and two float32 buffers [columns, rows], in
    `scratch` and `second`.

    A tile stays in a CPU's caches while it is processed, and matmuls with the table are faster with
    the tile's rows in the last dimension. On a GPU the chunk is one tile.

    Args:
        keeps: each tile has its own part of `second`.
    """
    vocabulary = len(table)
    width = tile_columns(rows, vocabulary, table.device.type)
    for start in range(0, vocabulary, width):
        columns = slice(start, min(vocabulary, start + width))
        size, first = rows * (columns.stop - start), rows * start if keeps else 0
        yield (
            columns,
            scratch[:size].view(-1, rows),
            second[first : first + size].view(-1, rows),
        )


def _index_in_tile(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which targets [1, r] are in a tile, and their index in it (clamped for the others)."""
    index = targets - columns.start
    inside = (index >= 0) & (index < columns.stop - columns.start)
    return inside, index.clamp_(0, columns.stop - columns.start - 1)


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, to_nothing: bool = False
) -> None:
    """Add left @ right to total, in place; without a temporary product if the dtypes agree.

    Args:
        to_nothing: total is overwritten.
    """
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right, beta=int(not to_nothing))
    elif to_nothing:
        total.copy_(left @ right)
    else:
        total += left @ right

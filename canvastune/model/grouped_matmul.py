"""The experts' grouped matmuls: rows sorted by expert times each expert's weight, with the
gathering of rows before and the sum of each token's results after it.

A GPU multiplies all rows at once. A CPU takes them in chunks, and multiplies expert by expert into
the result's memory.

Shape letters: T tokens, K experts per token, E experts, R = T * K rows, H hidden size, I expert
size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.functional import grouped_mm

from canvastune.model import kernels
from canvastune.model.scratch import borrow

# On a CPU, bytes that exist at once: of rows gathered for their experts, which stay in a core's
# cache until they are multiplied, and of experts' results before they are summed.
_CHUNK_BYTES, _RESULT_BYTES = 2**21, 2**25


class DispatchedRows(torch.autograd.Function):
    """Each token's row K times, sorted by expert; the gradient is the sum of the K rows, in token
    order.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return _dispatch(hidden, order, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _combine(gradient, *ctx.saved_tensors), None, None


class CombinedRows(torch.autograd.Function):
    """The sum of each token's K rows, in token order; the gradient is `DispatchedRows`."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return _combine(rows, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _dispatch(gradient, *ctx.saved_tensors), None, None


class GroupedProduct(torch.autograd.Function):
    """Rows [R, in], sorted by expert up to ends [E], times the experts' weight [E, out, in]."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_weight else None, weight if needs_rows else None, ends)
        return grouped_mm(rows, weight.transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        rows_gradient = None if weight is None else grouped_mm(gradient, weight, offs=ends)
        return (
            rows_gradient,
            None
            if rows is None
            else _put_weight_gradient(None, slice(None), len(ends), gradient, rows, ends),
            None,
        )


class DispatchedProduct(torch.autograd.Function):
    """`DispatchedRows`, then the grouped matmul with the experts' weight [E, out, H], without
    keeping the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(
            hidden if ctx.needs_input_grad[1] else None, weight, order, inverse, ends
        )
        out, transposed = None, weight.transpose(-2, -1)
        for experts, rows, own_ends in _expert_chunks(ends, hidden):
            given = _dispatch(hidden, order[rows], inverse).to(weight.dtype)
            out = _put_product(out, rows, len(order), given, transposed[experts], own_ends)
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, order, inverse, ends = ctx.saved_tensors
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            for experts, rows, own_ends in _expert_chunks(ends, hidden):
                given = _dispatch(hidden, order[rows], inverse).to(weight.dtype)
                weight_gradient = _put_weight_gradient(
                    weight_gradient, experts, len(weight), gradient[rows], given, own_ends
                )
        if ctx.needs_input_grad[0]:
            hidden_gradient = _combined_product(gradient, weight, inverse, ends)
        return hidden_gradient, weight_gradient, None, None, None


class CombinedProduct(torch.autograd.Function):
    """Rows [R, I] times the experts' weight [E, H, I], then `CombinedRows`, without the results of
    single experts or their gradients as a whole on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        active: torch.Tensor,
        weight: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(
            active if ctx.needs_input_grad[1] else None, weight, order, inverse, ends
        )
        return _combined_product(active, weight.transpose(-2, -1), inverse, ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        active, weight, order, inverse, ends = ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        active_gradient = weight_gradient = None
        for experts, rows, own_ends in _expert_chunks(ends, gradient):
            given = _dispatch(gradient, order[rows], inverse)
            if needs_rows:
                active_gradient = _put_product(
                    active_gradient, rows, len(order), given, weight[experts], own_ends
                )
            if needs_weight:
                weight_gradient = _put_weight_gradient(
                    weight_gradient, experts, len(weight), given, active[rows], own_ends
                )
        return active_gradient, weight_gradient, None, None, None


def _expert_chunks(
    ends: torch.Tensor, row: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield neighboring experts, their rows, and the ends of each one's among these: on a CPU as
    many as `_CHUNK_BYTES` allows, on a GPU, which is not waited for, all.

    Args:
        row: [..., H], of which a row is gathered.
    """
    if not _in_chunks(ends):
        yield slice(None), slice(None), ends
        return
    most = _CHUNK_BYTES // (row.shape[-1] * row.element_size())
    bounds, first = [0, *ends.tolist()], 0
    for last in range(1, len(bounds)):
        if last == len(bounds) - 1 or bounds[last + 1] - bounds[first] > most:
            yield (
                slice(first, last),
                slice(bounds[first], bounds[last]),
                ends[first:last] - bounds[first],
            )
            first = last


def _combined_product(
    rows: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Multiply rows [R, in] by their experts' weight [E, in, H] and sum each token's K results ->
    [T, H]; on a CPU some columns at a time, where all would be more than `_RESULT_BYTES`.
    """
    width = weight.shape[-1]
    if not _in_chunks(rows):
        return _combine(grouped_mm(rows, weight, offs=ends), inverse)
    out = rows.new_empty(len(inverse), width)
    parts = max(1, -(-len(rows) * width * weight.element_size() // _RESULT_BYTES))
    for columns in torch.arange(width).tensor_split(parts):
        chosen = slice(int(columns[0]), int(columns[-1]) + 1)
        with borrow((len(rows), len(columns)), rows) as results:
            _put_product(results, slice(None), len(rows), rows, weight[..., chosen], ends)
            out[:, chosen] = _combine(results, inverse)
    return out


def _put_product(
    whole: torch.Tensor | None,
    where: slice,
    total: int,
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Multiply rows [n, in], sorted by expert up to ends [e], by these experts' weight
    [e, in, out], and write them into the whole [total, out], which the first ones allocate.

    On a GPU the rows are all.
    """
    if not _in_chunks(rows):
        return grouped_mm(rows, weight, offs=ends)
    if whole is None:
        whole = rows.new_empty(total, weight.shape[-1])
    out, start = whole[where], 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    return whole


def _put_weight_gradient(
    whole: torch.Tensor | None,
    experts: slice,
    total: int,
    gradient: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Compute the gradient of a grouped product's weight, from the gradient of its results [n, out]
    and its rows [n, in], and write it into the whole [total, out, in], which the first experts
    allocate: zeros for an expert without rows.
    """
    if not _in_chunks(rows):
        found = grouped_mm(gradient.T, rows, offs=ends)
        if leaves_empty_groups(found.device):
            empty = ends.diff(prepend=ends.new_zeros(1)) == 0
            found.masked_fill_(empty[:, None, None], 0)
        return found
    if whole is None:
        whole = rows.new_empty(total, gradient.shape[-1], rows.shape[-1])
    start = 0
    for out, end in zip(whole[experts], ends.tolist(), strict=True):
        torch.mm(gradient[start:end].T, rows[start:end], out=out)
        start = end
    return whole


@functools.cache
def leaves_empty_groups(device: torch.device) -> bool:
    """Return whether the grouped matmul leaves the result of an empty group as it finds it.

    The kernel for Blackwell does (pytorch#172439).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _in_chunks(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu"


def _dispatch(hidden: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Repeat and sort rows: hidden [T, H], order [T*K], inverse [T, K] -> rows [T*K, H]."""
    if kernels.available(hidden):
        return kernels.take_rows(hidden, order, inverse.shape[1])[0]
    return hidden.index_select(0, order // inverse.shape[1])


def _combine(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Sum each token's rows: rows [T*K, H], inverse [T, K] -> [T, H]; deterministic, without a
    reordered copy.
    """
    if kernels.available(rows):
        return kernels.sum_rows(rows, inverse)[0]
    return F.embedding_bag(inverse, rows, mode="sum")

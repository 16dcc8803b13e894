"""The mixture of experts as one sorted grouped matmul, across expert-parallel ranks where there are some.

Shape letters: T tokens, K experts per token, E experts, L = E / ep experts of this rank, R rows that this rank's experts
receive, H hidden size, I expert size, r rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from canvastune.model.lora import ADAPTER
from canvastune.model.memory_efficient import recomputed

NAME = "canvastune"  # of the experts implementation, in transformers' registry


@dataclass
class AllToAllPlan:
    """How many rows an all-to-all brings from where to where, and what of it is under way."""

    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank
    group: dist.ProcessGroup
    work: dist.Work | None = None
    held: tuple[torch.Tensor, torch.Tensor] | None = None  # gradients under way, and where they arrive

    def back(self) -> AllToAllPlan:
        """The way back."""
        return AllToAllPlan(self.receive, self.send, self.group)


@dataclass
class DispatchedTokens:
    """Rows on their way to the ranks of their experts, and what brings the results back."""

    order: torch.Tensor  # int64[T*K]: this rank's rows, by expert
    back: torch.Tensor  # int64[T, K]: where each token's rows are in that order
    received: torch.Tensor  # int64[E]: rows from each rank for each of this rank's experts
    rows: torch.Tensor  # [R, H], by sender and then by expert
    weights: torch.Tensor  # [R, 1]: their routing weights
    routes: tuple[AllToAllPlan, AllToAllPlan]  # of the rows and of the weights

    def arrived(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and weights, once they are here."""
        rows, weights = self.routes
        return _AllToAllWait.apply(self.rows, rows), _AllToAllWait.apply(self.weights, weights)


def is_expert_parallel(module: Any) -> bool:
    """Whether a layer has its experts on several ranks (`parallelize` sets `ep_group`)."""
    group: dist.ProcessGroup | None = getattr(module, "ep_group", None)
    return group is not None and group.size() > 1


def dispatch(module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> DispatchedTokens:
    """Begin to send each token's row, with its weight, to the ranks of its experts; arguments as of `experts_forward`.

    What is computed before `arrived` is called overlaps with the travel, and its backward pass with the travel of the gradients.
    """
    order, back, counts = _sorted_by_expert(module, top_k_index)
    group: dist.ProcessGroup = module.ep_group
    ranks = group.size()
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)  # received[r * L + l]: rows from rank r for my expert l
    send, receive = (numbers.view(ranks, -1).sum(1).tolist() for numbers in (counts, received))
    routes = AllToAllPlan(send, receive, group), AllToAllPlan(send, receive, group)
    rows = _AllToAllStart.apply(_DispatchedRows.apply(hidden, order, back), routes[0])
    weights = _AllToAllStart.apply(top_k_weights.flatten()[order, None], routes[1])
    return DispatchedTokens(order, back, received, rows, weights, routes)


def experts_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, sent: DispatchedTokens | None = None
) -> torch.Tensor:
    """transformers' experts interface: hidden [T, H], index and weights [T, K] -> [T, H].

    Args:
        sent: of experts on several ranks, what was sent before; `hidden` and `top_k_weights` are then what arrived.
    """
    if is_expert_parallel(module):
        if sent is None:
            sent = dispatch(module, hidden, top_k_index, top_k_weights)
            hidden, top_k_weights = sent.arrived()
        return _Combined.apply(_apply_to_dispatched(module, hidden, top_k_weights, sent), sent.order, sent.back)
    order, back, counts = _sorted_by_expert(module, top_k_index)
    weights = top_k_weights.flatten()[order, None]
    if hasattr(module, "lora_A"):
        out = _apply_experts(module, _DispatchedRows.apply(hidden, order, back), weights, counts)
    else:
        ends = _ends(counts)
        out = _gated_product(module, _DispatchedProduct.apply(hidden, _local(module.gate_up_proj), order, back, ends), weights, ends)
    return _Combined.apply(out, order, back)


def _sorted_by_expert(module: Any, top_k_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index [T, K] -> order [T*K] of the rows by expert, its inverse [T, K], and rows of each expert [E]."""
    expert_of_row = top_k_index.flatten()
    order = torch.argsort(expert_of_row, stable=True)
    return order, _inverse(order).view_as(top_k_index), torch.bincount(expert_of_row, minlength=module.num_experts)


def _apply_experts(module: Any, rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """rows [R, H] sorted by expert, their routing weights [R, 1], counts [L] -> [R, H]."""
    ends = _ends(counts)
    return _gated_product(module, _multiply(module, "gate_up_proj", rows, ends), weights, ends)


def _gated_product(module: Any, gate_up: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """gate and up [R, 2I], routing weights [R, 1] -> [R, H]. A row is weighted where it is narrowest: before the last projection."""

    def gated(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (module.act_fn.forward(gate) * up * weights).to(gate_up.dtype)

    return _multiply(module, "down_proj", recomputed(gated, gate_up, weights), ends)


def _ends(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0).to(torch.int32)


def _multiply(module: Any, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [R, in] sorted by expert, ends [L] -> [R, out]: each row by its expert's weight, and by its adapter if it has one."""
    weight = _local(getattr(module, name))
    rows = rows.to(weight.dtype)
    out = grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    if not hasattr(module, "lora_A"):
        return out
    a, b = (_local(getattr(factors[ADAPTER], name)).to(rows.dtype) for factors in (module.lora_A, module.lora_B))
    low = grouped_mm(rows, a.transpose(-2, -1), offs=ends) * module.lora_scale  # [R, r]
    return out.add_(grouped_mm(low, b.transpose(-2, -1), offs=ends))


def _apply_to_dispatched(module: Any, rows: torch.Tensor, weights: torch.Tensor, sent: DispatchedTokens) -> torch.Tensor:
    """Apply this rank's experts to the rows that arrived, and bring the results back in the order of their sending."""
    route = sent.routes[0]
    ranks = route.group.size()
    # Rows arrive by sender and then by expert; the grouped matmul wants them by expert.
    expert = torch.arange(len(sent.received) // ranks, device=rows.device).repeat(ranks).repeat_interleave(sent.received)
    by_expert = torch.argsort(expert, stable=True)
    by_sender = _inverse(by_expert)
    rows, weights = (_PermutedTokens.apply(part, by_expert, by_sender) for part in (rows, weights))
    out = _PermutedTokens.apply(_apply_experts(module, rows, weights, sent.received.view(ranks, -1).sum(0)), by_sender, by_expert)
    return _AllToAll.apply(out, route.back())


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


class _DispatchedRows(torch.autograd.Function):
    """Each token's row K times, in the order of the experts; its gradient is the sum of the K rows, in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return _dispatch(hidden, order, back)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _combine(gradient, *ctx.saved_tensors), None, None


class _DispatchedProduct(torch.autograd.Function):
    """`_Dispatched`, then the grouped matmul with the experts' weight [E, out, H]; of the rows, K to a token, none is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, back: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight, order, back, ends)
        return grouped_mm(_dispatch(hidden, order, back).to(weight.dtype), weight.transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, order, back, ends = ctx.saved_tensors
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = grouped_mm(gradient.T, _dispatch(hidden, order, back).to(weight.dtype), offs=ends)
        if ctx.needs_input_grad[0]:
            hidden_gradient = _combine(grouped_mm(gradient, weight, offs=ends), back)
        return hidden_gradient, weight_gradient, None, None, None


class _Combined(torch.autograd.Function):
    """The sum of each token's K rows, in the tokens' order; its gradient is `_Dispatched`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, back)
        return _combine(rows, back)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _dispatch(gradient, *ctx.saved_tensors), None, None


def _dispatch(hidden: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """hidden [T, H], order [T*K], back [T, K] -> rows [T*K, H] in this order."""
    return hidden.index_select(0, order // back.shape[1])


def _combine(rows: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """rows [T*K, H], back [T, K] -> the sum of each token's rows [T, H]: deterministic, and without the rows in another order."""
    return F.embedding_bag(back, rows, mode="sum")


class _PermutedTokens(torch.autograd.Function):
    """Rows in another order; its gradient is the rows put back, where autograd's own way adds them to zeros one by one."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; its gradient is the all-to-all back. Both are waited for."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, route: AllToAllPlan) -> torch.Tensor:
        ctx.route = route
        return _exchange(rows, route)[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.route.back())[0], None


class _AllToAllStart(torch.autograd.Function):
    """Rows leave for other ranks; `_Arrival` alone reads the result. Its backward pass waits for the gradients that `_Arrival` sent."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, route: AllToAllPlan) -> torch.Tensor:
        ctx.route = route
        out, route.work = _exchange(rows, route, wait=False)
        return out

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        route: AllToAllPlan = ctx.route
        assert route.held is not None, "the gradients never left"
        _wait(route)
        (_, gradient), route.held = route.held, None
        return gradient, None


class _AllToAllWait(torch.autograd.Function):
    """Rows that left are here. Its backward pass sends their gradients off; the gradient it returns is no more than a placeholder."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, route: AllToAllPlan) -> torch.Tensor:
        _wait(route)
        ctx.route = route
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        route: AllToAllPlan = ctx.route
        back, route.work = _exchange(gradient, route.back(), wait=False)
        route.held = gradient, back
        return gradient, None


def _exchange(rows: torch.Tensor, route: AllToAllPlan, *, wait: bool = True) -> tuple[torch.Tensor, dist.Work | None]:
    """Rows by receiver -> rows by sender, there when the work, if there is one, is waited for."""
    out = rows.new_empty(sum(route.receive), *rows.shape[1:])
    return out, dist.all_to_all_single(out, rows.contiguous(), route.receive, route.send, group=route.group, async_op=not wait)


def _wait(route: AllToAllPlan) -> None:
    if route.work is not None:
        route.work.wait()
        route.work = None


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

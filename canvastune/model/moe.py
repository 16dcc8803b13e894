"""The mixture of experts as one sorted grouped matmul, with all-to-all dispatch under expert
parallelism.

Shape letters: T tokens, K experts per token, E experts, L = E / ep experts of this rank, R rows
that this rank's experts receive, H hidden size, I expert size, r rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from canvastune.model import kernels
from canvastune.model.grouped_matmul import (
    CombinedProduct,
    CombinedRows,
    DispatchedProduct,
    DispatchedRows,
    GroupedProduct,
)
from canvastune.model.memory_efficient import recomputed, takes_gate_kernel
from canvastune.model.parameter_names import ADAPTER

NAME = "canvastune"  # the experts implementation in transformers' registry


@dataclass
class AllToAllPlan:
    """How many rows an all-to-all sends and receives, and its pending work."""

    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank
    group: dist.ProcessGroup
    work: dist.Work | None = None
    # Gradients being sent, and their destination.
    pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def reverse(self) -> AllToAllPlan:
        """Return the plan of the opposite direction."""
        return AllToAllPlan(self.receive, self.send, self.group)


@dataclass
class DispatchedTokens:
    """Rows being sent to the ranks of their experts, and what is needed to return the results."""

    order: torch.Tensor  # int64[T*K]: this rank's rows, by expert
    inverse: torch.Tensor  # int64[T, K]: index of each token's rows in that order
    received: torch.Tensor  # int64[E]: rows from each rank for each of this rank's experts
    rows: torch.Tensor  # [R, H], by sender and then by expert
    weights: torch.Tensor  # [R, 1]: their routing weights
    plans: tuple[AllToAllPlan, AllToAllPlan]  # for the rows and for the weights

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the rows and their weights."""
        rows, weights = self.plans
        return _AllToAllWait.apply(self.rows, rows), _AllToAllWait.apply(self.weights, weights)


class _HostCopy:
    """A copy of a small tensor on the host, which the device makes when it gets there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.is_cuda:
            self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> torch.Tensor:
        """Wait for the copy, and return it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy


def is_expert_parallel(module: Any) -> bool:
    """Return whether a layer's experts are on several ranks (`parallelize` sets `ep_group`)."""
    group: dist.ProcessGroup | None = getattr(module, "ep_group", None)
    return group is not None and group.size() > 1


def dispatch(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> DispatchedTokens:
    """Start sending each token's row and weight to the ranks of its experts; arguments as of
    `experts_forward`.

    Work done before `DispatchedTokens.wait` overlaps with the communication, and its backward pass
    with that of the gradients.
    """
    order, inverse, counts = _sort_by_expert(module, top_k_index)
    group: dist.ProcessGroup = module.ep_group
    received = torch.empty_like(counts)
    # received[r * L + l]: rows from rank r for my expert l
    dist.all_to_all_single(received, counts, group=group)
    sizes = _HostCopy(torch.stack([counts, received]))
    rows, weights = _sorted_rows(hidden, top_k_weights, order, inverse)  # while the sizes travel
    send, receive = sizes.wait().view(2, group.size(), -1).sum(2).tolist()
    plans = AllToAllPlan(send, receive, group), AllToAllPlan(send, receive, group)
    rows = _AllToAllStart.apply(rows, plans[0])
    weights = _AllToAllStart.apply(weights, plans[1])
    return DispatchedTokens(order, inverse, received, rows, weights, plans)


def _sorted_rows(
    hidden: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's row and weight for each of its experts, by expert: [T*K, H], [T*K, 1]."""
    if kernels.available(hidden):
        return kernels.dispatch(hidden, weights, order, inverse)
    return DispatchedRows.apply(hidden, order, inverse), weights.flatten()[order, None]


def experts_forward(
    module: Any,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    sent: DispatchedTokens | None = None,
) -> torch.Tensor:
    """Implement transformers' experts interface: hidden [T, H], index and weights [T, K] -> [T, H].

    Args:
        sent: the dispatch started earlier, with experts on several ranks; `hidden` and
            `top_k_weights` are then what was received.
    """
    if is_expert_parallel(module):
        if sent is None:
            sent = dispatch(module, hidden, top_k_index, top_k_weights)
            hidden, top_k_weights = sent.wait()
        return CombinedRows.apply(
            _apply_to_dispatched(module, hidden, top_k_weights, sent), sent.order, sent.inverse
        )
    order, inverse, counts = _sort_by_expert(module, top_k_index)
    ends = _ends(counts)
    if hasattr(module, "lora_A"):
        rows, weights = _sorted_rows(hidden, top_k_weights, order, inverse)
        out = _apply_experts(module, rows, weights, ends)
    else:
        weights = top_k_weights.flatten()[order, None]
        gate_up = DispatchedProduct.apply(
            hidden, local_tensor(module.gate_up_proj), order, inverse, ends
        )
        weight = local_tensor(module.down_proj)
        active = _gated(module, gate_up, weights).to(weight.dtype)
        return CombinedProduct.apply(active, weight, order, inverse, ends)
    return CombinedRows.apply(out, order, inverse)


def _sort_by_expert(
    module: Any, top_k_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by expert: index [T, K] -> order [T*K], its inverse [T, K], rows per expert [E]."""
    if kernels.available(top_k_index):
        return kernels.sort_rows(top_k_index, module.num_experts)
    expert_of_row = top_k_index.flatten()
    order = sorted_order(expert_of_row, module.num_experts, as_bytes=expert_of_row.is_cuda)
    if expert_of_row.device.type == "cpu":
        counts = torch.bincount(expert_of_row, minlength=module.num_experts)
    else:  # where that would wait for the device
        counts = expert_of_row.new_zeros(module.num_experts)
        counts.scatter_add_(0, expert_of_row, torch.ones_like(expert_of_row))
    return order, _inverse(order).view_as(top_k_index), counts


def sorted_order(expert_of_row: torch.Tensor, experts: int, *, as_bytes: bool) -> torch.Tensor:
    """Return the order that sorts rows by expert, stably.

    Args:
        as_bytes: sort bytes, if they can count the experts: a GPU's radix sort takes a pass per
            byte of a key. On a CPU they take longer.
    """
    keys = expert_of_row.to(torch.uint8) if as_bytes and experts <= 256 else expert_of_row
    return torch.argsort(keys, stable=True)


def _apply_experts(
    module: Any, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Apply the experts to rows [R, H] sorted by expert up to ends [L], with routing weights [R, 1]
    -> [R, H].
    """
    active = _gated(module, _multiply(module, "gate_up_proj", rows, ends), weights)
    return _multiply(module, "down_proj", active, ends)


def _gated(module: Any, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gate and weight: gate and up [R, 2I], routing weights [R, 1] -> [R, I].

    A row is weighted before the last projection, where it is narrowest.
    """

    def gated(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (module.act_fn.forward(gate) * up * weights).to(gate_up.dtype)

    if takes_gate_kernel(module.act_fn, gate_up):
        return kernels.gate(gate_up, None, weights)
    return recomputed(gated, gate_up, weights)


def _ends(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0).to(torch.int32)


def _multiply(module: Any, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply rows [R, in], sorted by expert up to ends [L], by their experts' weights and
    adapters -> [R, out].
    """
    weight = local_tensor(getattr(module, name))
    rows = rows.to(weight.dtype)
    out = GroupedProduct.apply(rows, weight, ends)
    if not hasattr(module, "lora_A"):
        return out
    a, b = (
        local_tensor(getattr(factors[ADAPTER], name)).to(rows.dtype)
        for factors in (module.lora_A, module.lora_B)
    )
    low = GroupedProduct.apply(rows, a, ends) * module.lora_scale  # [R, r]
    return out.add_(GroupedProduct.apply(low, b, ends))


def _apply_to_dispatched(
    module: Any, rows: torch.Tensor, weights: torch.Tensor, sent: DispatchedTokens
) -> torch.Tensor:
    """Apply this rank's experts to the rows it received, and return the results in the order they
    were sent.
    """
    plan = sent.plans[0]
    ranks = plan.group.size()
    # Rows arrive ordered by sender and then by expert; the grouped matmul takes them by expert.
    if kernels.available(rows):
        by_expert, by_sender, ends = kernels.sort_segments(sent.received, ranks, len(rows))
        rows, weights = kernels.dispatch(rows, weights, by_expert, by_sender[:, None])
    else:
        experts = len(sent.received) // ranks
        expert = (
            torch.arange(experts, device=rows.device)
            .repeat(ranks)
            .repeat_interleave(sent.received, output_size=len(rows))  # known: no wait
        )
        by_expert = sorted_order(expert, experts, as_bytes=expert.is_cuda)
        by_sender = _inverse(by_expert)
        rows, weights = (
            _PermutedTokens.apply(part, by_expert, by_sender) for part in (rows, weights)
        )
        ends = _ends(sent.received.view(ranks, -1).sum(0))
    out = _PermutedTokens.apply(_apply_experts(module, rows, weights, ends), by_sender, by_expert)
    return _AllToAll.apply(out, plan.reverse())


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


class _PermutedTokens(torch.autograd.Function):
    """Permuted rows; the gradient is permuted back, where autograd would add it to zeros row by
    row.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; the gradient is the reverse all-to-all. Both block."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: AllToAllPlan) -> torch.Tensor:
        ctx.plan = plan
        return _exchange(rows, plan)[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.plan.reverse())[0], None


class _AllToAllStart(torch.autograd.Function):
    """Start an all-to-all whose result only `_AllToAllWait` reads.

    The backward pass waits for the gradients that the backward pass of `_AllToAllWait` sent.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: AllToAllPlan) -> torch.Tensor:
        ctx.plan = plan
        out, plan.work = _exchange(rows, plan, wait=False)
        return out

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan: AllToAllPlan = ctx.plan
        assert plan.pending is not None, "the gradients were never sent"
        _wait(plan)
        (_, gradient), plan.pending = plan.pending, None
        return gradient, None


class _AllToAllWait(torch.autograd.Function):
    """Wait for the rows of an `_AllToAllStart`.

    The backward pass starts sending their gradients; the gradient it returns is only a placeholder.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: AllToAllPlan) -> torch.Tensor:
        _wait(plan)
        ctx.plan = plan
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan: AllToAllPlan = ctx.plan
        received, plan.work = _exchange(gradient, plan.reverse(), wait=False)
        plan.pending = gradient, received
        return gradient, None


def _exchange(
    rows: torch.Tensor, plan: AllToAllPlan, *, wait: bool = True
) -> tuple[torch.Tensor, dist.Work | None]:
    """Exchange rows ordered by receiver for rows ordered by sender, complete once the work, if any,
    is waited for.
    """
    out = rows.new_empty(sum(plan.receive), *rows.shape[1:])
    work = dist.all_to_all_single(
        out, rows.contiguous(), plan.receive, plan.send, group=plan.group, async_op=not wait
    )
    return out, work


def _wait(plan: AllToAllPlan) -> None:
    if plan.work is not None:
        plan.work.wait()
        plan.work = None


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

"""The mixture of experts as one sorted grouped matmul, across expert-parallel ranks where there are some.

Shape letters: T tokens, K experts per token, E experts, L = E / ep experts of this rank, R rows that this rank's experts
receive, H hidden size, I expert size, r rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from canvastune.model.lora import ADAPTER

NAME = "canvastune"  # of the experts implementation, in transformers' registry


def experts_forward(module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface: hidden [T, H], index and weights [T, K] -> [T, H].

    `module.ep_group`, set by `canvastune.parallel`, is the process group over which the experts are spread.
    """
    tokens, top_k = top_k_index.shape
    expert_of_row = top_k_index.flatten()
    order = torch.argsort(expert_of_row, stable=True)
    back = _inverse(order)
    counts = torch.bincount(expert_of_row, minlength=module.num_experts)
    rows = _Dispatched.apply(hidden, order, back, top_k)
    group: dist.ProcessGroup | None = getattr(module, "ep_group", None)
    if group is not None and group.size() > 1:
        out = _apply_remote_experts(module, rows, counts, group)
    else:
        out = _apply_experts(module, rows, counts)
    out = out * top_k_weights.flatten()[order, None]
    # Back to token order, then a sum over each token's K rows: deterministic, unlike an indexed addition on CUDA.
    return _Permuted.apply(out, back, order).view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)


def _apply_experts(module: Any, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """rows [R, H] sorted by expert, counts [L] -> [R, H]."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = _multiply(module, "gate_up_proj", rows, ends).chunk(2, dim=-1)
    return _multiply(module, "down_proj", module.act_fn(gate) * up, ends)


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


def _apply_remote_experts(module: Any, rows: torch.Tensor, counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send each row to the rank of its expert, apply, and bring the result back in the same order."""
    ranks = group.size()
    local = module.num_experts // ranks
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)  # received[r * L + l]: rows from rank r for my expert l
    send = counts.view(ranks, local).sum(1).tolist()
    receive = received.view(ranks, local).sum(1).tolist()
    arrived = _AllToAll.apply(rows, receive, send, group)
    # Rows arrive by sender and then by expert; the grouped matmul wants them by expert.
    expert = torch.arange(local, device=rows.device).repeat(ranks).repeat_interleave(received)
    order = torch.argsort(expert, stable=True)
    back = _inverse(order)
    out = _apply_experts(module, _Permuted.apply(arrived, order, back), received.view(ranks, local).sum(0))
    return _AllToAll.apply(_Permuted.apply(out, back, order), send, receive, group)


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


class _Dispatched(torch.autograd.Function):
    """Each token's row K times, in the order of the experts; its gradient is the sum of the K rows, in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, order: torch.Tensor, back: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.top_k = top_k
        return hidden[order // top_k]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return gradient[back].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


class _Permuted(torch.autograd.Function):
    """Rows in another order; its gradient is the rows put back, where autograd's own way adds them to zeros one by one."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient[back], None, None


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; its gradient is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        out = gradient.new_empty(sum(ctx.send), *gradient.shape[1:])
        dist.all_to_all_single(out, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

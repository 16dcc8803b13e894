"""Parts of a layer in few kernels, for a GPU, where the host's launches bound a step of a small
batch.

The plain forms launch a kernel for every operation that transformers and PEFT write down. These
compute the same in another order of summation, so a CPU keeps the plain ones, whose bits are pinned
by tests.

Shape letters: T tokens, H hidden size, r rank of an adapter, K experts per token, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn

from canvastune.model.lora import CounterBasedDropout
from canvastune.model.parameter_names import ADAPTER


def few_launches(x: torch.Tensor) -> bool:
    """Return whether a tensor's device takes these forms."""
    return x.is_cuda


def project(modules: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Apply linear layers, with their adapters, to one input [..., in] -> [..., out] each.

    The adapters' first factors multiply the input in one product.
    """
    adapted = [isinstance(module, LoraLayer) for module in modules]
    plain = any(adapted) and not all(map(_is_plain_adapter, modules))
    if plain or not few_launches(x):
        return [module(x) for module in modules]
    bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
    if any(base.bias is not None for base in bases):
        return [module(x) for module in modules]
    factors: list[torch.Tensor] = []
    scales: list[float] = []
    if any(adapted):
        adapters: list[Any] = list(modules)
        factors = [module.lora_A[ADAPTER].weight for module in adapters]
        factors += [module.lora_B[ADAPTER].weight for module in adapters]
        scales = [module.scaling[ADAPTER] for module in adapters]
    return list(_Projections.apply(x, scales, *(base.weight for base in bases), *factors))


def _is_plain_adapter(module: Any) -> bool:
    """Return whether a layer adds the product of its two factors, and does nothing else."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return False
    dropout = module.lora_dropout[ADAPTER]
    drops = isinstance(dropout, CounterBasedDropout) and dropout.is_active()
    known = isinstance(dropout, (CounterBasedDropout, nn.Identity))
    same = module.lora_A[ADAPTER].weight.dtype == module.base_layer.weight.dtype
    return list(module.active_adapters) == [ADAPTER] and same and known and not drops


class _Projections(torch.autograd.Function):
    """x W_i^T + scale_i (x A_i^T) B_i^T for each i: input [..., in], W [out, in], A [r, in], B
    [out, r]; without adapters if there are no scales.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scales: list[float], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(weights) // 3 if scales else len(weights)
        bases, first, second = weights[:count], weights[count : 2 * count], weights[2 * count :]
        rows = x.flatten(0, -2)
        outs = [rows @ base.T for base in bases]
        stacked = low = None
        if scales:
            stacked = torch.cat(first) if count > 1 else first[0]
            low = rows @ stacked.T
            parts = low.split([len(factor) for factor in first], dim=1)
            for out, part, factor, scale in zip(outs, parts, second, scales, strict=True):
                out.addmm_(part, factor.T, alpha=scale)
        trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if trained else None, stacked, low, *bases, *second)
        ctx.scales, ctx.count, ctx.shape = scales, count, x.shape
        ctx.ranks = [len(factor) for factor in first]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, stacked, low, *weights = ctx.saved_tensors
        bases, second, count = weights[: ctx.count], weights[ctx.count :], ctx.count
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        gradients = [gradient.flatten(0, -2) for gradient in upstream]
        rows = None if x is None else x.flatten(0, -2)
        found: list[torch.Tensor | None] = [
            gradient.T @ rows if need and rows is not None else None
            for gradient, need in zip(gradients, needs[:count], strict=True)
        ]
        total = None
        if needs_x:
            total = gradients[0] @ bases[0]
            for gradient, base in zip(gradients[1:], bases[1:], strict=True):
                total.addmm_(gradient, base)
        if ctx.scales:
            low_gradient = torch.empty_like(low)
            parts = low_gradient.split(ctx.ranks, dim=1)
            each = list(zip(gradients, second, ctx.scales, strict=True))
            for part, (gradient, factor, scale) in zip(parts, each, strict=True):
                torch.addmm(part, gradient, factor, beta=0, alpha=scale, out=part)
            if total is not None:
                total.addmm_(low_gradient, stacked)
            if any(needs[count:]) and rows is not None:
                found += (low_gradient.T @ rows).split(ctx.ranks)
                for part, (gradient, factor, scale) in zip(
                    low.split(ctx.ranks, dim=1), each, strict=True
                ):
                    into = torch.empty_like(factor)
                    torch.addmm(into, gradient.T, part, beta=0, alpha=scale, out=into)
                    found.append(into)
            else:
                found += [None] * (2 * count)
        return None if total is None else total.view(ctx.shape), None, *found


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings: heads [..., T, heads, D], cos and sin [..., T, 1, D]."""
    return _Rotated.apply(x, cos, sin)


class _Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, with rotate_half(a, b) = (-b, a)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (a, b), (into_a, into_b), (sin_a, sin_b) = (t.chunk(2, dim=-1) for t in (x, out, sin))
        into_a.addcmul_(b, sin_a, value=-1)
        into_b.addcmul_(a, sin_b)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = upstream * cos
        (a, b), (into_a, into_b), (sin_a, sin_b) = (
            t.chunk(2, dim=-1) for t in (upstream, out, sin)
        )
        into_a.addcmul_(b, sin_b)
        into_b.addcmul_(a, sin_a, value=-1)
        return out, None, None


def route(router: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts as the stock router does: [T, H] -> weights float32[T, K], index [T, K].

    The weights, which the stock router normalizes over the chosen experts, are a softmax over their
    scores only.
    """
    scale = router.scale * router.scalar_root_size
    normed = F.rms_norm(tokens, tokens.shape[-1:], scale.to(tokens.dtype), router.eps)
    scores, index = router.proj(normed).topk(router.config.top_k_experts, dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)
    return weights * router.per_expert_scale[index], index

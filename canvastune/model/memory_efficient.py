"""Norms and gated MLPs that keep only their inputs for the backward pass, where autograd keeps
every intermediate.

A norm as transformers writes it keeps four tensors of its input's size, a gated activation three;
both are cheap to recompute.

Shape letters: T tokens, H hidden size, I size of a gated layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUTanh
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaRMSNorm,
    DiffusionGemmaText4MLP,
)

from canvastune.model import fused, kernels

_CHUNK_ELEMENTS = 2**17  # of an input on a CPU, so that a few of its size fit in a core's cache


def make_memory_efficient(model: nn.Module) -> None:
    """Replace every stock norm and gated MLP by its memory-efficient form, in place; weights keep
    their names.
    """
    for module in model.modules():
        for stock, efficient in (
            (DiffusionGemmaRMSNorm, MemoryEfficientNorm),
            (DiffusionGemmaText4MLP, MemoryEfficientMLP),
        ):
            if type(module) is stock:
                module.__class__ = efficient


def recomputed(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return `function(*inputs)`, recomputing its cheap elementwise operations in the backward
    pass.

    On a CPU it is called on chunks of rows, [n, size] of inputs [..., size]. It may call the `forward`
    of a module but not the module: hooks would see tensors outside the graph.
    """
    return _Recomputed.apply(function, *inputs)


def put_chunk(
    whole: torch.Tensor | None, where: slice, chunk: torch.Tensor, total: int
) -> torch.Tensor:
    """Write a chunk [n, ...] into the whole [total, ...], which the first one allocates; a chunk that
    is the whole is returned as it is.
    """
    if len(chunk) == total:
        return chunk
    if whole is None:
        whole = chunk.new_empty(total, *chunk.shape[1:])
    whole[where] = chunk
    return whole


def takes_gate_kernel(activation: nn.Module, gates: torch.Tensor) -> bool:
    """Return whether `kernels.gate` computes a gated layer's activation."""
    return kernels.available(gates) and isinstance(activation, GELUTanh)


class MemoryEfficientNorm(DiffusionGemmaRMSNorm):
    """The stock norm, computed in float32 as there."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize [..., H] -> [..., H]."""
        if fused.few_launches(hidden_states):
            return self.fused(hidden_states)
        return _Norm.apply(hidden_states, self.weight if self.with_scale else None, self.eps)

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize with torch's fused norm, which on CUDA is one kernel each way and keeps as
        little.
        """
        weight = self.weight.to(hidden_states.dtype) if self.with_scale else None
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.eps)


class MemoryEfficientMLP(DiffusionGemmaText4MLP):
    """The stock gated MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP: [..., H] -> [..., H]."""
        (out,) = fused.project((self.down_proj,), self._gated(x))
        return out

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = fused.project((self.gate_proj, self.up_proj), x)
        if takes_gate_kernel(self.act_fn, gate):
            return kernels.gate(gate, up)
        return recomputed(lambda gate, up: self.act_fn.forward(gate) * up, gate, up)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        ctx.function = function
        leading, out = inputs[0].shape[:-1], None
        for rows, parts in _row_chunks(inputs):
            out = put_chunk(out, rows, function(*parts), leading.numel())
        assert out is not None
        return out.view(*leading, -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found: list[torch.Tensor | None] = [None] * len(inputs)
        for rows, (given, *parts) in _row_chunks([upstream, *inputs]):
            gradients = _gradients(ctx.function, parts, ctx.needs_input_grad[1:], given)
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    total = inputs[index].shape[:-1].numel()
                    found[index] = put_chunk(found[index], rows, gradient, total)
        shaped = zip(found, inputs, strict=True)
        return None, *(each if each is None else each.view_as(like) for each, like in shaped)


def _row_chunks(
    tensors: Sequence[torch.Tensor],
) -> Iterator[tuple[slice, Sequence[torch.Tensor]]]:
    """Yield rows of tensors [..., size], and the tensors there, [n, size]."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    rows, device = len(flat[0]), flat[0].device.type
    at_once = max(1, _CHUNK_ELEMENTS // flat[0].shape[-1] if device == "cpu" else rows)
    for start in range(0, max(1, rows), at_once):
        part = slice(start, start + at_once)
        yield part, [tensor[part] for tensor in flat]


def _gradients(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    needed: Sequence[bool],
    upstream: torch.Tensor,
) -> Iterator[torch.Tensor | None]:
    """Compute the function again, and yield the gradient of each input that needs one."""
    leaves = [
        tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)
    ]
    with torch.enable_grad():
        out = function(*leaves)
    found = iter(
        torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], upstream)
    )
    return (next(found) if need else None for need in needed)


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32; keeps x and one
    number per row.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        full = x.float()
        normed = full.square()
        inverse = normed.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        torch.mul(full, inverse, out=normed)
        if weight is not None:
            normed.mul_(weight)
        return normed.to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        normed, gradient, weight_gradient = x.float() * inverse, upstream.float(), None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                weight_gradient = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
            gradient = gradient * weight
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, None
        product = gradient * normed
        share = product.mean(-1, keepdim=True)
        scaled = torch.addcmul(gradient, normed, share, value=-1, out=product)
        return scaled.mul_(inverse).to(x.dtype), weight_gradient, None

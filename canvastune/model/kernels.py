"""A layer's elementwise work on a GPU, in one Triton kernel where plain operators take several.

Each function has the meaning of the plain form that it stands for and its gradients; matrix
products and attention are left to PyTorch. `canvastune.model.triton_kernels` has the kernels.

Shape letters: T tokens, H hidden size, A query heads, G key and value heads, D head size, R rows, I
expert size, E experts, K experts per token, L experts of this rank.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

_PROGRAMS = 264  # that share rows where each adds up a weight's gradient: two per multiprocessor
_SORTED_AT_ONCE = 1024


class _Switch:
    allowed = True  # of the process: backward passes run in threads of autograd's


def allow(allowed: bool) -> None:
    """Use these kernels where they are available, or nowhere in this process."""
    _Switch.allowed = allowed


def available(x: torch.Tensor) -> bool:
    """Return whether these kernels can be launched on a tensor's device."""
    return x.is_cuda and _Switch.allowed and _can_compile()


@functools.cache
def _can_compile() -> bool:
    """Return whether Triton is installed, and what it builds its launcher with: a C compiler and
    Python's headers, where it looks for them.
    """
    chosen = os.environ.get("CC")
    compilers = ("gcc", "clang") if chosen is None else (chosen,)
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as it does
    headers = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    found = any(map(shutil.which, compilers)) and headers.is_file()
    return found and importlib.util.find_spec("triton") is not None


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, unless the grid is empty."""
    if all(grid):
        module = importlib.import_module("canvastune.model.triton_kernels")
        getattr(module, name)[grid](*arguments, **constants)


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _whole_rows(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK": _block(width)}


def _sums(rows: int, weights: int, width: int, like: torch.Tensor, needed: bool) -> torch.Tensor:
    """Return room for each program's part of the weights' gradients, [programs, weights, width]."""
    programs = min(rows, _PROGRAMS) if needed else 0
    return like.new_empty(programs, weights, width, dtype=torch.float32)


def before_experts(
    hidden: torch.Tensor, attended: torch.Tensor, layer: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the normalized attention's result to hidden [..., H]; return the sum and the inputs of the
    dense MLP, the experts and the router, [..., H] each.
    """
    router = layer.router
    return _BeforeExperts.apply(
        hidden,
        attended,
        layer.post_attention_layernorm.weight,
        layer.pre_feedforward_layernorm.weight,
        layer.pre_feedforward_layernorm_2.weight,
        router.scale,
        router.scalar_root_size,
        router.eps,
    )


class _BeforeExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        attended: torch.Tensor,
        after: torch.Tensor,
        dense: torch.Tensor,
        experts: torch.Tensor,
        router: torch.Tensor,
        root: float,
        eps: float,
    ) -> tuple[torch.Tensor, ...]:
        width, rows = hidden.shape[-1], hidden.shape[:-1].numel()
        hidden, attended = hidden.contiguous(), attended.contiguous()
        outs = tuple(torch.empty_like(hidden) for _ in range(4))
        weights = after, dense, experts, router
        launch(
            "before_experts", (rows,), hidden, attended, *weights, *outs, root, eps,
            **_whole_rows(width),
        )  # fmt: skip
        ctx.save_for_backward(attended, outs[0], *weights)
        ctx.root, ctx.eps = root, eps
        return outs

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attended, residual, *weights = ctx.saved_tensors
        width, rows = residual.shape[-1], residual.shape[:-1].numel()
        needed = any(ctx.needs_input_grad[2:5])
        sums = _sums(rows, 3, width, residual, needed)
        hidden, of_attended = torch.empty_like(residual), torch.empty_like(attended)
        given = [gradient.contiguous() for gradient in upstream]
        launch(
            "before_experts_backward", (len(sums) or rows,), attended, residual, *weights, *given,
            hidden, of_attended, sums, rows, ctx.root, ctx.eps, **_whole_rows(width),
            WEIGHTS=needed,
        )  # fmt: skip
        return (hidden, of_attended, *_of_weights(sums, weights[:3], needed), None, None, None)


def _of_weights(
    sums: torch.Tensor, weights: list[torch.Tensor], needed: bool
) -> list[torch.Tensor | None]:
    if not needed:
        return [None] * len(weights)
    total = sums.sum(0).to(weights[0].dtype)
    return list(total.unbind(0))


def after_experts(
    residual: torch.Tensor,
    dense: torch.Tensor,
    routed: torch.Tensor,
    layer: Any,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Normalize the dense MLP's and the experts' results, add them, normalize, add to the residual
    [..., H] and scale, by [1] or [T, 1].
    """
    return _AfterExperts.apply(
        residual,
        dense,
        routed,
        layer.post_feedforward_layernorm_1.weight,
        layer.post_feedforward_layernorm_2.weight,
        layer.post_feedforward_layernorm.weight,
        scale,
        layer.post_feedforward_layernorm.eps,
    )


class _AfterExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        dense: torch.Tensor,
        routed: torch.Tensor,
        dense_weight: torch.Tensor,
        routed_weight: torch.Tensor,
        sum_weight: torch.Tensor,
        scale: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        width, rows = residual.shape[-1], residual.shape[:-1].numel()
        residual, dense, routed = (part.contiguous() for part in (residual, dense, routed))
        out, weights = torch.empty_like(residual), (dense_weight, routed_weight, sum_weight)
        stride = int(scale.numel() > 1)
        launch(
            "after_experts", (rows,), residual, dense, routed, *weights, scale, stride, out, eps,
            **_whole_rows(width),
        )  # fmt: skip
        ctx.save_for_backward(dense, routed, *weights, scale)
        ctx.eps, ctx.stride = eps, stride
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dense, routed, *weights, scale = ctx.saved_tensors
        width, rows = upstream.shape[-1], upstream.shape[:-1].numel()
        needed = any(ctx.needs_input_grad[3:6])
        sums = _sums(rows, 3, width, upstream, needed)
        outs = torch.empty_like(upstream), torch.empty_like(dense), torch.empty_like(routed)
        launch(
            "after_experts_backward", (len(sums) or rows,), dense, routed, *weights, scale,
            ctx.stride, upstream.contiguous(), *outs, sums, rows, ctx.eps, **_whole_rows(width),
            WEIGHTS=needed,
        )  # fmt: skip
        return (*outs, *_of_weights(sums, weights, needed), None, None)


def turn_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention: Any,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize heads and rotate the first two: query [1, T, A, D], key and value [1, T, G, D], cos
    and sin [1, T, D].
    """
    return _TurnedHeads.apply(
        query,
        key,
        value,
        attention.q_norm.weight,
        attention.k_norm.weight,
        cos,
        sin,
        attention.q_norm.eps,
    )


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, ...]:
        heads = [part.contiguous() for part in (query, key, value)]
        outs = tuple(torch.empty_like(part) for part in heads)
        rows, sizes = query.shape[:-2].numel(), _heads(query, key)
        given = (query_weight, key_weight, cos.contiguous(), sin.contiguous())
        launch(
            "turn_heads", (rows, sizes["A"] + 2 * sizes["G"]), *heads, *given, *outs, eps, **sizes
        )
        ctx.save_for_backward(*heads, *given)
        ctx.eps = eps
        return outs

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, query_weight, key_weight, cos, sin = ctx.saved_tensors
        rows, sizes = query.shape[:-2].numel(), _heads(query, key)
        needed = any(ctx.needs_input_grad[3:5])
        rotated = sizes["A"] + sizes["G"]
        programs = min(rows, 16) if needed else rows
        sums = query.new_empty(programs if needed else 0, rotated, sizes["D"], dtype=torch.float32)
        outs = [torch.empty_like(part) for part in (query, key, value)]
        launch(
            "turn_heads_backward", (programs, rotated + sizes["G"]), query, key, value,
            query_weight, key_weight, cos, sin, *(part.contiguous() for part in upstream), *outs,
            sums, rows, ctx.eps, **sizes, WEIGHTS=needed,
        )  # fmt: skip
        weights: list[torch.Tensor | None] = [None, None]
        if needed:
            by_head = sums.split((sizes["A"], sizes["G"]), dim=1)
            weights = [part.sum((0, 1)).to(query_weight.dtype) for part in by_head]
        return (*outs, *weights, None, None, None)


def _heads(query: torch.Tensor, key: torch.Tensor) -> dict[str, int]:
    return {"A": query.shape[-2], "G": key.shape[-2], "D": query.shape[-1]}


def gate(
    gates: torch.Tensor, ups: torch.Tensor | None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return gelu(gates) * ups [..., I], in its tanh form, times the weights of the rows [R, 1].

    Args:
        ups: None: gates hold both, [..., 2I].
    """
    return _Gated.apply(gates, ups, weights)


def _halves(gates: torch.Tensor, ups: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return gates.chunk(2, dim=-1) if ups is None else (gates, ups)  # type: ignore[return-value]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: torch.Tensor, ups: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        gates, ups = gates.contiguous(), ups if ups is None else ups.contiguous()
        first, second = _halves(gates, ups)
        out = gates.new_empty(first.shape)
        launch(
            "gate", (first.shape[:-1].numel(),), first, second,
            gates if weights is None else weights, out, first.stride(-2),
            **_whole_rows(first.shape[-1]), WEIGHTED=weights is not None,
        )  # fmt: skip
        ctx.save_for_backward(gates, ups, weights)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, ups, weights = ctx.saved_tensors
        of_gates = torch.empty_like(gates)
        of_ups = None if ups is None else torch.empty_like(ups)
        of_weights = None if weights is None else torch.empty_like(weights)
        first, second = _halves(gates, ups)
        of_first, of_second = _halves(of_gates, of_ups)
        launch(
            "gate_backward", (first.shape[:-1].numel(),), first, second,
            gates if weights is None else weights, upstream.contiguous(), of_first, of_second,
            gates if of_weights is None else of_weights, first.stride(-2),
            **_whole_rows(first.shape[-1]), WEIGHTED=weights is not None,
        )  # fmt: skip
        return of_gates, of_ups, of_weights


def choose(
    scores: torch.Tensor, count: int, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax over each row's highest scores times the experts' scales, and their
    experts: scores [T, E], scales [E] -> float32[T, K], int64[T, K].
    """
    return _Chosen.apply(scores, count, scales)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, count: int, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, experts = scores.shape
        weights = scores.new_empty(rows, count, dtype=torch.float32)
        index = scores.new_empty(rows, count, dtype=torch.int64)
        ctx.sizes = {"E": experts, "BLOCK": _block(experts), "K": count, "BLOCK_K": _block(count)}
        launch("choose", (rows,), scores.contiguous(), scales, weights, index, **ctx.sizes)
        ctx.save_for_backward(scores.contiguous(), scales, index)
        ctx.mark_non_differentiable(index)
        return weights, index

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        scores, scales, index = ctx.saved_tensors
        gradient = torch.empty_like(scores)
        given = (scores, scales, index, upstream.contiguous(), gradient)
        launch("choose_backward", (len(scores),), *given, **ctx.sizes)
        return gradient, None, None


def sort_rows(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by expert, stably: index int64[T, K] -> order [T*K], its inverse [T, K], rows per
    expert [E].
    """
    order, inverse = index.new_empty(index.numel()), torch.empty_like(index)
    counts = index.new_empty(experts)
    launch(
        "sort_rows", (experts,), index.contiguous(), order, inverse, counts, index.numel(),
        BLOCK=_SORTED_AT_ONCE,
    )  # fmt: skip
    return order, inverse, counts


def sort_segments(
    received: torch.Tensor, ranks: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows that arrived by sender and then by expert: their numbers int64[ranks * L] -> order
    by expert [R], its inverse [R], end of each expert's rows int32[L].
    """
    segments = len(received)
    by_expert, by_sender = received.new_empty(rows), received.new_empty(rows)
    ends = received.new_empty(segments // ranks, dtype=torch.int32)
    launch(
        "sort_segments", (segments,), received, by_expert, by_sender, ends, RANKS=ranks,
        L=segments // ranks, SEGMENTS=_block(segments), BLOCK=128,
    )  # fmt: skip
    return by_expert, by_sender, ends


def dispatch(
    hidden: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's row K times and its weights, by expert: hidden [T, H], weights [T, K] ->
    [T*K, H], [T*K, 1]. With K = 1, both are only permuted.
    """
    return _Dispatched.apply(hidden, weights, order, inverse)


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(inverse)
        return take_rows(hidden, order, inverse.shape[1], weights)

    @staticmethod
    def backward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        if inverse.shape[1] == 1:
            return *take_rows(rows, inverse.flatten(), 1, weights), None, None
        return *sum_rows(rows, inverse, weights), None, None


def take_rows(
    rows: torch.Tensor, index: torch.Tensor, per_row: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows[index // per_row] and the weights [..., 1] of index; without a gradient."""
    width = rows.shape[-1]
    out = rows.new_empty(len(index), width)
    weights_out = out if weights is None else weights.new_empty(len(index), 1)
    launch(
        "take_rows", (len(index),), rows.contiguous(), rows if weights is None else
        weights.contiguous(), index, out, weights_out, per_row, **_whole_rows(width),
        WEIGHTED=weights is not None,
    )  # fmt: skip
    return out, weights_out


def sum_rows(
    rows: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of rows[inverse] over K, [T, H], and weights[inverse] [T, K]; without a
    gradient.
    """
    tokens, count = inverse.shape
    out = rows.new_empty(tokens, rows.shape[-1])
    weights_out = out if weights is None else weights.new_empty(tokens, count)
    launch(
        "sum_rows", (tokens,), rows.contiguous(), rows if weights is None else
        weights.contiguous(), inverse, out, weights_out, PER_ROW=count,
        **_whole_rows(rows.shape[-1]), WEIGHTED=weights is not None,
    )  # fmt: skip
    return out, weights_out

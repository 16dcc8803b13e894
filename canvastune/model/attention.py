"""Attention over a packed batch: clean rows are causal; canvas rows see the prefix, earlier blocks
and their own block.

Each example attends by itself, so nothing is padded, and the keys that a canvas sees are
contiguous, so one by itself needs no mask. Several canvases of one example share calls: see
`attention_calls.canvas_calls`.
`canvastune.model.flex_attention` is the alternative for `train.attention: flex`.

Shape letters: S clean tokens of an example, C tokens of a canvas, N and M their sums over the
batch, K canvases, A query heads, G key and value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from canvastune.data.packing import PackedBatch
from canvastune.model.attention_calls import CanvasCall, aligned, canvas_calls, sliding_calls
from canvastune.model.flex_attention import FlexPacking

NAME = "canvastune"  # the attention implementation in transformers' registry
_FLASH_WIDTH = 256  # the widest head that flash attention takes


@dataclass(frozen=True)
class Packing:
    """Which rows of a packed batch belong together, and which keys they see; built once per batch."""

    clean_lengths: tuple[int, ...]  # S of each example
    calls: dict[str, tuple[CanvasCall, ...]]  # layer type -> calls of the canvases, in their order
    window: int  # positions that a clean row of a sliding layer sees
    row_keys: torch.Tensor | None = None  # int64[N+M]: of the adapters' dropout; None: no dropout
    # What was masked so far, which all layers share: each call adds it to its scores.
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def clean_rows(self) -> int:
        """Number of clean rows, N."""
        return sum(self.clean_lengths)

    @classmethod
    def of(cls, batch: PackedBatch, sliding_window: int) -> Packing:
        """Lay out a batch for layers of type `full_attention` and `sliding_attention`."""
        canvases = tuple(
            zip(batch.canvas_examples, batch.block_starts, batch.canvas_lengths, strict=True)
        )
        return cls(
            clean_lengths=batch.clean_lengths,
            calls={
                "full_attention": canvas_calls(canvases, None),
                "sliding_attention": canvas_calls(canvases, sliding_window),
            },
            window=sliding_window,
            row_keys=batch.row_keys,
        )

    def attend(
        self, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend in a layer of this type: query [1, A, N+M, D], key and value [1, G, N+M, D] -> [1,
        A, N+M, D].
        """
        options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        calls = self.calls[kind]
        lengths = [*self.clean_lengths, *(call.rows for call in calls)]
        queries, keys, values = (rows.split(lengths, dim=2) for rows in (query, key, value))
        examples = len(self.clean_lengths)
        past = [(_Slices(keys[at]), _Slices(values[at])) for at in range(examples)]
        clean = [
            self._attend_clean(kind, queries[at], *past[at], options) for at in range(examples)
        ]
        canvases = [
            self._attend_canvases(
                call,
                queries[at],
                (past[call.example][0], keys[at]),
                (past[call.example][1], values[at]),
                options,
            )
            for at, call in enumerate(calls, examples)
        ]
        parts = [*clean, *(part for call in canvases for part in call.split(1))]
        # Joined by rows, as the kernels leave them and the next projection reads them: one copy.
        return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)

    def _attend_clean(
        self,
        kind: str,
        query: torch.Tensor,
        key: _Slices,
        value: _Slices,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attend over one example's clean rows: causally, and on a sliding layer within its window."""
        length = query.shape[2]
        if kind == "full_attention" or length <= self.window:
            return _attention(query, key.rows, value.rows, is_causal=True, **options)
        parts = []
        calls = list(sliding_calls(length, self.window))
        queries = query.split([own.stop - own.start for own, _ in calls], dim=2)
        for rows, (own, seen) in zip(queries, calls, strict=True):
            # The same few masks for any length: what a row sees depends on its distance from a key.
            shape = (own.stop - own.start, seen.stop - seen.start)
            mask = self._mask(query, shape, lambda: _sliding_causal(*shape, self.window))  # noqa: B023
            parts.append(_attention(rows, key[seen], value[seen], attn_mask=mask, **options))
        return torch.cat(parts, dim=2)

    def _attend_canvases(
        self,
        call: CanvasCall,
        query: torch.Tensor,
        keys: tuple[_Slices, torch.Tensor],
        values: tuple[_Slices, torch.Tensor],
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attend in one call: query [1, A, rows, D], and keys and values of the example's clean rows
        and of the canvases -> [1, A, rows, D], or [canvases, A, C, D] of a batch.
        """
        if not call.is_batch:
            past = slice(call.first, call.stop)
            key, value = (torch.cat([clean[past], own], dim=2) for clean, own in (keys, values))
            mask = self._mask(query, call, lambda: _canvas_mask(call))
            return _attention(query, key, value, attn_mask=mask, **options)

        def batch(rows: torch.Tensor) -> torch.Tensor:
            """[1, heads, canvases * n, D] -> [canvases, heads, n, D], not copied."""
            return rows.unflatten(2, (len(call.canvases), -1))[0].transpose(0, 1)

        def seen(clean: _Slices, own: torch.Tensor) -> torch.Tensor:
            parts = zip(call.canvases, own.chunk(len(call.canvases), dim=2), strict=True)
            both = [(clean[canvas.first : canvas.stop], part) for canvas, part in parts]
            return batch(torch.cat([rows for pair in both for rows in pair], dim=2))

        return _attention(batch(query), seen(*keys), seen(*values), **options)

    def _mask(
        self, query: torch.Tensor, key: Any, seen: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return a mask in the query's dtype, as sdpa would convert it in each layer again."""
        found = self._masks.get((key, query.dtype))
        if found is None:
            found = self._masks[key, query.dtype] = _additive(seen(), query)
        return found


class _Slices:
    """Overlapping slices of rows [1, heads, n, D], whose gradients are added in one buffer.

    Autograd pads the gradient of a slice with zeros to all n rows. With a slice for every half
    window of a long example, that takes more time than a sliding layer's arithmetic, and grows with
    the square of the length.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self._gradient = _SliceGradient()

    def __getitem__(self, seen: slice) -> torch.Tensor:
        return _Slice.apply(self.rows, seen, self._gradient)


@dataclass
class _SliceGradient:
    """The gradient of a tensor from its slices; without the tensor, which a checkpointed layer must
    not keep.
    """

    sum: torch.Tensor | None = None
    pending: int = 0  # slices whose gradient is not in the sum yet


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, seen: slice, gradient: _SliceGradient
    ) -> torch.Tensor:
        gradient.pending += 1
        ctx.shape, ctx.seen, ctx.gradient = rows.shape, seen, gradient
        return rows[:, :, seen]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        gradient: _SliceGradient = ctx.gradient
        if gradient.sum is None:
            gradient.sum = upstream.new_zeros(ctx.shape)
            gradient.sum[:, :, ctx.seen] = upstream
        else:
            gradient.sum[:, :, ctx.seen] += upstream
        gradient.pending -= 1
        if gradient.pending:
            return None, None, None
        total, gradient.sum = gradient.sum, None
        return total, None, None


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing | FlexPacking | None = None,
    write_cache: bool = False,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface: query [1, A, N+M, D], key and value [1, G, N+M,
    D] -> [1, N+M, A, D].

    Without `packing` this is stock SDPA, which `generate()` needs; the encoder's calls
    (`write_cache`) are causal.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=write_cache, **kwargs
        )
    return (
        packing.attend(module.layer_type, query, key, value, module.scaling).transpose(1, 2),
        None,
    )


def _sliding_causal(rows: int, keys: int, window: int) -> torch.Tensor:
    """Return what the last `rows` of `keys` neighboring positions see of them: bool[rows, keys]."""
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)[None]
    return (distance >= 0) & (distance < window)


def _canvas_mask(call: CanvasCall) -> torch.Tensor:
    """Return which of the call's keys each of its rows sees: bool[rows, key_rows]."""
    first, stop = call.first, call.stop
    lengths = torch.tensor([canvas.rows for canvas in call.canvases])
    ranges = torch.tensor([(canvas.first, canvas.stop) for canvas in call.canvases])
    firsts, stops = ranges.repeat_interleave(lengths, dim=0)[:, :, None].unbind(1)
    place, owner = torch.arange(first, stop), torch.arange(len(lengths)).repeat_interleave(lengths)
    past = (place >= firsts) & (place < stops)
    return torch.cat([past, owner[:, None] == owner], dim=1)


def _additive(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return zero where a row sees a key and minus infinity elsewhere, in another tensor's dtype."""
    rows, keys = seen.shape
    mask = like.new_zeros(rows, aligned(keys))[:, :keys]
    return mask.masked_fill_(~seen.to(like.device), -torch.inf)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    enable_gqa: bool,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Call SDPA such that CUDA has a fused kernel: [B, A, Q, D], [B, G, K, D] -> [B, A, Q, D].

    Grouped heads are known to flash only, which takes neither a mask nor wide heads. The efficient
    kernel takes both, with as many heads of keys; SDPA itself would silently compute in float32
    and keep every score.
    """
    if enable_gqa and query.is_cuda and not takes_grouped_heads(query, attn_mask):
        repeats, enable_gqa = query.shape[1] // key.shape[1], False
        key, value = (rows.repeat_interleave(repeats, dim=1) for rows in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def takes_grouped_heads(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether flash attention takes a call on CUDA."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and mask is None and query.shape[-1] <= _FLASH_WIDTH


# By `train.attention`.
PACKINGS: dict[str, type[Packing] | type[FlexPacking]] = {"sdpa": Packing, "flex": FlexPacking}
AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Attention over a packed batch: clean rows are causal; canvas rows see the prefix, earlier blocks
and their own block.

Each example attends by itself, so nothing is padded, and the keys that a canvas sees are
contiguous, so it needs no mask. Canvases of one example that see as many keys attend in one call:
in sliding layers, all but those near the example's beginning.
`canvastune.model.flex_attention` is the alternative for `train.attention: flex`.

Shape letters: S clean tokens of an example, C tokens of a canvas, N and M their sums over the
batch, K canvases, A query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from canvastune.data.packing import PackedBatch
from canvastune.model.flex_attention import FlexPacking

NAME = "canvastune"  # the attention implementation in transformers' registry


@dataclass(frozen=True)
class Packing:
    """Which rows of a packed batch belong together, and which keys they see; built once per batch."""

    clean_lengths: tuple[int, ...]  # S of each example
    canvas_lengths: tuple[int, ...]  # C of each canvas
    canvas_examples: tuple[int, ...]  # the example of each canvas, ascending
    prefix_slices: dict[
        str, tuple[slice, ...]
    ]  # layer type -> clean positions of its example that each canvas sees
    clean_masks: dict[
        str, torch.Tensor | None
    ]  # layer type -> bool[S, S] for the longest example; None: causal
    window: int  # positions that a row of a sliding layer sees, where `clean_masks` has a mask
    row_keys: torch.Tensor | None = (
        None  # int64[N+M]: keys of the adapters' dropout; None: no dropout
    )

    @property
    def clean_rows(self) -> int:
        """Number of clean rows, N."""
        return sum(self.clean_lengths)

    @classmethod
    def of(cls, batch: PackedBatch, sliding_window: int) -> Packing:
        """Lay out a batch for layers of type `full_attention` and `sliding_attention`."""
        # Only what precedes the block, never its own clean tokens. On sliding layers, the last
        # window - 1 positions
        # before the block's start, the same for each of its rows: what block-by-block inference
        # keeps in its cache.
        full = tuple(slice(0, start) for start in batch.block_starts)
        sliding = tuple(
            slice(max(0, start - (sliding_window - 1)), start) for start in batch.block_starts
        )
        mask = _sliding_causal(max(batch.clean_lengths), sliding_window)
        return cls(
            clean_lengths=batch.clean_lengths,
            canvas_lengths=batch.canvas_lengths,
            canvas_examples=batch.canvas_examples,
            prefix_slices={"full_attention": full, "sliding_attention": sliding},
            clean_masks={
                "full_attention": None,
                "sliding_attention": None if mask is None else mask.to(batch.clean.device),
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
        mask, prefixes = self.clean_masks[kind], self.prefix_slices[kind]
        lengths = [*self.clean_lengths, *self.canvas_lengths]
        queries, keys, values = (rows.split(lengths, dim=2) for rows in (query, key, value))
        examples = len(self.clean_lengths)
        clean = [
            _causal(*rows, mask, self.window, options)
            for rows in zip(queries[:examples], keys, values, strict=False)
        ]

        def seen(rows: tuple[torch.Tensor, ...], canvas: int) -> torch.Tensor:
            past = rows[self.canvas_examples[canvas]][:, :, prefixes[canvas]]
            return torch.cat([past, rows[examples + canvas]], dim=2)

        canvases = [
            F.scaled_dot_product_attention(
                _stack([queries[examples + canvas] for canvas in group]),
                _stack([seen(keys, canvas) for canvas in group]),
                _stack([seen(values, canvas) for canvas in group]),
                **options,
            )
            for group in self._groups(prefixes)
        ]
        return torch.cat([*clean, *(rows for group in canvases for rows in group.split(1))], dim=2)

    def _groups(self, prefixes: tuple[slice, ...]) -> list[list[int]]:
        """Return neighboring canvases of one example with as many rows and keys, which attend in
        one call.
        """
        shapes = zip(
            self.canvas_examples,
            self.canvas_lengths,
            (seen.stop - seen.start for seen in prefixes),
            strict=True,
        )
        indexed = itertools.groupby(enumerate(shapes), key=lambda canvas: canvas[1])
        return [[index for index, _ in group] for _, group in indexed]


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


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    window: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend over one example's clean rows: causally, and on a sliding layer of a long example
    within its window.

    The latter takes half a window of rows at a time, with all keys that any of them sees.
    """
    length, size = query.shape[2], sliding_window_rows(window)
    if mask is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    parts = []
    for start, rows in zip(range(0, length, size), query.split(size, dim=2), strict=True):
        stop = start + rows.shape[2]
        seen = slice(max(0, start - window + 1), stop)
        part_mask = mask[start:stop, seen]
        parts.append(
            F.scaled_dot_product_attention(
                rows, key[:, :, seen], value[:, :, seen], attn_mask=part_mask, **options
            )
        )
    return torch.cat(parts, dim=2)


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """Join tensors [1, ...] along their first dimension; a single one is not copied."""
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _sliding_causal(length: int, window: int) -> torch.Tensor | None:
    if length <= window:
        return None
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    return (column <= row) & (column > row - window)


PACKINGS: dict[str, type[Packing] | type[FlexPacking]] = {
    "sdpa": Packing,
    "flex": FlexPacking,
}  # by `train.attention`
AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def sliding_window_rows(window: int) -> int:
    """Return how many rows of a sliding layer attend in one call.

    More rows would see many masked keys, fewer would be many small calls.
    """
    return -(-window // 2)

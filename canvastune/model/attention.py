"""Attention over a packed batch: each clean row sees its past, each canvas row its prefix, earlier blocks and its own block.

Shape letters: B examples, S and C the longest clean and canvas length in the batch, N and M their sums over the batch,
A query heads, G key and value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from canvastune.data.batches import PackedBatch

NAME = "canvastune"  # of the attention implementation, in transformers' registry


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch stand in a padded one, and what a canvas row may see; made once per batch."""

    clean_rows: int  # N
    batch: int  # B
    longest_clean: int  # S
    longest_canvas: int  # C
    clean_gather: torch.Tensor | None  # int64[B*S]: row of the batch behind each padded slot; None: already rectangular
    clean_scatter: torch.Tensor | None  # int64[N]: padded slot behind each row
    canvas_gather: torch.Tensor | None  # int64[B*C]
    canvas_scatter: torch.Tensor | None  # int64[M]
    canvas_sees: dict[str, torch.Tensor]  # layer type -> bool[B, 1, 1, S+C]: keys visible to every row of the example's canvas
    clean_sees: dict[str, torch.Tensor | None]  # layer type -> bool[S, S], or None: plain causal
    row_keys: torch.Tensor | None = None  # int64[N+M]: by which adapters drop their inputs; None: they drop nothing

    @classmethod
    def of(cls, batch: PackedBatch, sliding_window: int) -> Packing:
        """Lay out a batch for layers of type `full_attention` and `sliding_attention`."""
        device = batch.clean.device
        clean_lengths, canvas_lengths = torch.tensor(batch.clean_lengths), torch.tensor(batch.canvas_lengths)
        longest_clean, longest_canvas = max(batch.clean_lengths), max(batch.canvas_lengths)
        clean_gather, clean_scatter = _layout(clean_lengths, longest_clean)
        canvas_gather, canvas_scatter = _layout(canvas_lengths, longest_canvas)
        start = torch.tensor(batch.block_starts)[:, None]
        key = torch.arange(longest_clean)[None]
        own = torch.arange(longest_canvas)[None] < canvas_lengths[:, None]
        # The block's past alone, never its own clean tokens. On sliding layers, the last window - 1 positions before the
        # block's start, the same for each of its rows: what block-by-block inference keeps in its cache.
        full = torch.cat([key < start, own], dim=1)
        sliding = torch.cat([(key < start) & (key >= start - (sliding_window - 1)), own], dim=1)
        return cls(
            clean_rows=len(batch.clean),
            batch=len(batch.clean_lengths),
            longest_clean=longest_clean,
            longest_canvas=longest_canvas,
            clean_gather=_on(clean_gather, device),
            clean_scatter=_on(clean_scatter, device),
            canvas_gather=_on(canvas_gather, device),
            canvas_scatter=_on(canvas_scatter, device),
            canvas_sees={"full_attention": full[:, None, None].to(device), "sliding_attention": sliding[:, None, None].to(device)},
            clean_sees={"full_attention": None, "sliding_attention": _on(_sliding_causal(longest_clean, sliding_window), device)},
            row_keys=batch.row_keys,
        )


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    write_cache: bool = False,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, A, N+M, D], key and value [1, G, N+M, D] -> [1, N+M, A, D].

    Without `packing` this is stock SDPA, as `generate()` needs it; the encoder's calls (`write_cache`) are causal.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=write_cache, **kwargs)
    layer_type = module.layer_type
    groups = query.shape[1] // key.shape[1]
    rows = packing.clean_rows
    clean_query, canvas_query = query[0, :, :rows], query[0, :, rows:]
    clean_key, canvas_key = key[0, :, :rows], key[0, :, rows:]
    clean_value, canvas_value = value[0, :, :rows], value[0, :, rows:]

    padded = packing.batch, packing.longest_clean, packing.clean_gather
    keys, values = _pad(clean_key, *padded), _pad(clean_value, *padded)
    mask = packing.clean_sees[layer_type]
    clean = F.scaled_dot_product_attention(
        _pad(clean_query, *padded),
        _repeat(keys, groups),
        _repeat(values, groups),
        attn_mask=mask,
        is_causal=mask is None,
        scale=module.scaling,
    )
    padded = packing.batch, packing.longest_canvas, packing.canvas_gather
    canvas = F.scaled_dot_product_attention(
        _pad(canvas_query, *padded),
        _repeat(torch.cat([keys, _pad(canvas_key, *padded)], dim=2), groups),
        _repeat(torch.cat([values, _pad(canvas_value, *padded)], dim=2), groups),
        attn_mask=packing.canvas_sees[layer_type],
        scale=module.scaling,
    )
    return torch.cat([_unpad(clean, packing.clean_scatter), _unpad(canvas, packing.canvas_scatter)])[None], None


def _pad(rows: torch.Tensor, batch: int, longest: int, gather: torch.Tensor | None) -> torch.Tensor:
    """[heads, rows, D] -> [B, heads, longest, D]. A slot past an example's end repeats a row that nothing attends."""
    if gather is not None:
        rows = rows.index_select(1, gather)
    return rows.unflatten(1, (batch, longest)).transpose(0, 1)


def _unpad(padded: torch.Tensor, scatter: torch.Tensor | None) -> torch.Tensor:
    """[B, heads, longest, D] -> [rows, heads, D]."""
    rows = padded.transpose(1, 2).flatten(0, 1)
    return rows if scatter is None else rows.index_select(0, scatter)


def _repeat(heads: torch.Tensor, groups: int) -> torch.Tensor:
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _layout(lengths: torch.Tensor, longest: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if bool((lengths == longest).all()):
        return None, None
    starts = lengths.cumsum(0) - lengths
    slot = torch.arange(longest)[None]
    inside = slot < lengths[:, None]
    gather = torch.where(inside, starts[:, None] + slot, starts[:, None]).flatten()
    return gather, inside.flatten().nonzero().flatten()


def _sliding_causal(length: int, window: int) -> torch.Tensor | None:
    if length <= window:
        return None
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    return (column <= row) & (column > row - window)


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""FlexAttention over a packed batch: one call per layer, where `canvastune.model.attention` makes
two or more per example.

A row sees the same keys, as a mask: each row sees one range of the clean rows, and a canvas row
also sees its own canvas.

Shape letters: N and M clean and canvas rows of a packed batch, L = N + M, T tiles of `TILE` rows, A
query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from canvastune.data.packing import PackedBatch

TILE = 128  # rows and keys that the kernel computes or skips together
_COUNTED = 8 * TILE  # rows whose visible tiles are counted at a time
# Batches differ in length, so `dynamic` compiles once for all of them. Few things remain to
# recompile for: two kinds of layer, with and without gradients, more than a tile of rows or not.
# Past the limit it raises an error; without `fullgraph` it would silently fall back to the slow
# unfused path.
COMPILATION: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": 32}
# head size above which three stages of keys and values, the default, may exceed a GPU's shared
# memory
_WIDE = 256


@dataclass(frozen=True)
class FlexPacking:
    """Which rows of a packed batch each row sees, as a mask per layer type; built once per batch."""

    clean_rows: int  # N
    masks: dict[str, BlockMask]  # layer type -> [1, 1, L, L]
    row_keys: torch.Tensor | None = None  # int64[N+M]: of the adapters' dropout; None: no dropout

    @classmethod
    def of(cls, batch: PackedBatch, sliding_window: int) -> FlexPacking:
        """Lay out a batch for layers of type `full_attention` and `sliding_attention`."""
        clean, canvas = torch.tensor(batch.clean_lengths), torch.tensor(batch.canvas_lengths)
        rows = int(clean.sum())
        starts = clean.cumsum(0) - clean  # first clean row of each example
        canvas_starts = starts[torch.tensor(batch.canvas_examples)]  # of each canvas's example
        own = (rows + canvas.cumsum(0) - canvas).repeat_interleave(canvas)
        none = torch.zeros(rows, dtype=torch.int64)
        # A clean row sees its example's rows up to and including itself, a canvas row those before
        # its block. On sliding layers these are the last `window` rows and the last window - 1
        # rows: what block-by-block inference caches.
        stop = torch.cat(
            [
                torch.arange(rows) + 1,
                (canvas_starts + torch.tensor(batch.block_starts)).repeat_interleave(canvas),
            ]
        )
        first = torch.cat(
            [starts.repeat_interleave(clean), canvas_starts.repeat_interleave(canvas)]
        )
        window = torch.full_like(stop, sliding_window)
        window[rows:] -= 1
        canvases = torch.cat([none, own]), torch.cat([none, own + canvas.repeat_interleave(canvas)])

        def mask(first: torch.Tensor) -> BlockMask:
            return _block_mask(
                *(edge.to(batch.clean.device, torch.int32) for edge in (first, stop, *canvases))
            )

        masks = {
            "full_attention": mask(first),
            "sliding_attention": mask(torch.maximum(first, stop - window)),
        }
        return cls(rows, masks, batch.row_keys)

    def attend(
        self, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend in a layer of this type: query [1, A, L, D], key and value [1, G, L, D] -> [1, A,
        L, D].
        """
        attention = _compiled() if query.is_cuda else flex_attention
        options: Any = kernel_options(query.shape[-1])
        gqa = query.shape[1] != key.shape[1]
        return attention(
            query,
            key,
            value,
            block_mask=self.masks[kind],
            scale=scale,
            enable_gqa=gqa,
            kernel_options=options,
        )


def kernel_options(width: int) -> dict[str, int] | None:
    """Return how the kernel differs from the default for a head size."""
    return {"fwd_num_stages": 2} if width > _WIDE else None


@functools.cache
def _compiled() -> Any:
    """Return the compiled kernel. Even without a call, making it imports for half a second."""
    return torch.compile(flex_attention, **COMPILATION)


def _block_mask(
    first: torch.Tensor, stop: torch.Tensor, own_first: torch.Tensor, own_stop: torch.Tensor
) -> BlockMask:
    """Build the mask in which row q sees rows first[q]:stop[q] and own_first[q]:own_stop[q]
    (int32[L] each, disjoint).

    The result equals that of `create_block_mask`, from L * T numbers; that function materializes
    all L * L of the mask.
    """
    rows = len(first)
    tiles = -(-rows // TILE)
    edges = torch.arange(tiles, device=first.device, dtype=torch.int32) * TILE

    def seen(first: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Count the rows of each tile in a range -> [R, T] for R rows."""
        return (
            torch.minimum(stop[:, None], edges + TILE) - torch.maximum(first[:, None], edges)
        ).clamp_(min=0)

    # A range of rows at a time: of all of them, the counts would take as much as attention scores.
    pairs = torch.cat(
        [
            F.pad(seen(*ends[:2]) + seen(*ends[2:]), (0, 0, 0, -len(ends[0]) % TILE))
            .view(-1, TILE, tiles)
            .sum(1)
            for ends in zip(
                *(edge.split(_COUNTED) for edge in (first, stop, own_first, own_stop)), strict=True
            )
        ]
    )
    whole = pairs == TILE * TILE

    def ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Order chosen tiles first: bool[T, T] -> their counts int32[1, 1, T] and indices int32[1,
        1, T, T].
        """
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    def sees(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return ((key >= first[row]) & (key < stop[row])) | (
            (key >= own_first[row]) & (key < own_stop[row])
        )

    return BlockMask.from_kv_blocks(
        *ordered((pairs > 0) & ~whole),
        *ordered(whole),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(rows, rows),
    )

"""How rows of the sampler attend: several questions share a pass, each over its own tokens.

Shape letters: n rows (questions that are answered at once), C canvas, S tokens of a part, N those of
all parts, A and G heads of queries and of keys, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

_ATTENTION = "canvastune_rows"  # in transformers' registry
_ROOM = 64  # tokens by which caches grow


class RowCaches:
    """Keys and values of the tokens before each row's canvas, by layer and by the row's place.

    As many as the layer's window shows are kept. Those of one place end where those of all others do,
    and room for the canvas' own follows: so one call attends for all rows.
    """

    def __init__(self, canvas_length: int) -> None:
        self.canvas_length = canvas_length
        self._layers: dict[int, torch.Tensor] = {}  # [2, places, G, room + C, D]

    def known(self, layer: int, place: int, seen: int) -> torch.Tensor:
        """Return the last `seen` keys and values of a place, [2, 1, G, seen, D]."""
        end = self._layers[layer].shape[3] - self.canvas_length
        return self._layers[layer][:, place : place + 1, :, end - seen : end]

    def keep(self, layer: int, place: int, places: int, pairs: torch.Tensor) -> None:
        """Keep all that a place shows, [2, 1, G, seen, D].

        Args:
            places: that are taken.
        """
        seen = pairs.shape[3]
        found = self._layers.get(layer)
        have, room = (0, 0) if found is None else (found.shape[1], self._room(layer))
        if places > have or seen > room:
            more = max(places, have), max(-(-seen // _ROOM) * _ROOM, room)
            size = (2, more[0], pairs.shape[2], more[1] + self.canvas_length, pairs.shape[4])
            larger = pairs.new_zeros(size)
            if found is not None:
                larger[:, :have, :, more[1] - room :] = found
            self._layers[layer] = found = larger
        assert found is not None
        end = self._room(layer)
        # of an earlier row; masked, but not if it is no number
        found[:, place, :, : end - seen] = 0
        found[:, place, :, end - seen : end] = pairs[:, 0]

    def with_canvases(
        self, layer: int, seen: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put in the canvases' own, [n, G, C, D]; return all with the last `seen` before them,
        [n, G, seen + C, D].
        """
        pairs = self._layers[layer][:, : len(key)]
        end = self._room(layer)
        pairs[0, :, :, end:], pairs[1, :, :, end:] = key, value
        return pairs[0, :, :, end - seen :], pairs[1, :, :, end - seen :]

    def move(self, place: int, to: int) -> None:
        """Move a row to another place."""
        for pairs in self._layers.values():
            pairs[:, to] = pairs[:, place]

    def _room(self, layer: int) -> int:
        return self._layers[layer].shape[3] - self.canvas_length


@dataclass(frozen=True)
class EncodedTokens:
    """Pending tokens of one row attend causally to those before them, and are kept."""

    caches: RowCaches
    places: int
    place: int
    start: int  # tokens before them
    end: int

    @property
    def length(self) -> int:
        """Tokens of the part, S."""
        return self.end - self.start

    def attend(self, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Attend in a layer: query [1, A, S, D], key and value [1, G, S, D] -> [1, A, S, D]."""
        query, *own = tensors
        layer, window = module.layer_idx, module.sliding_window
        pairs = torch.stack(own)
        if self.start:
            known = self.caches.known(layer, self.place, seen_tokens(self.start, window))
            pairs = torch.cat([known, pairs], dim=3)
        seen = seen_tokens(self.end, window)
        self.caches.keep(layer, self.place, self.places, pairs[:, :, :, pairs.shape[3] - seen :])
        return _causal(query, pairs[0], pairs[1], window, module.scaling)


@dataclass(frozen=True)
class Canvases:
    """Each row's canvas attends to what is kept of the tokens before it, and to all of itself."""

    caches: RowCaches
    lengths: Sequence[int]  # tokens before each
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)  # by window

    @property
    def length(self) -> int:
        """Tokens of the part, S."""
        return len(self.lengths) * self.caches.canvas_length

    def attend(self, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Attend in a layer: query [1, A, S, D], key and value [1, G, S, D] -> [1, A, S, D]."""
        rows, window = len(self.lengths), module.sliding_window
        # [n, heads, C, D]
        query, key, value = (each[0].unflatten(1, (rows, -1)).transpose(0, 1) for each in tensors)
        seen = [seen_tokens(length, window) for length in self.lengths]
        keys, values = self.caches.with_canvases(module.layer_idx, max(seen), key, value)
        if window not in self.masks:
            self.masks[window] = self._mask(seen, query.device)
        # A canvas' tokens see the same keys, so heads that share keys are like more tokens.
        shared = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        found = F.scaled_dot_product_attention(
            shared, keys, values, attn_mask=self.masks[window], scale=module.scaling
        )
        found = found.unflatten(2, (-1, self.caches.canvas_length)).flatten(1, 2)
        return found.transpose(0, 1).flatten(1, 2)[None]

    def _mask(self, seen: Sequence[int], device: torch.device) -> torch.Tensor | None:
        """Return which keys are a row's own, bool[n, 1, 1, seen + C]; None: all are."""
        most = max(seen)
        if min(seen) == most:
            return None
        places = torch.arange(most + self.caches.canvas_length)
        first = most - torch.tensor(seen)
        return (places >= first[:, None])[:, None, None].to(device)


Part = EncodedTokens | Canvases  # tokens of a pass that attend in one way


def seen_tokens(length: int, window: int | None) -> int:
    """Return how many tokens before a block a layer shows."""
    return length if window is None else min(length, window - 1)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    """Attend causally from the last rows of the keys, on a sliding layer within its window.

    There half a window of rows attends at a time, with all keys that any of them sees.
    """
    rows, before = query.shape[2], key.shape[2] - query.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if not before and (window is None or rows <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    parts, start = [], before
    for part in query.split(rows if window is None else -(-window // 2), dim=2):
        end = start + part.shape[2]
        first = 0 if window is None else max(0, start - window + 1)
        at = torch.arange(start, end, device=query.device)[:, None]
        seen = torch.arange(first, end, device=query.device)[None]
        mask = seen <= at if window is None else (seen <= at) & (seen > at - window)
        keys, values = (each[:, :, first:end] for each in (key, value))
        parts.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, **options))
        start = end
    return torch.cat(parts, dim=2)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    parts: Sequence[Part],
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface, [1, heads, N, D] -> [1, N, A, D]."""
    lengths = [part.length for part in parts]
    split = [rows.split(lengths, dim=2) for rows in (query, key, value)]
    out = [part.attend(module, *each) for part, *each in zip(parts, *split, strict=True)]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


@contextlib.contextmanager
def attention_by_rows(model: Any) -> Iterator[None]:
    """Let the model's layers attend as `_attend` does."""
    config = model.config.text_config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before

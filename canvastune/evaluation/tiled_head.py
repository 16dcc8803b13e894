"""What a denoising step needs of each token's logits, which exist one tile of the vocabulary at a
time, as scores do in flash attention.

Softmax, entropy, the sampled token and the soft embedding of self-conditioning are accumulated over
the tiles. Shape letters: N tokens, H hidden, V vocabulary, W tile of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from canvastune.logit_chunks import CHOOSING_TOKENS, SAMPLER_TOKENS

# Nats below the highest logit. All tokens of a vocabulary that are so far below it have a probability
# of 1e-12 together: sums in float32 are the same without them.
_NEGLIGIBLE = 40.0
# Nats below the highest logit to which lower ones are raised, which changes no sum in float32. A CPU
# takes 100 times as long, or longer, for exponentials that underflow: see
# findings/torch_exp_is_slow_where_it_underflows.sh.
_LEAST, _LEAST_DOUBLE = -80.0, -700.0
_MOST = 0.7  # of the tokens of a tile


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of each token's distribution after all tiles."""

    entropy: torch.Tensor  # float32[N]
    likeliest: torch.Tensor  # int64[N]
    chosen: torch.Tensor  # int64[N]
    soft: torch.Tensor  # [N, H]: the expected embedding


class TiledHead:
    """The head of a stock model, and the embedding of what it expects."""

    def __init__(self, model: Any, width: int) -> None:
        """
        Args:
            width: columns of the vocabulary that are computed at once.
        """
        self.head: torch.Tensor = model.lm_head.weight  # [V, H]
        self.embedding = model.model.decoder.embed_tokens
        self.cap = float(model.final_logit_softcapping)
        self.tiles = list(torch.arange(self.head.shape[0]).split(width))

    def statistics(
        self,
        hidden: torch.Tensor,
        temperatures: torch.Tensor,
        uniforms: torch.Tensor,
        *,
        want_soft: bool,
    ) -> TokenStatistics:
        """Return what a step needs of each token's logits, hidden [N, H], without storing them."""
        parts = [
            self._tiled(*each, want_soft=want_soft)
            for each in zip(
                *(given.split(SAMPLER_TOKENS) for given in (hidden, temperatures, uniforms)),
                strict=True,
            )
        ]
        names = [each.name for each in dataclasses.fields(TokenStatistics)]
        return TokenStatistics(
            *(torch.cat([getattr(part, name) for part in parts]) for name in names)
        )

    def _tiled(
        self,
        hidden: torch.Tensor,
        temperatures: torch.Tensor,
        uniforms: torch.Tensor,
        *,
        want_soft: bool,
    ) -> TokenStatistics:
        head, table = self.head, self.embedding.weight
        scale = self.cap / temperatures[:, None]
        sums = TileSums(hidden, self.tiles, table.dtype, want_soft=want_soft)
        best = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        for index, tile in enumerate(self.tiles):
            columns = slice(int(tile[0]), int(tile[-1]) + 1)
            raw = (hidden @ head[columns].T).float()
            highest = self._cap(raw.amax(1, keepdim=True), scale)[:, 0]
            best = torch.where(highest > sums.peak, index, best)
            rows = _to_count(highest, sums.peak)
            if rows is not None:
                logits = self._cap(raw[rows], scale[rows])
                sums.add(index, rows, logits, highest[rows], table[columns])
            sums.peaks[:, index] = sums.peak
        if len(self.tiles) == 1:  # its logits are still there
            likeliest = sums.likeliest
            chosen = _place(sums.weights, uniforms * sums.weights.sum(1, dtype=torch.float64))
        else:
            likeliest, chosen = self._find(hidden, scale, sums.mass, sums.peak, best, uniforms)
        soft = sums.soft
        if want_soft:
            soft = (soft / sums.soft_total[:, None]).to(table.dtype)
            soft = soft * self.embedding.embed_scale.to(table.dtype)
        return TokenStatistics(sums.entropy, likeliest, chosen, soft)

    def _cap(self, logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Cap logits in place, and divide them by their temperatures. It keeps their order."""
        return logits.div_(self.cap).tanh_().mul_(scale)

    def _find(
        self,
        hidden: torch.Tensor,
        scale: torch.Tensor,
        mass: torch.Tensor,
        peak: torch.Tensor,
        best: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest tokens, and those at the uniforms' places in the cumulative
        probability, int64[N].

        Their tiles come from the largest logits and from the sums. The logits of these tiles are
        computed again, for the tokens that need them.

        Args:
            mass: the tiles' sums, float64[N, tiles].
            best: the tiles of the largest logits, int64[N].
        """
        cumulated = mass.cumsum(1)
        target = uniforms * cumulated[:, -1]
        tile = (cumulated <= target[:, None]).sum(1).clamp_(max=len(self.tiles) - 1)
        rest = target - (cumulated - mass).gather(1, tile[:, None])[:, 0]
        likeliest, chosen = torch.empty_like(tile), torch.empty_like(tile)
        for index in torch.cat([tile, best]).unique().tolist():
            first, last = int(self.tiles[index][0]), int(self.tiles[index][-1])
            head = self.head[first : last + 1]
            wanted = ((tile == index) | (best == index)).nonzero()[:, 0]
            for which in wanted.split(CHOOSING_TOKENS):
                logits = self._cap((hidden[which] @ head.T).float(), scale[which])
                of_best, of_tile = best[which] == index, tile[which] == index
                likeliest[which[of_best]] = logits.argmax(1)[of_best] + first
                those = which[of_tile]
                weights = logits[of_tile].sub_(peak[those, None]).clamp_(min=_LEAST).exp_()
                chosen[those] = first + _place(weights, rest[those])
        return likeliest, chosen


def _place(weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return where the cumulative weights [N, W] exceed the targets, float64[N] -> int64[N]."""
    parts = zip(weights.split(CHOOSING_TOKENS), target.split(CHOOSING_TOKENS), strict=True)
    found = [
        torch.searchsorted(part.double().cumsum_(1), limit[:, None], right=True)
        for part, limit in parts
    ]
    return torch.cat(found)[:, 0].clamp_(max=weights.shape[1] - 1)


class TileSums:
    """What the tiles so far have added up to, of the distributions of N tokens."""

    def __init__(
        self,
        hidden: torch.Tensor,
        tiles: Sequence[torch.Tensor],
        dtype: torch.dtype,
        *,
        want_soft: bool,
    ) -> None:
        """
        Args:
            hidden: [N, H].
            dtype: of the weights: the next step of stock sees logits in it.
        """
        self.dtype, self.want_soft = dtype, want_soft
        tokens = len(hidden)
        self.peak = hidden.new_full((tokens,), -torch.inf, dtype=torch.float32)  # largest logit
        self.total = torch.zeros_like(self.peak)  # of exp(logit - peak)
        self.slope = torch.zeros_like(self.peak)  # of that times (logit - peak)
        rounds = want_soft and dtype != torch.float32
        self.soft_total = torch.zeros_like(self.peak) if rounds else self.total
        size = hidden.shape if want_soft else (tokens, 0)
        self.soft = hidden.new_zeros(size, dtype=torch.float32)  # expected embedding x total
        # The total, with the peak of the time.
        self.of_tile = self.peak.new_zeros(tokens, len(tiles))
        self.peaks = torch.empty_like(self.of_tile)
        self.likeliest, self.weights = torch.empty(0), torch.empty(0)  # of the last tile
        self._buffer = self.peak.new_empty(tokens * len(tiles[0]))

    def add(
        self,
        index: int,
        rows: torch.Tensor | slice,
        logits: torch.Tensor,
        highest: torch.Tensor,
        table: torch.Tensor,
    ) -> None:
        """Add a tile.

        Args:
            rows: the tokens for which it counts.
            logits: of these tokens, over their temperatures, float32[n, W]; it is overwritten.
            highest: the largest of each token.
            table: embeddings of the tile's tokens, [W, H].
        """
        before = self.peak[rows]
        peak = torch.maximum(before, highest)
        change = torch.nan_to_num(before - peak, neginf=0.0)  # the first tile adds to nothing
        shrink = change.exp()
        soft_weights: torch.Tensor | None = None
        if self.soft_total is not self.total:
            soft_weights = logits.to(self.dtype).float().sub_(peak[:, None])
            soft_weights.clamp_(min=_LEAST).exp_()
            self.soft_total[rows] = self.soft_total[rows] * shrink + soft_weights.sum(1)
        if self.of_tile.shape[1] == 1:
            self.likeliest = logits.argmax(1)
        logits.sub_(peak[:, None]).clamp_(min=_LEAST)
        self.weights = torch.exp(logits, out=self._buffer[: logits.numel()].view_as(logits))
        here = self.weights.sum(1)
        self.slope[rows] = shrink * (self.slope[rows] + change * self.total[rows])
        self.slope[rows] += logits.mul_(self.weights).sum(1)
        self.total[rows] = self.total[rows] * shrink + here
        if self.want_soft:
            weights = self.weights if soft_weights is None else soft_weights
            self.soft[rows] = self.soft[rows] * shrink[:, None] + weights.to(self.dtype) @ table
        self.of_tile[rows, index], self.peak[rows] = here, peak

    @property
    def entropy(self) -> torch.Tensor:
        """Entropies, float32[N]."""
        return self.total.log() - self.slope / self.total

    @property
    def mass(self) -> torch.Tensor:
        """The tiles' parts of the total, float64[N, tiles]."""
        lower = (self.peaks - self.peak[:, None]).double().clamp_(min=_LEAST_DOUBLE)
        return self.of_tile.double() * lower.exp_()


def _to_count(highest: torch.Tensor, peak: torch.Tensor) -> torch.Tensor | slice | None:
    """Return the tokens of whose distribution a tile may have more than a negligible part, by its
    highest logits and the highest of the tiles before; None: no token.
    """
    counted = ~(highest < peak - _NEGLIGIBLE)  # also where a logit is not a number
    count = int(counted.sum())
    if count > _MOST * len(counted):  # to copy the rest costs more
        return slice(None)
    return counted.nonzero()[:, 0] if count else None

"""Answer questions with a stock DiffusionGemma, equal to its `generate()` for the same noise.

Four things differ from `generate()`, none of them in the answers. As soon as an answer ends, the
next question takes its place. Prompts of several lengths share a pass without padding:
each row attends by itself. Encoder and decoder have the same weights, so one pass through the layers
encodes what new rows and blocks begin with and denoises all canvases, also those that see it. And
logits exist one tile of the vocabulary at a time, as scores do in flash attention: softmax, entropy,
the sampled token and the soft embedding of self-conditioning are accumulated over the tiles.

Shape letters: n rows (questions that are answered at once), C canvas, N = n C tokens, S prompt, H
hidden, V vocabulary, W tile of the vocabulary, A and G heads of queries and of keys, D head size.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.logit_chunks import (
    CHOOSING_TOKENS,
    ENCODED_TOKENS,
    SAMPLER_TOKENS,
    sampler_columns,
)
from canvastune.noise import answer_canvas, answer_uniforms

_ATTENTION = "canvastune_rows"  # in transformers' registry
# Nats below the highest logit. All tokens of a vocabulary that are so far below it have a probability
# of 1e-12 together: sums in float32 are the same without them.
_NEGLIGIBLE = 40.0
_MOST = 0.7  # of the tokens of a tile
_ROOM = 64  # tokens by which caches grow


class Asked(Protocol):
    """What the sampler reads of a question."""

    @property
    def id(self) -> str:
        """Name that the noise is keyed by."""

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt."""


class Noise(Protocol):
    """The source of randomness. Steps are counted from 1 in each block."""

    def start(self, question: str, block: int) -> torch.Tensor:
        """Return the canvas that a block starts from, int64[C]."""

    def uniforms(self, question: str, block: int, step: int) -> torch.Tensor:
        """Return what chooses each place's token by its cumulative probability, float64[C]."""

    def renoise(self, question: str, block: int, step: int) -> torch.Tensor:
        """Return the tokens of places that the step does not accept, int64[C]."""


@dataclass(frozen=True)
class KeyedNoise:
    """Noise that depends on nothing but seed, question, block and step."""

    seed: int
    canvas_length: int
    vocab_size: int

    def start(self, question: str, block: int) -> torch.Tensor:
        """Implement `Noise`."""
        return self.renoise(question, block, 0)

    def uniforms(self, question: str, block: int, step: int) -> torch.Tensor:
        """Implement `Noise`."""
        return answer_uniforms(self.seed, question, block, step, self.canvas_length)

    def renoise(self, question: str, block: int, step: int) -> torch.Tensor:
        """Implement `Noise`."""
        place = (self.seed, question, block, step)
        return answer_canvas(*place, self.canvas_length, self.vocab_size)


@dataclass(frozen=True)
class Answer:
    """One answer."""

    question: str
    tokens: list[int]  # up to the one that ends it
    forwards: int  # denoising steps
    cut: bool  # the limit of tokens came before the end
    drafts: list[list[list[int]]]  # by block and step, of a traced question


@dataclass(eq=False)
class _Row:
    """A question that is being answered."""

    question: Asked
    pending: torch.Tensor  # tokens to encode before the next step
    length: int = 0  # tokens encoded
    canvas: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    likeliest: torch.Tensor | None = None  # the step before's, int64[C]
    same: int = 0  # steps in a row that left it as it was
    soft: torch.Tensor | None = None  # what the step before expects, [C, H]
    block: int = 0
    step: int = 0  # done in this block
    forwards: int = 0
    tokens: list[int] = field(default_factory=list)
    drafts: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Statistics:
    """What is known of each token's distribution after all tiles."""

    entropy: torch.Tensor  # float32[N]
    likeliest: torch.Tensor  # int64[N]
    chosen: torch.Tensor  # int64[N]
    soft: torch.Tensor  # [N, H]: the expected embedding


class Sampler:
    """Answers questions, at most `rows` at once.

    For one device and dtype an answer depends on the question, the noise and the settings. What is
    answered with it changes only how float sums are rounded.
    """

    def __init__(
        self,
        model: Any,
        settings: SamplerSettings,
        noise: Noise,
        *,
        rows: int,
        max_new_tokens: int,
        stops: Iterable[int],
        traced: Collection[str] = (),
        tile_width: int | None = None,
    ) -> None:
        """Take a stock model in evaluation mode.

        Args:
            max_new_tokens: of an answer; it is cut there, inside a canvas too.
            stops: tokens that end an answer.
            traced: ids of the questions whose drafts are kept.
            tile_width: columns of the vocabulary that are computed at once.
        """
        self.model, self.settings, self.noise = model, settings, noise
        self.rows, self.max_new_tokens, self.traced = rows, max_new_tokens, traced
        self.stops = frozenset(stops)
        self.canvas_length = int(model.config.canvas_length)
        self.device = model.lm_head.weight.device
        width = tile_width or sampler_columns(rows * self.canvas_length, self.device.type)
        self.cap = float(model.final_logit_softcapping)
        self.tiles = list(torch.arange(model.lm_head.weight.shape[0]).split(width))
        stacks = model.model.encoder.language_model.layers, model.model.decoder.layers
        # Of layers where they differ: what the output of encoded and of denoised tokens is scaled by.
        self.scalars = {
            index: (encoder.layer_scalar, decoder.layer_scalar)
            for index, (encoder, decoder) in enumerate(zip(*stacks, strict=True))
            if not torch.equal(encoder.layer_scalar, decoder.layer_scalar)
        }

    @torch.no_grad()
    def answer(self, questions: Iterable[Asked]) -> Iterator[Answer]:
        """Yield the answers in the order in which they end."""
        waiting, rows = iter(questions), list[_Row]()
        caches = _Caches(self.canvas_length)
        while True:
            while len(rows) < self.rows and (question := next(waiting, None)) is not None:
                rows.append(_Row(question, torch.tensor(list(question.tokens))))
            if not rows:
                return
            with _attention_by_rows(self.model):
                ended = self._denoise(rows, caches)
            for row in ended:
                if (answer := self._finish_block(row)) is not None:
                    place, last = rows.index(row), rows.pop()
                    if last is not row:
                        rows[place] = last
                        caches.move(len(rows), place)
                    yield answer

    def _finish_block(self, row: _Row) -> Answer | None:
        """Return the answer if the block that was denoised ends it; otherwise begin the next one."""
        assert row.likeliest is not None
        row.tokens += (block := row.likeliest.tolist())
        left = self.max_new_tokens - len(row.tokens)
        stop = next((i for i, token in enumerate(row.tokens) if token in self.stops), None)
        if stop is not None or left <= 0:
            length = min(len(row.tokens) if stop is None else stop + 1, self.max_new_tokens)
            cut = stop is None or stop >= self.max_new_tokens
            name = row.question.id
            return Answer(name, row.tokens[:length], row.forwards, cut, row.drafts)
        row.pending, row.likeliest, row.same, row.soft = torch.tensor(block), None, 0, None
        row.block, row.step = row.block + 1, 0
        return None

    # --- the layers

    def _hidden(self, rows: Sequence[_Row], caches: _Caches) -> torch.Tensor:
        """Encode the rows' pending tokens, and run all their canvases; return what the head is given
        of the latter, [N, H].
        """
        *before, last = self._pending(rows)
        for group in before:
            self._pass(rows, group, [], caches)
        return self._pass(rows, last, rows, caches)

    def _pending(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        """Return the rows with tokens to encode, in groups that a pass can take."""
        groups, size = [list[_Row]()], 0
        for row in rows:
            if groups[-1] and size + len(row.pending) > ENCODED_TOKENS:
                groups.append([])
                size = 0
            if len(row.pending):
                groups[-1].append(row)
                size += len(row.pending)
        return groups

    def _pass(
        self,
        rows: Sequence[_Row],
        encoded: Sequence[_Row],
        denoised: Sequence[_Row],
        caches: _Caches,
    ) -> torch.Tensor:
        """Run the layers once, on pending tokens of some rows and on the canvases of all or none."""
        decoder = self.model.model.decoder
        parts: list[_Part] = []
        spans: list[tuple[int, int]] = []
        embedded: list[torch.Tensor] = []
        if encoded:
            tokens = torch.cat([row.pending for row in encoded]).to(self.device)
            embedded.append(decoder.embed_tokens(tokens[None]))
        for row in encoded:
            span = (row.length, row.length + len(row.pending))
            spans.append(span)
            parts.append(_Encoded(caches, len(rows), rows.index(row), *span))
            row.length, row.pending = span[1], row.pending[:0]
            row.canvas = self.noise.start(row.question.id, row.block).to(self.device)
        new = sum(end - start for start, end in spans)
        if denoised:
            spans += [(row.length, row.length + self.canvas_length) for row in denoised]
            parts.append(_Canvases(caches, [row.length for row in denoised]))
            embedded.append(self._canvases(denoised))
        positions = torch.cat([torch.arange(*span) for span in spans])[None].to(self.device)
        hidden = self._run_layers(torch.cat(embedded, dim=1), positions, parts, new)[:, new:]
        return decoder.norm(hidden)[0] if denoised else hidden[0]

    def _canvases(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Embed the rows' canvases with what the step before expects of them, [1, N, H]."""
        decoder = self.model.model.decoder
        canvases = torch.stack([row.canvas for row in rows])
        embedded = decoder.embed_tokens(canvases.view(1, -1))
        blank = embedded.new_zeros(self.canvas_length, embedded.shape[-1])
        soft = torch.cat([blank if row.soft is None else row.soft for row in rows])[None]
        embedding: torch.Tensor = decoder.self_conditioning(embedded, soft)
        return embedding

    def _run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, parts: Sequence[_Part], encoded: int
    ) -> torch.Tensor:
        """Run the stock layers, [1, N, H] -> [1, N, H].

        Args:
            encoded: tokens that come before the canvases.
        """
        decoder = self.model.model.decoder
        kinds = self.model.config.text_config.layer_types
        rotary = {kind: decoder.rotary_emb(hidden, positions, kind) for kind in sorted(set(kinds))}
        for index, (layer, kind) in enumerate(zip(decoder.layers, kinds, strict=True)):
            with self._scaled(layer, index, encoded, hidden.shape[1]):
                hidden = layer(
                    hidden,
                    position_embeddings=rotary[kind],
                    attention_mask=None,
                    position_ids=positions,
                    parts=parts,
                )
        return hidden

    @contextlib.contextmanager
    def _scaled(self, layer: Any, index: int, encoded: int, tokens: int) -> Iterator[None]:
        """Scale a layer's output of encoded tokens as the encoder does."""
        if not encoded or index not in self.scalars:
            yield
            return
        encoder, decoder = self.scalars[index]
        layer.layer_scalar = torch.cat([encoder.expand(encoded), decoder.expand(tokens - encoded)])[
            :, None
        ]
        try:
            yield
        finally:
            layer.layer_scalar = decoder

    # --- a denoising step

    def _denoise(self, rows: Sequence[_Row], caches: _Caches) -> list[_Row]:
        """Do one denoising step of every row; return those whose block has ended."""
        settings, hidden = self.settings, self._hidden(rows, caches)
        places = []
        for row in rows:
            row.step, row.forwards = row.step + 1, row.forwards + 1
            places.append((row.question.id, row.block, row.step))
        temperatures = [settings.temperature(settings.steps - row.step + 1) for row in rows]
        uniforms = torch.cat([self.noise.uniforms(*place) for place in places])
        # After the last step nothing is conditioned on it any more.
        wanted = settings.self_conditioning and any(row.step < settings.steps for row in rows)
        found = self._statistics(
            hidden,
            torch.tensor(temperatures).repeat_interleave(self.canvas_length).to(self.device),
            uniforms.to(self.device),
            want_soft=wanted,
        )
        shape = (len(rows), self.canvas_length)
        entropy, likeliest = found.entropy.view(shape), found.likeliest.view(shape)
        accepted = accept(entropy, settings.entropy_bound)
        renoised = torch.stack([self.noise.renoise(*place) for place in places]).to(self.device)
        canvases = torch.where(accepted, found.chosen.view(shape), renoised)
        confident = (entropy.mean(1) < settings.confidence_threshold).tolist()
        ended = []
        for index, row in enumerate(rows):
            before, row.likeliest = row.likeliest, likeliest[index]
            same = before is not None and torch.equal(before, row.likeliest)
            row.same = row.same + 1 if same else 0
            row.canvas = canvases[index]
            if wanted:
                row.soft = found.soft.view(*shape, -1)[index]
            if row.question.id in self.traced:
                row.drafts += [[]] if row.step == 1 else []
                row.drafts[-1].append(row.likeliest.tolist())
            stable = row.same >= settings.stability_threshold
            if row.step == settings.steps or (stable and confident[index]):
                ended.append(row)
        return ended

    def _statistics(
        self,
        hidden: torch.Tensor,
        temperatures: torch.Tensor,
        uniforms: torch.Tensor,
        *,
        want_soft: bool,
    ) -> _Statistics:
        """Return what a step needs of each token's logits, hidden [N, H], without storing them."""
        parts = [
            self._tiled(*each, want_soft=want_soft)
            for each in zip(
                *(given.split(SAMPLER_TOKENS) for given in (hidden, temperatures, uniforms)),
                strict=True,
            )
        ]
        names = [each.name for each in dataclasses.fields(_Statistics)]
        return _Statistics(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def _tiled(
        self,
        hidden: torch.Tensor,
        temperatures: torch.Tensor,
        uniforms: torch.Tensor,
        *,
        want_soft: bool,
    ) -> _Statistics:
        decoder = self.model.model.decoder
        head, table = self.model.lm_head.weight, decoder.embed_tokens.weight
        scale = self.cap / temperatures[:, None]
        sums = _TileSums(hidden, self.tiles, table.dtype, want_soft=want_soft)
        best = torch.zeros(len(hidden), dtype=torch.int64, device=self.device)
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
            soft = soft * decoder.embed_tokens.embed_scale.to(table.dtype)
        return _Statistics(sums.entropy, likeliest, chosen, soft)

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
            head = self.model.lm_head.weight[first : last + 1]
            wanted = ((tile == index) | (best == index)).nonzero()[:, 0]
            for which in wanted.split(CHOOSING_TOKENS):
                logits = self._cap((hidden[which] @ head.T).float(), scale[which])
                of_best, of_tile = best[which] == index, tile[which] == index
                likeliest[which[of_best]] = logits.argmax(1)[of_best] + first
                those = which[of_tile]
                weights = logits[of_tile].sub_(peak[those, None]).exp_()
                chosen[those] = first + _place(weights, rest[those])
        return likeliest, chosen


def _place(weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return where the cumulative weights [N, W] exceed the targets, float64[N] -> int64[N]."""
    parts = zip(weights.split(CHOOSING_TOKENS), target.split(CHOOSING_TOKENS), strict=True)
    found = [(part.double().cumsum(1) <= limit[:, None]).sum(1) for part, limit in parts]
    return torch.cat(found).clamp_(max=weights.shape[1] - 1)


class _TileSums:
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
        self.soft = hidden.new_zeros(
            size, dtype=torch.float32
        )  # expected embedding, times the total
        self.of_tile = self.peak.new_zeros(
            tokens, len(tiles)
        )  # the total, with the peak of the time
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
            soft_weights = logits.to(self.dtype).float().sub_(peak[:, None]).exp_()
            self.soft_total[rows] = self.soft_total[rows] * shrink + soft_weights.sum(1)
        if self.of_tile.shape[1] == 1:
            self.likeliest = logits.argmax(1)
        logits.sub_(peak[:, None])
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
        return self.of_tile.double() * (self.peaks - self.peak[:, None]).double().exp()


def _to_count(highest: torch.Tensor, peak: torch.Tensor) -> torch.Tensor | slice | None:
    """Return the tokens of whose distribution a tile may have more than a negligible part, by its
    highest logits and the highest of the tiles before; None: no token.
    """
    counted = ~(highest < peak - _NEGLIGIBLE)  # also where a logit is not a number
    count = int(counted.sum())
    if count > _MOST * len(counted):  # to copy the rest costs more
        return slice(None)
    return counted.nonzero()[:, 0] if count else None


def accept(entropy: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the places that a step accepts, bool[n, C], by their entropy, float32[n, C].

    From the lowest on, as long as the sum of those before it is within the bound: of the upper bound
    on their mutual information (arXiv 2505.24857), as stock's `EntropyBoundSampler` has it.
    """
    ordered, order = entropy.sort(dim=1)
    chosen = ordered.cumsum(1) - ordered <= bound
    return torch.zeros_like(chosen).scatter(1, order, chosen)


class _Caches:
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
        found[:, place, :, : end - seen] = (
            0  # of an earlier row; masked, but not if it is no number
        )
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


class _Part(abc.ABC):
    """Tokens of a pass that attend in one way."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens of the part."""

    @abc.abstractmethod
    def attend(self, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Attend in a layer: query [1, A, S, D], key and value [1, G, S, D] -> [1, A, S, D]."""


@dataclass(frozen=True)
class _Encoded(_Part):
    """Pending tokens of one row attend causally to those before them, and are kept."""

    caches: _Caches
    places: int
    place: int
    start: int  # tokens before them
    end: int

    @property
    def length(self) -> int:
        """Implement `_Part`."""
        return self.end - self.start

    def attend(self, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Implement `_Part`."""
        query, *own = tensors
        layer, window = module.layer_idx, module.sliding_window
        pairs = torch.stack(own)
        if self.start:
            known = self.caches.known(layer, self.place, _seen(self.start, window))
            pairs = torch.cat([known, pairs], dim=3)
        seen = _seen(self.end, window)
        self.caches.keep(layer, self.place, self.places, pairs[:, :, :, pairs.shape[3] - seen :])
        return _causal(query, pairs[0], pairs[1], window, module.scaling)


@dataclass(frozen=True)
class _Canvases(_Part):
    """Each row's canvas attends to what is kept of the tokens before it, and to all of itself."""

    caches: _Caches
    lengths: Sequence[int]  # tokens before each
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)  # by window

    @property
    def length(self) -> int:
        """Implement `_Part`."""
        return len(self.lengths) * self.caches.canvas_length

    def attend(self, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Implement `_Part`."""
        rows, window = len(self.lengths), module.sliding_window
        # [n, heads, C, D]
        query, key, value = (each[0].unflatten(1, (rows, -1)).transpose(0, 1) for each in tensors)
        seen = [_seen(length, window) for length in self.lengths]
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


def _seen(length: int, window: int | None) -> int:
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
    parts: Sequence[_Part],
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface, [1, heads, N, D] -> [1, N, A, D]."""
    lengths = [part.length for part in parts]
    split = [rows.split(lengths, dim=2) for rows in (query, key, value)]
    out = [part.attend(module, *each) for part, *each in zip(parts, *split, strict=True)]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


@contextlib.contextmanager
def _attention_by_rows(model: Any) -> Iterator[None]:
    """Let the model's layers attend as `_attend` does."""
    config = model.config.text_config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before

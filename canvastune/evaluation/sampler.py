"""Answer questions with a stock DiffusionGemma, equal to its `generate()` for the same noise.

Three things differ from `generate()`, none of them in the answers. As soon as an answer ends, the
next question takes its place. Prompts of several lengths share a pass without padding:
each row attends by itself. And logits exist one tile of the vocabulary at a time, as scores do in
flash attention: softmax, entropy, the sampled token and the soft embedding of self-conditioning are
accumulated over the tiles.

Shape letters: n rows (questions that are answered at once), C canvas, N = n C tokens, S prompt, H
hidden, V vocabulary, W tile of the vocabulary, A and G heads of queries and of keys, D head size.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.noise import answer_canvas, answer_uniforms

_ATTENTION = "canvastune_rows"  # in transformers' registry
_TILE_TOKENS = 2048  # tokens whose logits exist at once
_TILE_WIDTH = {"cpu": 4096, "cuda": 32768}  # of the vocabulary, of these tokens
_ENCODED_TOKENS = 16384  # that one pass of the encoder takes, unless one prompt is longer


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
    """A question that is being answered.

    A layer's keys and values are those of the tokens before the block, as many as its window shows,
    with room for the canvas' own behind them.
    """

    question: Asked
    pending: torch.Tensor  # tokens to encode before the next step
    length: int = 0  # tokens encoded
    keys: list[torch.Tensor] = field(default_factory=list)  # by layer, [1, G, seen + C, D]
    values: list[torch.Tensor] = field(default_factory=list)
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
        traced: str | None = None,
        tile_width: int | None = None,
    ) -> None:
        """Take a stock model in evaluation mode.

        Args:
            max_new_tokens: of an answer; it is cut there, inside a canvas too.
            stops: tokens that end an answer.
            traced: id of the question whose drafts are kept.
            tile_width: columns of the vocabulary that are computed at once.
        """
        self.model, self.settings, self.noise = model, settings, noise
        self.rows, self.max_new_tokens, self.traced = rows, max_new_tokens, traced
        self.stops = frozenset(stops)
        self.canvas_length = int(model.config.canvas_length)
        self.device = model.lm_head.weight.device
        width = tile_width or _TILE_WIDTH.get(self.device.type, _TILE_WIDTH["cuda"])
        self.tiles = list(torch.arange(model.lm_head.weight.shape[0]).split(width))

    @torch.no_grad()
    def answer(self, questions: Iterable[Asked]) -> Iterator[Answer]:
        """Yield the answers in the order in which they end."""
        waiting, rows = iter(questions), list[_Row]()
        while True:
            while len(rows) < self.rows and (question := next(waiting, None)) is not None:
                rows.append(_Row(question, torch.tensor(list(question.tokens))))
            if not rows:
                return
            with _attention_by_rows(self.model):
                self._encode([row for row in rows if len(row.pending)])
                ended = self._denoise(rows)
            for row in ended:
                if (answer := self._finish_block(row)) is not None:
                    rows.remove(row)
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

    # --- the encoder

    def _encode(self, rows: Sequence[_Row]) -> None:
        """Encode the rows' pending tokens, and give each the canvas that its next block starts from."""
        group, size = list[_Row](), 0
        for row in rows:
            if group and size + len(row.pending) > _ENCODED_TOKENS:
                self._encode_group(group)
                group, size = [], 0
            group.append(row)
            size += len(row.pending)
        if group:
            self._encode_group(group)

    def _encode_group(self, rows: Sequence[_Row]) -> None:
        encoder = self.model.model.encoder.language_model
        tokens = torch.cat([row.pending for row in rows])[None].to(self.device)
        spans = [(row.length, row.length + len(row.pending)) for row in rows]
        hidden = encoder.embed_tokens(tokens)
        context = _EncodedRows(rows, self.canvas_length)
        self._run_layers(encoder, hidden, self._positions(spans), context)
        for row in rows:
            row.length += len(row.pending)
            row.pending = row.pending[:0]
            row.canvas = self.noise.start(row.question.id, row.block).to(self.device)

    def _positions(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([torch.arange(*span) for span in spans])[None].to(self.device)

    def _run_layers(
        self, stack: Any, hidden: torch.Tensor, positions: torch.Tensor, context: _AttendingRows
    ) -> torch.Tensor:
        """Run the layers of the stock encoder or decoder, [1, N, H] -> [1, N, H]."""
        kinds = self.model.config.text_config.layer_types
        rotary = {kind: stack.rotary_emb(hidden, positions, kind) for kind in sorted(set(kinds))}
        for layer, kind in zip(stack.layers, kinds, strict=True):
            hidden = layer(
                hidden,
                position_embeddings=rotary[kind],
                attention_mask=None,
                position_ids=positions,
                attending=context,
            )
        return hidden

    # --- the decoder

    def _denoise(self, rows: Sequence[_Row]) -> list[_Row]:
        """Do one denoising step of every row; return those whose block has ended."""
        decoder, settings = self.model.model.decoder, self.settings
        canvases = torch.stack([row.canvas for row in rows])
        embedded = decoder.embed_tokens(canvases.view(1, -1))
        blank = embedded.new_zeros(self.canvas_length, embedded.shape[-1])
        soft = torch.cat([blank if row.soft is None else row.soft for row in rows])[None]
        hidden = decoder.self_conditioning(embedded, soft)
        spans = [(row.length, row.length + self.canvas_length) for row in rows]
        context = _DenoisedRows(rows, self.canvas_length)
        hidden = decoder.norm(self._run_layers(decoder, hidden, self._positions(spans), context))

        places = []
        for row in rows:
            row.step, row.forwards = row.step + 1, row.forwards + 1
            places.append((row.question.id, row.block, row.step))
        temperatures = [settings.temperature(settings.steps - row.step + 1) for row in rows]
        uniforms = torch.cat([self.noise.uniforms(*place) for place in places])
        # After the last step nothing is conditioned on it any more.
        wanted = settings.self_conditioning and any(row.step < settings.steps for row in rows)
        found = self._statistics(
            hidden[0],
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
            if row.question.id == self.traced:
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
                *(given.split(_TILE_TOKENS) for given in (hidden, temperatures, uniforms)),
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
        rounds = want_soft and table.dtype != torch.float32
        scale = float(self.model.final_logit_softcapping) / temperatures[:, None]
        tokens, tiles = len(hidden), len(self.tiles)
        # Of the tiles so far: the largest logit, the sums of exp(logit - largest) and of that times
        # (logit - largest), the expected embedding before division.
        peak = hidden.new_full((tokens,), -torch.inf, dtype=torch.float32)
        likeliest = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        total, slope = torch.zeros_like(peak), torch.zeros_like(peak)
        soft_total = torch.zeros_like(peak)
        soft = hidden.new_zeros(hidden.shape if want_soft else (tokens, 0), dtype=torch.float32)
        sums = peak.new_empty(tokens, tiles)
        peaks = torch.empty_like(sums)
        buffer = peak.new_empty(tokens, len(self.tiles[0]))
        for index, tile in enumerate(self.tiles):
            columns = slice(int(tile[0]), int(tile[-1]) + 1)
            logits = self._logits(hidden, head[columns], scale)
            highest, place = logits.max(1)
            likeliest = torch.where(highest > peak, place + columns.start, likeliest)
            higher = torch.maximum(peak, highest)
            change = torch.nan_to_num(peak - higher, neginf=0.0)  # the first tile adds to nothing
            shrink = change.exp()
            weights = buffer[:, : len(tile)]
            if rounds:  # as stock: the next step sees these logits in the dtype of the weights
                rounded = logits.to(table.dtype).float()
                soft_weights = rounded.sub_(higher[:, None]).exp_()
                soft_total = soft_total * shrink + soft_weights.sum(1)
            logits.sub_(higher[:, None])
            torch.exp(logits, out=weights)
            here = weights.sum(1)
            slope = shrink * (slope + change * total) + logits.mul_(weights).sum(1)
            total = total * shrink + here
            if want_soft:
                if not rounds:
                    soft_weights, soft_total = weights, total
                soft.mul_(shrink[:, None])
                soft += soft_weights.to(table.dtype) @ table[columns]
            sums[:, index], peaks[:, index], peak = here, higher, higher
        entropy = total.log() - slope / total
        chosen = self._choose(
            hidden, scale, (sums.double() * (peaks - peak[:, None]).double().exp()), peak, uniforms
        )
        if want_soft:
            soft = (soft / soft_total[:, None]).to(table.dtype)
            soft = soft * decoder.embed_tokens.embed_scale.to(table.dtype)
        return _Statistics(entropy, likeliest, chosen, soft)

    def _logits(self, hidden: torch.Tensor, head: torch.Tensor, scale: torch.Tensor) -> Any:
        """Return the capped logits of a tile over their temperatures, float32[N, W]."""
        logits = (hidden @ head.T).float()
        cap = float(self.model.final_logit_softcapping)
        return logits.div_(cap).tanh_().mul_(scale)

    def _choose(
        self,
        hidden: torch.Tensor,
        scale: torch.Tensor,
        sums: torch.Tensor,
        peak: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> torch.Tensor:
        """Return the tokens at the uniforms' places in the cumulative probability, int64[N].

        The tile comes from the tiles' sums, float64[N, tiles]. Its logits are computed again, for
        the tokens that it was chosen for.
        """
        cumulated = sums.cumsum(1)
        target = uniforms * cumulated[:, -1]
        tile = (cumulated <= target[:, None]).sum(1).clamp_(max=len(self.tiles) - 1)
        rest = target - (cumulated - sums).gather(1, tile[:, None])[:, 0]
        chosen = torch.empty_like(tile)
        for index in tile.unique().tolist():
            which = (tile == index).nonzero()[:, 0]
            first, last = int(self.tiles[index][0]), int(self.tiles[index][-1])
            head = self.model.lm_head.weight[first : last + 1]
            logits = self._logits(hidden[which], head, scale[which])
            weights = logits.sub_(peak[which, None]).exp_().double().cumsum(1)
            place = (weights <= rest[which, None]).sum(1).clamp_(max=last - first)
            chosen[which] = place + first
        return chosen


def accept(entropy: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the places that a step accepts, bool[n, C], by their entropy, float32[n, C].

    From the lowest on, as long as the sum of those before it is within the bound: of the upper bound
    on their mutual information (arXiv 2505.24857), as stock's `EntropyBoundSampler` has it.
    """
    ordered, order = entropy.sort(dim=1)
    chosen = ordered.cumsum(1) - ordered <= bound
    return torch.zeros_like(chosen).scatter(1, order, chosen)


class _AttendingRows(abc.ABC):
    """Rows that share a pass, and how each attends by itself."""

    def __init__(self, rows: Sequence[_Row], canvas_length: int) -> None:
        self.rows, self.canvas_length = rows, canvas_length

    @abc.abstractmethod
    def lengths(self) -> list[int]:
        """Return the number of tokens of each row in this pass."""

    @abc.abstractmethod
    def attend(self, row: _Row, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Attend in a layer: query [1, A, S, D], key and value [1, G, S, D] -> [1, A, S, D]."""


class _EncodedRows(_AttendingRows):
    """Pending tokens attend causally to those before them, which are kept for the decoder."""

    def lengths(self) -> list[int]:
        """Implement `_AttendingRows`."""
        return [len(row.pending) for row in self.rows]

    def attend(self, row: _Row, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Implement `_AttendingRows`."""
        query, key, value = tensors
        layer, window = module.layer_idx, module.sliding_window
        if row.length:
            key = torch.cat([row.keys[layer][:, :, : -self.canvas_length], key], dim=2)
            value = torch.cat([row.values[layer][:, :, : -self.canvas_length], value], dim=2)
        seen = key.shape[2] if window is None else min(key.shape[2], window - 1)
        room = (0, 0, 0, self.canvas_length)
        kept = [F.pad(each[:, :, each.shape[2] - seen :], room) for each in (key, value)]
        if row.length:
            row.keys[layer], row.values[layer] = kept
        else:
            row.keys.append(kept[0])
            row.values.append(kept[1])
        return _causal(query, key, value, window, module.scaling)


class _DenoisedRows(_AttendingRows):
    """A canvas attends to what is kept of the tokens before it, and to all of itself."""

    def lengths(self) -> list[int]:
        """Implement `_AttendingRows`."""
        return [self.canvas_length] * len(self.rows)

    def attend(self, row: _Row, module: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """Implement `_AttendingRows`."""
        query, key, value = tensors
        keys, values = row.keys[module.layer_idx], row.values[module.layer_idx]
        keys[:, :, -self.canvas_length :] = key
        values[:, :, -self.canvas_length :] = value
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, keys, values, scale=module.scaling, enable_gqa=grouped
        )


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
    attending: _AttendingRows,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface, [1, heads, N, D] -> [1, N, A, D]."""
    split = [rows.split(attending.lengths(), dim=2) for rows in (query, key, value)]
    parts = [
        attending.attend(row, module, *each)
        for row, *each in zip(attending.rows, *split, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


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

"""Answer questions with a stock DiffusionGemma, equal to its `generate()` for the same noise.

Four things differ from `generate()`, none of them in the answers. As soon as an answer ends, the
next question takes its place. Prompts of several lengths share a pass without padding:
each row attends by itself. Encoder and decoder have the same weights, so one pass through the layers
encodes what new rows and blocks begin with and denoises all canvases, also those that see it (see
`row_attention`). And logits exist one tile of the vocabulary at a time (see `tiled_head`).

Shape letters: n rows (questions that are answered at once), C canvas, N = n C tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.evaluation.row_attention import (
    Canvases,
    EncodedTokens,
    Part,
    RowCaches,
    attention_by_rows,
)
from canvastune.evaluation.tiled_head import TiledHead
from canvastune.logit_chunks import encoded_tokens, sampler_columns
from canvastune.noise import AnswerNoise

if TYPE_CHECKING:  # that module imports this one
    from canvastune.evaluation.generation import Question


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

    question: Question
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


class Sampler:
    """Answers questions, at most `rows` at once.

    For one device and dtype an answer depends on the question, the noise and the settings. What is
    answered with it changes only how float sums are rounded.
    """

    def __init__(
        self,
        model: Any,
        settings: SamplerSettings,
        noise: AnswerNoise,
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
        canvases = rows * self.canvas_length
        self.encoded = encoded_tokens(canvases)  # in one pass, at most
        width = tile_width or sampler_columns(canvases, self.device.type)
        self.head = TiledHead(model, width)
        stacks = model.model.encoder.language_model.layers, model.model.decoder.layers
        # Of layers where they differ: what the output of encoded and of denoised tokens is scaled by.
        self.scalars = {
            index: (encoder.layer_scalar, decoder.layer_scalar)
            for index, (encoder, decoder) in enumerate(zip(*stacks, strict=True))
            if not torch.equal(encoder.layer_scalar, decoder.layer_scalar)
        }

    @torch.no_grad()
    def answer(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Yield the answers in the order in which they end."""
        waiting, rows = iter(questions), list[_Row]()
        caches = RowCaches(self.canvas_length)
        while True:
            while len(rows) < self.rows and (question := next(waiting, None)) is not None:
                rows.append(_Row(question, torch.tensor(list(question.tokens))))
            if not rows:
                return
            with attention_by_rows(self.model):
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

    def _hidden(self, rows: Sequence[_Row], caches: RowCaches) -> torch.Tensor:
        """Encode the rows' pending tokens, and run all their canvases; return what the head is given
        of the latter, [N, H].
        """
        *before, last = self._pending(rows)
        for group in before:
            self._pass(rows, group, [], caches)
        return self._pass(rows, last, rows, caches)

    def _pending(self, rows: Sequence[_Row]) -> list[list[tuple[_Row, int]]]:
        """Return of which rows each pass encodes how many pending tokens.

        A prompt of several passes begins one: what it gives does not depend on the rows before it.
        """
        groups, room = [list[tuple[_Row, int]]()], self.encoded
        for row in rows:
            left = len(row.pending)
            while left:
                if left > room and groups[-1]:
                    groups.append([])
                    room = self.encoded
                groups[-1].append((row, count := min(left, room)))
                left, room = left - count, room - count
        return groups

    def _pass(
        self,
        rows: Sequence[_Row],
        encoded: Sequence[tuple[_Row, int]],
        denoised: Sequence[_Row],
        caches: RowCaches,
    ) -> torch.Tensor:
        """Run the layers once, on pending tokens of some rows and on the canvases of all or none."""
        decoder = self.model.model.decoder
        parts: list[Part] = []
        spans: list[tuple[int, int]] = []
        embedded: list[torch.Tensor] = []
        if encoded:
            tokens = torch.cat([row.pending[:count] for row, count in encoded]).to(self.device)
            embedded.append(decoder.embed_tokens(tokens[None]))
        for row, count in encoded:
            span = (row.length, row.length + count)
            spans.append(span)
            parts.append(EncodedTokens(caches, len(rows), rows.index(row), *span))
            row.length, row.pending = span[1], row.pending[count:]
            if not len(row.pending):
                row.canvas = self.noise.start(row.question.id, row.block).to(self.device)
        new = sum(end - start for start, end in spans)
        if denoised:
            spans += [(row.length, row.length + self.canvas_length) for row in denoised]
            parts.append(Canvases(caches, [row.length for row in denoised]))
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
        self, hidden: torch.Tensor, positions: torch.Tensor, parts: Sequence[Part], encoded: int
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

    def _denoise(self, rows: Sequence[_Row], caches: RowCaches) -> list[_Row]:
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
        found = self.head.statistics(
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


def accept(entropy: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the places that a step accepts, bool[n, C], by their entropy, float32[n, C].

    From the lowest on, as long as the sum of those before it is within the bound: of the upper bound
    on their mutual information (arXiv 2505.24857), as stock's `EntropyBoundSampler` has it.
    """
    ordered, order = entropy.sort(dim=1)
    chosen = ordered.cumsum(1) - ordered <= bound
    return torch.zeros_like(chosen).scatter(1, order, chosen)

"""Packed, ragged batches of examples: no padding token reaches the model.

Shape letters: B examples, S clean tokens of one example, K canvases (one or more of each example),
C tokens of one canvas, N clean tokens of the batch (sum of S), M canvas tokens of the batch (sum of
C).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from canvastune.noise import NoiseSample, dropout_row_keys


@dataclass(frozen=True)
class Example:
    """One row of a prepared data set; EOS fills the last response block to the canvas length if the
    response is complete.
    """

    tokens: torch.Tensor  # int64[S]: prefix, response and fill
    prefix_length: int  # tokens before the response
    canvas_length: int
    id: str

    @property
    def blocks(self) -> int:
        """Number of response blocks, counted from the first response token."""
        return -(-(len(self.tokens) - self.prefix_length) // self.canvas_length)


class Part(NamedTuple):
    """Drawn blocks of an example that go through one forward: all of them, unless
    `train.micro_batch_blocks` is smaller.

    Each part computes the clean tokens before its last block again. Keeping their keys and values
    would need more memory than one forward of all blocks: in the released model with checkpointing,
    keys, values and their gradients are 450,560 bytes per clean token, what a forward keeps is
    168,960 bytes per token, and an answer has no more canvas tokens than clean ones. Two parts
    compute a fifth more FLOPs than one forward, four parts two thirds more.
    """

    position: int  # of its example in the stream
    first: int  # of the example's drawn blocks, in their order, this part has `first` to `stop` - 1
    stop: int
    is_last: bool  # the last part has all clean tokens, and scores them

    @property
    def blocks(self) -> slice:
        """This part of the example's drawn blocks."""
        return slice(self.first, self.stop)


@dataclass(frozen=True)
class PackedBatch:
    """Ragged examples, concatenated: the clean tokens of all examples, then the canvases of all
    examples, those of one example together.
    """

    clean: torch.Tensor  # int64[N]
    clean_positions: torch.Tensor  # int64[N]: position in the example's own sequence
    canvas: torch.Tensor  # int64[M]: corrupted tokens of the chosen blocks
    # int64[M]: absolute, so that rotary embeddings agree with the encoder's
    canvas_positions: torch.Tensor
    canvas_targets: torch.Tensor  # int64[M]: clean tokens of the chosen blocks; every one is scored
    next_rows: torch.Tensor  # int64[N - B]: rows of `clean` that predict their successor
    next_targets: torch.Tensor  # int64[N - B]
    clean_lengths: tuple[int, ...]  # [B]
    canvas_lengths: tuple[int, ...]  # [K]
    canvas_examples: tuple[int, ...]  # [K]: the example of each canvas, ascending
    block_starts: tuple[int, ...]  # [K]: first position of the canvas's block
    self_conditioned: tuple[bool, ...]  # [K]: canvases that are denoised twice
    row_keys: torch.Tensor | None = None  # int64[N+M]: of the adapters' dropout; None: no dropout

    def to(self, device: torch.device) -> PackedBatch:
        """Return the same batch with its tensors on `device`."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return PackedBatch(**moved)

    def select(self, keep: list[bool]) -> tuple[PackedBatch, torch.Tensor]:
        """Return the canvases where `keep` is true and their examples as a batch, and their rows in
        this batch's canvas, int64[M'].

        The result is the input of the self-conditioning pass: no row is scored, and adapters apply
        no dropout.

        Args:
            keep: bool[K], of which at least one is true.
        """
        device = self.clean.device
        examples = sorted({at for at, k in zip(self.canvas_examples, keep, strict=True) if k})
        with_canvas = [at in examples for at in range(len(self.clean_lengths))]
        clean_rows = _row_indices(self.clean_lengths, with_canvas).to(device)
        canvas_rows = _row_indices(self.canvas_lengths, keep).to(device)

        def kept(values: tuple) -> tuple:
            return tuple(value for value, k in zip(values, keep, strict=True) if k)

        batch = PackedBatch(
            clean=self.clean[clean_rows],
            clean_positions=self.clean_positions[clean_rows],
            canvas=self.canvas[canvas_rows],
            canvas_positions=self.canvas_positions[canvas_rows],
            canvas_targets=self.canvas_targets[canvas_rows],
            next_rows=self.next_rows[:0],
            next_targets=self.next_targets[:0],
            clean_lengths=tuple(self.clean_lengths[at] for at in examples),
            canvas_lengths=kept(self.canvas_lengths),
            canvas_examples=tuple(map(examples.index, kept(self.canvas_examples))),
            block_starts=kept(self.block_starts),
            self_conditioned=kept(self.self_conditioned),
        )
        return batch, canvas_rows

    def before_blocks(self) -> PackedBatch:
        """Return the same canvases with only the clean tokens that they see, those before the last
        of an example's blocks; no clean token is scored.
        """
        # Canvases are in the order of their blocks, so an example's last one has the last start.
        last_starts = dict(zip(self.canvas_examples, self.block_starts, strict=True))
        seen_lengths = tuple(last_starts[at] for at in range(len(self.clean_lengths)))
        before = [
            torch.arange(length) < seen
            for length, seen in zip(self.clean_lengths, seen_lengths, strict=True)
        ]
        seen = torch.cat(before).nonzero().flatten().to(self.clean.device)
        keys = (
            None
            if self.row_keys is None
            else torch.cat([self.row_keys[seen], self.row_keys[len(self.clean) :]])
        )
        return replace(
            self,
            clean=self.clean[seen],
            clean_positions=self.clean_positions[seen],
            next_rows=self.next_rows[:0],
            next_targets=self.next_targets[:0],
            clean_lengths=seen_lengths,
            row_keys=keys,
        )


def pack(
    examples: Sequence[Example],
    draws: Sequence[NoiseSample | Sequence[NoiseSample]],
    scored: Sequence[bool] | None = None,
) -> PackedBatch:
    """Concatenate examples, with their noise applied to the chosen blocks.

    Args:
        draws: of each example, the noise of its chosen block, or of each of its chosen blocks in
            their order.
        scored: whether an example's clean tokens are scored, all of them by default; of the others
            only those before its last canvas are computed.
    """
    canvases, targets, canvas_positions, starts, owners = [], [], [], [], []
    of_examples = [(draw,) if isinstance(draw, NoiseSample) else tuple(draw) for draw in draws]
    for at, (example, own) in enumerate(zip(examples, of_examples, strict=True)):
        for draw in own:
            start = example.prefix_length + draw.block * example.canvas_length
            target = example.tokens[start : start + example.canvas_length]
            length = len(target)
            canvases.append(torch.where(draw.corrupted[:length], draw.replacement[:length], target))
            targets.append(target)
            canvas_positions.append(torch.arange(start, start + length))
            starts.append(start)
            owners.append(at)
    lengths = [len(example.tokens) for example in examples]
    has_next = [torch.arange(1, length + 1) < length for length in lengths]
    for at, counts in enumerate(scored or ()):
        if not counts:
            lengths[at] = dict(zip(owners, starts, strict=True))[at]  # of its last canvas
            has_next[at] = torch.zeros(lengths[at], dtype=torch.bool)
    clean = torch.cat([e.tokens[:length] for e, length in zip(examples, lengths, strict=True)])
    next_rows = torch.cat(has_next).nonzero().flatten()
    return PackedBatch(
        clean=clean,
        clean_positions=torch.cat([torch.arange(length) for length in lengths]),
        canvas=torch.cat(canvases),
        canvas_positions=torch.cat(canvas_positions),
        canvas_targets=torch.cat(targets),
        next_rows=next_rows,
        next_targets=clean[next_rows + 1],
        clean_lengths=tuple(lengths),
        canvas_lengths=tuple(len(target) for target in targets),
        canvas_examples=tuple(owners),
        block_starts=tuple(starts),
        self_conditioned=tuple(draw.self_condition for own in of_examples for draw in own),
        row_keys=_row_keys(examples, of_examples, lengths),
    )


def padding_batch() -> PackedBatch:
    """Return a batch of one clean token and one canvas token, for a rank without an example where
    others have one; its weight is zero.
    """
    one = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        clean=one,
        clean_positions=one,
        canvas=one,
        canvas_positions=one + 1,
        canvas_targets=one,
        next_rows=one[:0],
        next_targets=one[:0],
        clean_lengths=(1,),
        canvas_lengths=(1,),
        canvas_examples=(0,),
        block_starts=(1,),
        self_conditioned=(False,),
    )


def balance_microbatches(
    tokens: Sequence[int], again: Sequence[int], ranks: int, size: int
) -> list[list[list[int]]]:
    """Divide a global batch so that ranks finish each forward together: [forward][rank] -> `size`
    examples, ascending.

    Ranks synchronize in every layer of both passes, so the tokens of both should be even. Greedy
    assignment, the largest example first, to the share with the fewest tokens that has room: once
    ordered by tokens only, once with the self-conditioned examples before the others; the cheaper
    result wins. The result depends on the arguments only, so all ranks compute the same one.

    Args:
        tokens: of each example, in one pass; its canvases included.
        again: tokens of each example with its self-conditioned canvases; 0 without any.
        ranks: `ranks * size` must divide the number of examples.
        size: examples of a rank and forward.
    """
    by_size = sorted(range(len(tokens)), key=lambda at: (-tokens[at], at))
    orders = by_size, sorted(by_size, key=lambda at: not again[at])
    candidates = [_greedy_assign(order, tokens, ranks, size) for order in orders]
    return min(candidates, key=lambda shares: step_cost(shares, tokens, again))


def step_cost(shares: list[list[list[int]]], tokens: Sequence[int], again: Sequence[int]) -> int:
    """Return the cost of the busiest rank of each forward, in tokens of the self-conditioning pass.

    The second pass with recomputation and backward costs four times as much. A rank without a
    self-conditioned example, where another rank has one, has almost nothing to compute in the
    self-conditioning pass.
    """
    total = 0
    for forward in shares:
        total += 4 * max(sum(tokens[at] for at in own) for own in forward)
        total += max(sum(again[at] for at in own) for own in forward)
    return total


def _greedy_assign(
    order: list[int], tokens: Sequence[int], ranks: int, size: int
) -> list[list[list[int]]]:
    """Assign examples in this order to the share with the fewest tokens that has room; similar
    shares run at the same time.
    """
    shares: list[list[int]] = [[] for _ in range(len(order) // size)]
    open_shares = [(0, index) for index in range(len(shares))]  # a heap
    for example in order:
        load, index = heapq.heappop(open_shares)
        shares[index].append(example)
        if len(shares[index]) < size:
            heapq.heappush(open_shares, (load + tokens[example], index))
    shares.sort(key=lambda share: (-sum(tokens[at] for at in share), share))
    return [
        [sorted(share) for share in shares[start : start + ranks]]
        for start in range(0, len(shares), ranks)
    ]


def pad_token(end_tokens: int | list[int]) -> int:
    """Return the token of a model's `eos_token_id` that fills the last block: the first one."""
    return end_tokens[0] if isinstance(end_tokens, list) else end_tokens


def make_example(row: dict[str, Any], canvas_length: int, eos_token_id: int) -> Example:
    """Turn a row of a prepared data set into an example, with its fill."""
    tokens = torch.tensor(row["input_ids"], dtype=torch.int64)
    if row["complete"]:
        fill = -(len(tokens) - row["prefix_length"]) % canvas_length
        tokens = torch.cat([tokens, tokens.new_full((fill,), eos_token_id)])
    return Example(
        tokens=tokens, prefix_length=row["prefix_length"], canvas_length=canvas_length, id=row["id"]
    )


def _row_keys(
    examples: Sequence[Example], draws: Sequence[tuple[NoiseSample, ...]], lengths: Sequence[int]
) -> torch.Tensor | None:
    clean, canvas = [], []
    for example, own, length in zip(examples, draws, lengths, strict=True):
        tokens, size = len(example.tokens), example.canvas_length
        for draw in own:
            if draw.dropout_key is None:
                return None
            start = example.prefix_length + draw.block * size
            keys = dropout_row_keys(
                draw.dropout_key, tokens, min(size, tokens - start), draw.order * size
            )
            canvas.append(keys[1])
        clean.append(keys[0][:length])  # the same for each of the example's blocks
    return torch.cat([*clean, *canvas])


def _row_indices(lengths: tuple[int, ...], keep: list[bool]) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(keep), torch.tensor(lengths)).nonzero().flatten()

"""Examples of a prepared data set as packed, ragged batches: no padding token ever reaches the model.

Shape letters: B examples, S clean tokens of one example, C canvas tokens of one example, N clean tokens of the batch
(sum of S), M canvas tokens of the batch (sum of C).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk

from canvastune.config import TrainConfig
from canvastune.errors import UserError
from canvastune.noise import Draws, dropout_row_keys, epoch_order, self_conditioning_coin, training_draws, validation_draws


@dataclass(frozen=True)
class Example:
    """One row of a prepared data set, the last response block filled to the canvas length with EOS where the response is whole."""

    tokens: torch.Tensor  # int64[S]: prefix, response and fill
    prefix_length: int  # tokens before the response
    canvas_length: int
    id: str

    @property
    def blocks(self) -> int:
        """Number of response blocks, counted from the first response token."""
        return -(-(len(self.tokens) - self.prefix_length) // self.canvas_length)


@dataclass(frozen=True)
class PackedBatch:
    """Ragged examples laid end to end: first the clean tokens of all examples, then the canvases of all examples."""

    clean: torch.Tensor  # int64[N]
    clean_positions: torch.Tensor  # int64[N]: position in the example's own sequence
    canvas: torch.Tensor  # int64[M]: corrupted tokens of the chosen blocks
    canvas_positions: torch.Tensor  # int64[M]: absolute, so that rotary embeddings agree with the encoder's
    canvas_targets: torch.Tensor  # int64[M]: clean tokens of the chosen blocks; every one is scored
    next_rows: torch.Tensor  # int64[N - B]: rows of `clean` that predict their successor
    next_targets: torch.Tensor  # int64[N - B]
    self_condition: torch.Tensor  # bool[M]: canvas rows that see pass 1's signal
    clean_lengths: tuple[int, ...]  # [B]
    canvas_lengths: tuple[int, ...]  # [B]
    block_starts: tuple[int, ...]  # [B]: first position of the chosen block
    coins: tuple[bool, ...]  # [B]: examples that are denoised twice
    row_keys: torch.Tensor | None = None  # int64[N+M]: of the adapters' dropout; None: nothing is dropped

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return PackedBatch(**moved)

    def select(self, keep: list[bool]) -> tuple[PackedBatch, torch.Tensor]:
        """The examples where `keep` is true as a batch of their own, and the rows of this batch's canvas they came from, int64[M'].

        It is what pass 1 sees: nothing of it is scored, and adapters drop nothing.
        """
        device = self.clean.device
        clean_rows = _rows(self.clean_lengths, keep).to(device)
        canvas_rows = _rows(self.canvas_lengths, keep).to(device)

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
            self_condition=self.self_condition[canvas_rows],
            clean_lengths=kept(self.clean_lengths),
            canvas_lengths=kept(self.canvas_lengths),
            block_starts=kept(self.block_starts),
            coins=kept(self.coins),
        )
        return batch, canvas_rows

    def before_blocks(self) -> PackedBatch:
        """The same canvases with the clean tokens that they see alone: those before their blocks. Of these, none is scored."""
        before = [torch.arange(length) < start for length, start in zip(self.clean_lengths, self.block_starts, strict=True)]
        seen = torch.cat(before).nonzero().flatten().to(self.clean.device)
        keys = None if self.row_keys is None else torch.cat([self.row_keys[seen], self.row_keys[len(self.clean) :]])
        return replace(
            self,
            clean=self.clean[seen],
            clean_positions=self.clean_positions[seen],
            next_rows=self.next_rows[:0],
            next_targets=self.next_targets[:0],
            clean_lengths=tuple(map(min, self.clean_lengths, self.block_starts)),
            row_keys=keys,
        )


def pack(examples: list[Example], draws: list[Draws]) -> PackedBatch:
    """Lay examples end to end with their noise applied to the chosen block."""
    canvases, targets, canvas_positions, flags, starts = [], [], [], [], []
    for example, draw in zip(examples, draws, strict=True):
        start = example.prefix_length + draw.block * example.canvas_length
        target = example.tokens[start : start + example.canvas_length]
        length = len(target)
        canvases.append(torch.where(draw.corrupted[:length], draw.replacement[:length], target))
        targets.append(target)
        canvas_positions.append(torch.arange(start, start + length))
        flags.append(torch.full((length,), draw.self_condition))
        starts.append(start)
    lengths = [len(example.tokens) for example in examples]
    clean = torch.cat([example.tokens for example in examples])
    ends = torch.tensor(lengths).cumsum(0) - 1
    last = torch.zeros(len(clean), dtype=torch.bool)
    last[ends] = True
    next_rows = (~last).nonzero().flatten()
    return PackedBatch(
        clean=clean,
        clean_positions=torch.cat([torch.arange(length) for length in lengths]),
        canvas=torch.cat(canvases),
        canvas_positions=torch.cat(canvas_positions),
        canvas_targets=torch.cat(targets),
        next_rows=next_rows,
        next_targets=clean[next_rows + 1],
        self_condition=torch.cat(flags),
        clean_lengths=tuple(lengths),
        canvas_lengths=tuple(len(target) for target in targets),
        block_starts=tuple(starts),
        coins=tuple(draw.self_condition for draw in draws),
        row_keys=_row_keys(draws, lengths, [len(target) for target in targets]),
    )


def share_out(tokens: Sequence[int], coins: Sequence[bool], ranks: int, size: int) -> list[list[list[int]]]:
    """Share a global batch out so that ranks finish each forward together: [forward][rank] -> `size` of its examples, ascending.

    Ranks meet in every layer of both passes, so the tokens of both should be even. Largest first, each to the share with the
    fewest tokens that has room; once in the order of the tokens alone, once with those that are denoised twice before the
    others; the cheaper is taken. It follows from the arguments alone, so every rank finds the same.

    Args:
        tokens: of each example, in one pass.
        coins: the examples that are denoised twice.
        ranks: times `size`, they divide the number of examples.
        size: examples of a rank and forward.
    """
    by_size = sorted(range(len(tokens)), key=lambda at: (-tokens[at], at))
    orders = by_size, sorted(by_size, key=lambda at: not coins[at])
    return min((_dealt(order, tokens, ranks, size) for order in orders), key=lambda shares: step_cost(shares, tokens, coins))


def step_cost(shares: list[list[list[int]]], tokens: Sequence[int], coins: Sequence[bool]) -> int:
    """What the busiest rank of each forward computes, in tokens of pass 1; pass 2 with recomputation and backward is four of it.

    A rank without a coin, where another has one, takes next to nothing through pass 1.
    """
    total = 0
    for forward in shares:
        total += 4 * max(sum(tokens[at] for at in own) for own in forward)
        if any(coins[at] for own in forward for at in own):
            total += max(sum(tokens[at] for at in own if coins[at]) for own in forward)
    return total


def _dealt(order: list[int], tokens: Sequence[int], ranks: int, size: int) -> list[list[list[int]]]:
    """Examples dealt in this order to the share with the fewest tokens that has room; shares of like size run at the same time."""
    shares: list[list[int]] = [[] for _ in range(len(order) // size)]
    open_shares = [(0, index) for index in range(len(shares))]  # a heap
    for example in order:
        load, index = heapq.heappop(open_shares)
        shares[index].append(example)
        if len(shares[index]) < size:
            heapq.heappush(open_shares, (load + tokens[example], index))
    shares.sort(key=lambda share: (-sum(tokens[at] for at in share), share))
    return [[sorted(share) for share in shares[start : start + ranks]] for start in range(0, len(shares), ranks)]


class PreparedData:
    """A prepared data set on disk: the rows of `train/` in a seeded global order, those of `validation/` in their own."""

    def __init__(self, folder: Path, *, canvas_length: int, vocab_size: int, eos_token_id: int, seed: int) -> None:
        self._train = _open(folder / "train")
        self._validation = _open(folder / "validation")
        self._canvas_length = canvas_length
        self._vocab_size = vocab_size
        self._eos = eos_token_id
        self._seed = seed
        self._order: tuple[int, torch.Tensor] | None = None
        self._tokens = _tokens_of_each(self._train, canvas_length)

    def __len__(self) -> int:
        return len(self._train)

    @property
    def validation_rows(self) -> int:
        return len(self._validation)

    def train_examples(self, positions: Iterable[int]) -> list[Example]:
        """The examples at these positions of the global shuffled stream, which never ends: epoch after epoch, each in a new order."""
        return [self._example(self._train[self._row(position)]) for position in positions]

    def train_draws(self, example: Example, position: int, min_corruption: float, self_conditioning_probability: float) -> Draws:
        """The noise of an example at a position of the stream."""
        return training_draws(
            self._seed,
            position,
            blocks=example.blocks,
            canvas_length=self._canvas_length,
            vocab_size=self._vocab_size,
            min_corruption=min_corruption,
            self_conditioning_probability=self_conditioning_probability,
        )

    def any_self_conditioned(self, positions: Iterable[int], probability: float) -> bool:
        """Whether any of these positions, other ranks' among them, is denoised twice."""
        return any(self_conditioning_coin(self._seed, position, probability) for position in positions)

    def share_out(self, positions: range, ranks: int, size: int, probability: float) -> list[list[list[int]]]:
        """The global batch at these positions, shared out evenly: [forward][rank] -> `size` positions (see `share_out`).

        Which examples make up a step, and their noise, follow from the positions; how many ranks there are only decides who takes which.
        """
        tokens = [int(self._tokens[self._row(position)]) + self._canvas_length for position in positions]
        coins = [self_conditioning_coin(self._seed, position, probability) for position in positions]
        return [[[positions[at] for at in own] for own in forward] for forward in share_out(tokens, coins, ranks, size)]

    def validation_examples(self, rows: range) -> list[Example]:
        """Held-out examples by their row; rows past the end repeat the last one (their weight is zero)."""
        return [self._example(self._validation[min(row, len(self._validation) - 1)]) for row in rows]

    def validation_draws(self, example: Example, level: float) -> Draws:
        """The fixed noise of a held-out example at a level."""
        return validation_draws(example.id, level, blocks=example.blocks, canvas_length=self._canvas_length, vocab_size=self._vocab_size)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._train))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, torch.from_numpy(epoch_order(self._seed, epoch, len(self._train))))
        return int(self._order[1][offset])

    def _example(self, row: dict[str, Any]) -> Example:
        return example_of(row, self._canvas_length, self._eos)


def filling_token(end_tokens: int | list[int]) -> int:
    """Which of a model's `eos_token_id` fills the last block: the first one."""
    return end_tokens[0] if isinstance(end_tokens, list) else end_tokens


def example_of(row: dict[str, Any], canvas_length: int, eos_token_id: int) -> Example:
    """A row of a prepared data set with its fill."""
    tokens = torch.tensor(row["input_ids"], dtype=torch.int64)
    if row["complete"]:
        fill = -(len(tokens) - row["prefix_length"]) % canvas_length
        tokens = torch.cat([tokens, tokens.new_full((fill,), eos_token_id)])
    return Example(tokens=tokens, prefix_length=row["prefix_length"], canvas_length=canvas_length, id=row["id"])


def rows_to_validate(rows: int, train: TrainConfig) -> int:
    """How many of so many held-out rows, the first ones, a validation takes."""
    return rows if train.validation_batches is None else min(rows, train.validation_batches * train.global_batch_size)


def _open(folder: Path) -> Dataset:
    try:
        data = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{folder}: not a prepared data set ({error}). Run `canvastune prepare`, or give the folder that it wrote"
        ) from None
    if not len(data):
        raise UserError(f"{folder}: the prepared data set has no row here. Prepare more rows, or change data.validation_fraction")
    return data


def _tokens_of_each(data: Dataset, canvas_length: int) -> np.ndarray:
    """int32[rows]: tokens of each row with its fill, as `Example` has them; of the tokens themselves, none is read."""
    table = data.with_format("arrow")[:]
    length, prefix = pc.list_value_length(table["input_ids"]).to_numpy(), table["prefix_length"].to_numpy()
    fill = -(length - prefix) % canvas_length
    return (length + np.where(table["complete"].to_numpy(), fill, 0)).astype(np.int32)


def _row_keys(draws: list[Draws], clean_lengths: list[int], canvas_lengths: list[int]) -> torch.Tensor | None:
    clean, canvas = [], []
    for draw, clean_length, canvas_length in zip(draws, clean_lengths, canvas_lengths, strict=True):
        if draw.dropout_key is None:
            return None
        keys = dropout_row_keys(draw.dropout_key, clean_length, canvas_length)
        clean.append(keys[0])
        canvas.append(keys[1])
    return torch.cat([*clean, *canvas])


def _rows(lengths: tuple[int, ...], keep: list[bool]) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(keep), torch.tensor(lengths)).nonzero().flatten()

"""Examples of a prepared data set as packed, ragged batches: no padding token ever reaches the model.

Shape letters: B examples, S clean tokens of one example, C canvas tokens of one example, N clean tokens of the batch
(sum of S), M canvas tokens of the batch (sum of C).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk

from canvastune.config.schema import TrainConfig
from canvastune.data.packing import Example, balance_microbatches, example_of
from canvastune.errors import UserError
from canvastune.noise import (
    NoiseSample,
    draw_self_conditioning,
    epoch_order,
    training_draws,
    validation_draws,
)


class TrainingDataset:
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

    def train_draws(self, example: Example, position: int, min_corruption: float, self_conditioning_probability: float) -> NoiseSample:
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
        return any(draw_self_conditioning(self._seed, position, probability) for position in positions)

    def balance_microbatches(self, positions: range, ranks: int, size: int, probability: float) -> list[list[list[int]]]:
        """The global batch at these positions, shared out evenly: [forward][rank] -> `size` positions (see `packing.balance_microbatches`).

        Which examples make up a step, and their noise, follow from the positions; how many ranks there are only decides who takes which.
        """
        tokens = [int(self._tokens[self._row(position)]) + self._canvas_length for position in positions]
        coins = [draw_self_conditioning(self._seed, position, probability) for position in positions]
        return [[[positions[at] for at in own] for own in forward] for forward in balance_microbatches(tokens, coins, ranks, size)]

    def validation_examples(self, rows: range) -> list[Example]:
        """Held-out examples by their row; rows past the end repeat the last one (their weight is zero)."""
        return [self._example(self._validation[min(row, len(self._validation) - 1)]) for row in rows]

    def validation_draws(self, example: Example, level: float) -> NoiseSample:
        """The fixed noise of a held-out example at a level."""
        return validation_draws(example.id, level, blocks=example.blocks, canvas_length=self._canvas_length, vocab_size=self._vocab_size)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._train))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, torch.from_numpy(epoch_order(self._seed, epoch, len(self._train))))
        return int(self._order[1][offset])

    def _example(self, row: dict[str, Any]) -> Example:
        return example_of(row, self._canvas_length, self._eos)


def validation_rows(rows: int, train: TrainConfig) -> int:
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

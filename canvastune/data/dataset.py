"""The prepared data set as a trainer sees it: examples in a seeded global order, with noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk

from canvastune.config import RunConfig
from canvastune.config.schema import Blocks, ObjectiveConfig, block_count
from canvastune.data.mixture import Interleaving, Mixture
from canvastune.data.packing import Example, Part, balance_microbatches, make_example, pad_token
from canvastune.errors import UserError
from canvastune.noise import (
    NoiseSample,
    drawn_blocks,
    epoch_order,
    training_block_draws,
    validation_block_draws,
)

if TYPE_CHECKING:
    from transformers import DiffusionGemmaConfig


class TrainingDataset:
    """A prepared data set on disk: the rows of `train/` in a seeded global order, those of
    `validation/` in file order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        canvas_length: int,
        vocab_size: int,
        eos_token_id: int,
        seed: int,
        objective: ObjectiveConfig,
    ) -> None:
        """Open both splits.

        Args:
            folder: what `prepare_data` wrote.
            canvas_length: tokens of a response block.
            eos_token_id: fills the last block of a response.
            seed: decides the order and the noise, on any number of ranks alike.
            objective: how many blocks of an example are denoised, the smallest corruption, and
                the probability of self-conditioning.

        Raises:
            UserError: a split that is missing, damaged or empty.
        """
        self._train = _open(folder / "train")
        self._validation = _open(folder / "validation")
        self._canvas_length = canvas_length
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        self._seed = seed
        self._objective = objective
        shares = Mixture.read(folder / "train", len(self._train)).shares
        self._rows = [share.rows for share in shares]  # of each source
        self._first_rows = [0, *itertools.accumulate(self._rows)]
        self._interleaving = Interleaving([share.weight for share in shares])
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each source: epoch and its order
        self._tokens, self._prefixes, self._blocks = _lengths(self._train, canvas_length)

    @classmethod
    def of_run(
        cls, folder: Path, config: RunConfig, model_config: DiffusionGemmaConfig
    ) -> TrainingDataset:
        """Open what a recipe trains on, for a model of this configuration.

        Raises:
            UserError: as the constructor.
        """
        text = model_config.text_config
        return cls(
            folder,
            canvas_length=model_config.canvas_length,
            vocab_size=text.vocab_size,
            eos_token_id=pad_token(text.eos_token_id),
            seed=config.seed,
            objective=config.objective,
        )

    def __len__(self) -> int:
        return len(self._train)

    @property
    def validation_rows(self) -> int:
        return len(self._validation)

    def train_examples(self, positions: Iterable[int]) -> list[Example]:
        """Return the examples at these positions of the endless shuffled stream: of each source,
        epoch after epoch, each in a new order.
        """
        return [self._example(self._train[self._row(position)]) for position in positions]

    def train_origins(self, positions: Iterable[int]) -> list[str]:
        """Return file and row from which each example at these positions was read: `rows.jsonl:12`."""
        return [str(self._train[self._row(position)]["origin"]) for position in positions]

    def train_draws(self, example: Example, position: int) -> tuple[NoiseSample, ...]:
        """Draw blocks, and the noise of each, of an example at a position of the stream."""
        return training_block_draws(
            self._seed,
            position,
            block_count(self._objective.blocks, example.blocks),
            blocks=example.blocks,
            canvas_length=self._canvas_length,
            vocab_size=self._vocab_size,
            min_corruption=self._objective.min_corruption,
            self_conditioning_probability=self._objective.self_conditioning_probability,
        )

    def any_self_conditioned(self, parts: Iterable[Part]) -> bool:
        """Return whether any block of these parts, of all ranks, is self-conditioned."""
        return any(coin for part in parts for _, coin in self._drawn(part.position)[part.blocks])

    def parts(self, positions: Iterable[int], most_blocks: int | None = None) -> list[Part]:
        """Divide the drawn blocks of each example into as few parts of at most `most_blocks` as
        possible, of even sizes.
        """
        parts = []
        for position in positions:
            blocks = len(self._drawn(position))
            count = -(-blocks // (most_blocks or blocks))
            edges = [blocks * at // count for at in range(count + 1)]
            parts += [
                Part(position, first, stop, stop == blocks)
                for first, stop in itertools.pairwise(edges)
            ]
        return parts

    def balance_microbatches(
        self, positions: range, ranks: int, size: int, most_blocks: int | None = None
    ) -> list[list[list[Part]]]:
        """Divide the global batch at these positions evenly: [forward][rank] -> `size` parts of
        examples, or fewer if the parts do not divide.

        Which examples make up a step, and their noise, follow from the positions only; the number
        of ranks decides which rank computes which example. See `packing.balance_microbatches`.
        """
        parts = self.parts(positions, most_blocks)
        tokens, again = [], []
        for part in parts:
            row = self._row(part.position)
            drawn = self._drawn(part.position)[part.blocks]
            clean, coins = int(self._tokens[row]), sum(coin for _, coin in drawn)
            if not part.is_last:  # only what its last block sees
                clean = int(self._prefixes[row]) + drawn[-1][0] * self._canvas_length
            tokens.append(clean + len(drawn) * self._canvas_length)
            again.append(clean + coins * self._canvas_length if coins else 0)
        nothing = [0] * (-len(parts) % (ranks * size))
        forwards = balance_microbatches(tokens + nothing, again + nothing, ranks, size)
        return [
            [[parts[index] for index in own if index < len(parts)] for own in forward]
            for forward in forwards
        ]

    def validation_examples(self, rows: range) -> list[Example]:
        """Return held-out examples by their row; rows past the end repeat the last one (their
        weight is zero).
        """
        return [
            self._example(self._validation[min(row, len(self._validation) - 1)]) for row in rows
        ]

    def most_validation_blocks(self, rows: int) -> int:
        """Return the blocks of the longest answer among the first held-out examples."""
        *_, blocks = _lengths(self._validation.select(range(rows)), self._canvas_length)
        return int(blocks.max())

    def validation_draws(
        self, example: Example, level: float, setting: Blocks
    ) -> tuple[NoiseSample, ...]:
        """Return the fixed noise of a held-out example's blocks at a level.

        Args:
            setting: `train.validation_blocks`.
        """
        return validation_block_draws(
            example.id,
            level,
            block_count(setting, example.blocks),
            blocks=example.blocks,
            canvas_length=self._canvas_length,
            vocab_size=self._vocab_size,
        )

    def _drawn(self, position: int) -> list[tuple[int, bool]]:
        """Return the blocks that a step denoises at a position, each with whether it does twice."""
        blocks = int(self._blocks[self._row(position)])
        return drawn_blocks(
            self._seed,
            position,
            block_count(self._objective.blocks, blocks),
            blocks=blocks,
            probability=self._objective.self_conditioning_probability,
        )

    def _row(self, position: int) -> int:
        source, count = self._interleaving.at(position)
        epoch, offset = divmod(count, self._rows[source])
        epoch_now, order = self._orders.get(source, (None, None))
        if order is None or epoch_now != epoch:
            order = epoch_order(self._seed, epoch, self._rows[source], source)
            self._orders[source] = (epoch, order)
        return self._first_rows[source] + int(order[offset])

    def _example(self, row: dict[str, Any]) -> Example:
        return make_example(row, self._canvas_length, self._eos_token_id)


def _open(folder: Path) -> Dataset:
    try:
        data = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{folder}: not a prepared data set ({error})",
            hint="Run `canvastune prepare`, or use the directory that it wrote.",
        ) from None
    if not len(data):
        raise UserError(
            f"{folder}: the prepared data set has no rows, expected at least one",
            hint="Prepare more rows, or change data.validation_fraction.",
        )
    return data


def _lengths(data: Dataset, canvas_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return int32[rows] three times: the tokens of each row with its fill, those of its prefix, and
    its blocks, as `Example` has them; the tokens are not read.
    """
    table = data.with_format("arrow")[:]
    length, prefix = (
        pc.list_value_length(table["input_ids"]).to_numpy(),
        table["prefix_length"].to_numpy(),
    )
    fill = -(length - prefix) % canvas_length
    tokens = length + np.where(table["complete"].to_numpy(), fill, 0)
    blocks = (length - prefix + fill) // canvas_length
    return tokens.astype(np.int32), prefix.astype(np.int32), blocks.astype(np.int32)

"""What another run's data are compared with: hashes of the prepared rows and counts of their tokens,
without a text; written next to the data card.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canvastune.errors import UserError

if TYPE_CHECKING:
    import datasets

_FILE = "profile.npz"
_HASH = 16  # hexadecimal digits of an id: 64 bits
_BATCH_ROWS = 512
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DataProfile:
    """Row hashes of both splits and token counts of all rows. On disk 8 bytes a row, and up to 12 for
    each different token of prompts and of responses.
    """

    train: np.ndarray  # [rows] uint64, sorted: the first 64 bits of each row's id
    validation: np.ndarray
    prompt: np.ndarray  # [highest token + 1] int64: how often the prompts have each token
    response: np.ndarray

    @classmethod
    def of(cls, splits: Mapping[str, datasets.Dataset]) -> DataProfile:
        """Read prepared splits, `train` and `validation`, a few hundred rows at a time."""
        # Here, as a report that only reads a profile does not need it.
        import pyarrow.compute as pc

        prompt, response = np.zeros(0, np.int64), np.zeros(0, np.int64)
        ids: dict[str, list[int]] = {split: [] for split in _SPLITS}
        for split in _SPLITS:
            arrow = splits[split].with_format("arrow")
            for table in arrow.iter(batch_size=_BATCH_ROWS):
                ids[split] += [int(id[:_HASH], 16) for id in table["id"].to_pylist()]
                tokens = pc.list_flatten(table["input_ids"]).to_numpy()
                lengths = pc.list_value_length(table["input_ids"]).to_numpy()
                starts = np.cumsum(lengths) - lengths
                change = np.zeros(len(tokens) + 1, np.int8)
                change[starts] += 1
                change[starts + table["prefix_length"].to_numpy()] -= 1
                in_prompt = np.cumsum(change[:-1], dtype=np.int8).astype(bool)
                prompt = _add(prompt, tokens[in_prompt])
                response = _add(response, tokens[~in_prompt])
        rows = {split: np.sort(np.array(found, np.uint64)) for split, found in ids.items()}
        return cls(**rows, prompt=prompt, response=response)

    @property
    def rows(self) -> np.ndarray:
        """Hashes of all rows, each once and sorted: [rows] uint64."""
        return np.union1d(self.train, self.validation)

    def write(self, folder: Path) -> None:
        """Write `profile.npz` into a prepared data set."""
        arrays = asdict(self)
        for side in ("prompt", "response"):
            counts = arrays.pop(side)
            tokens = np.flatnonzero(counts).astype(np.int32)
            arrays |= {f"{side}_tokens": tokens, f"{side}_counts": counts[tokens]}
        np.savez_compressed(folder / _FILE, **arrays)

    @classmethod
    def read(cls, folder: Path) -> DataProfile | None:
        """Read it from a prepared data set or a run's copy; None if an earlier version prepared it.

        Raises:
            UserError: the file cannot be read.
        """
        file = folder / _FILE
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as found:
                arrays = {split: found[split] for split in _SPLITS}
                for side in ("prompt", "response"):
                    tokens, counts = found[f"{side}_tokens"], found[f"{side}_counts"]
                    arrays[side] = np.zeros(int(tokens.max(initial=-1)) + 1, np.int64)
                    arrays[side][tokens] = counts
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{file}: cannot be read: {error}",
                hint="Restore the file, or remove it to compare without rows and tokens.",
            ) from None
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def _add(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Add the number of each token to the counts, which grow if a token is higher than before."""
    new = np.bincount(tokens, minlength=len(counts))
    new[: len(counts)] += counts
    return new

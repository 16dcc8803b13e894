"""Held-out rows that nearly repeat a training row: a score on them says less about new rows.

Two rows are compared by their shingles, which are runs of five tokens: the Jaccard index is the share
of shingles that both have, of those that either has. Exact repeats are left out earlier. Shingles
that many held-out rows have, such as those of a system prompt, do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from canvastune.data.sample_order import sample_order

_SHINGLE = 5  # tokens
_SIMILAR = 0.75  # Jaccard index, with shingles of five usual for removing near-duplicates
_FEWEST = 8  # shingles: shorter rows are alike by chance
_CHECKED = 2000  # held-out rows, the first in `sample_order`: those that evaluation asks first
_MOST_SHINGLES = 2**21  # of held-out rows in memory; of more, a sample by hash is compared
_COMMON_SHARE, _COMMON_ROWS = 4, 50  # a shingle of more than 1/4 of the rows, or of more than 50
_EXAMPLES = 5
_PRIME, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)


@dataclass(frozen=True)
class _Shingles:
    """Different shingles of rows, as hashes: sorted by row, then by hash."""

    rows: np.ndarray  # [n] int64
    hashes: np.ndarray  # [n] uint64


def near_duplicates(
    train: datasets.Dataset, validation: datasets.Dataset, batch_rows: int = 512
) -> dict[str, Any]:
    """Count the held-out rows that nearly repeat a training row.

    Memory does not grow with the splits. The training split is read once.

    Args:
        batch_rows: rows that are compared at a time.

    Returns:
        {"checked": held-out rows that were compared,
        "found": of them, those with a training row at least 75% alike,
        "examples": [{"held_out": origin, "train": origin, "similarity": Jaccard index}, ...]},
        with the most similar first.
    """
    checked = sample_order(validation["id"], validation["origin"])[:_CHECKED]
    held_out = validation.select(checked)
    index = _Index(held_out, batch_rows)
    for _, table in _tables(train, batch_rows):
        index.compare(table)
    found = sorted(index.best.items(), key=lambda item: (-item[1][0], item[0]))
    origins = held_out["origin"]
    return {
        "checked": len(checked),
        "found": len(found),
        "examples": [
            {"held_out": origins[row], "train": origin, "similarity": round(similarity, 3)}
            for row, (similarity, origin) in found[:_EXAMPLES]
        ],
    }


class _Index:
    """The shingles of the held-out rows, by hash."""

    def __init__(self, held_out: datasets.Dataset, batch_rows: int) -> None:
        self.best: dict[int, tuple[float, str]] = {}
        """By held-out row: the similarity of the most similar training row, and its origin."""
        count = len(held_out)
        tokens = sum(
            len(table["input_ids"].combine_chunks().values)
            for _, table in _tables(held_out, batch_rows)
        )
        self._sampled = np.uint64(max(1, -(-tokens // _MOST_SHINGLES)))
        parts = [
            self._sample(_shingles(table, start)) for start, table in _tables(held_out, batch_rows)
        ]
        rows = np.concatenate([part.rows for part in parts])
        hashes = np.concatenate([part.hashes for part in parts])
        different, owners = np.unique(hashes, return_counts=True)
        limit = max(2, min(count // _COMMON_SHARE, _COMMON_ROWS))
        self._common = different[owners > limit]
        own = ~_is_in(hashes, self._common)
        order = np.argsort(hashes[own], kind="stable")
        self._hashes, self._rows = hashes[own][order], rows[own][order]
        self._sizes = np.bincount(self._rows, minlength=count)

    def compare(self, table: Any) -> None:
        """Look for held-out rows like the training rows of a table."""
        found = self._sample(_shingles(table, 0))
        kept = ~_is_in(found.hashes, self._common)
        rows, hashes = found.rows[kept], found.hashes[kept]
        sizes = np.bincount(rows, minlength=len(table))
        first = np.searchsorted(self._hashes, hashes, "left")
        matches = np.searchsorted(self._hashes, hashes, "right") - first
        if not matches.any():
            return
        starts = np.repeat(first - np.cumsum(matches) + matches, matches)
        owners = self._rows[starts + np.arange(matches.sum())]
        pairs, shared = np.unique(
            np.repeat(rows, matches) * len(self._sizes) + owners, return_counts=True
        )
        row, owner = np.divmod(pairs, len(self._sizes))
        similarity = shared / (sizes[row] + self._sizes[owner] - shared)
        near = np.flatnonzero((similarity >= _SIMILAR) & (self._sizes[owner] >= _FEWEST))
        for at in near.tolist():
            known = self.best.get(int(owner[at]))
            if known is None or similarity[at] > known[0]:
                origin = table["origin"][int(row[at])].as_py()
                self.best[int(owner[at])] = (float(similarity[at]), origin)

    def _sample(self, found: _Shingles) -> _Shingles:
        kept = found.hashes % self._sampled == 0
        return _Shingles(found.rows[kept], found.hashes[kept])


def _tables(split: datasets.Dataset, batch_rows: int) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a split as Arrow tables, each with the number of its first row."""
    arrow = split.with_format("arrow")
    for start in range(0, len(split), batch_rows):
        yield start, arrow[start : start + batch_rows]


def _shingles(table: Any, first_row: int) -> _Shingles:
    """Return the shingles of the rows of an Arrow table, whose first one has this number."""
    column = table["input_ids"].combine_chunks()
    offsets = column.offsets.to_numpy()
    tokens = column.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.uint64)
    lengths = np.diff(offsets)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    count = len(tokens) - _SHINGLE + 1
    if count < 1:
        return _Shingles(np.empty(0, np.int64), np.empty(0, np.uint64))
    hashes = np.zeros(count, np.uint64)
    for at in range(_SHINGLE):  # modulo 2**64
        hashes = hashes * _PRIME + tokens[at : at + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(33)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(33)
    inside = row_of[:count] == row_of[_SHINGLE - 1 :]
    rows, hashes = row_of[:count][inside], hashes[inside]
    order = np.lexsort((hashes, rows))
    rows, hashes = rows[order], hashes[order]
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])
    return _Shingles(rows[new] + first_row, hashes[new])


def _is_in(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return whether each hash is among `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(hashes), bool)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.asarray(known[at] == hashes)


def describe(found: dict[str, Any]) -> list[str]:
    """Say in a sentence that rows nearly repeat each other across the split; [] if none does."""
    if not found["found"]:
        return []
    example = found["examples"][0]
    return [
        f"{found['found']:,} of {found['checked']:,} held-out rows nearly repeat a training row, such "
        f"as {example['held_out']} and {example['train']} ({example['similarity']:.0%} alike): the "
        "score says less about new rows (hold out whole groups with data.validation)"
    ]

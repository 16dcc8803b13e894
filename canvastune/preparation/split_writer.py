"""Write the splits of a prepared data set; hash their content."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import MemoryMappedTable

from canvastune.data.sample_order import sample_order
from canvastune.io.hashing import hash_path

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("prefix_length", pa.int32()),
        ("complete", pa.bool_()),
        ("id", pa.string()),
        ("origin", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
    ]
)
_HASHED_ROWS = 512  # rows hashed at a time


class SplitWriter:
    """One split: written batch by batch to an Arrow stream, then saved in the layout of
    `Dataset.save_to_disk`.
    """

    def __init__(self, folder: Path, *, batch_rows: int, batch_tokens: int) -> None:
        """Begin the split's file.

        Args:
            folder: the split's directory, written by `save`.
            batch_rows, batch_tokens: rows are written when so many rows or tokens wait.
        """
        self.lowest = 1.0  # smallest split position of a row
        self._batch_rows, self._batch_tokens = batch_rows, batch_tokens
        self._folder = folder
        self._file = folder.with_suffix(".arrow")
        self._writer = pa.ipc.new_stream(str(self._file), _SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0  # of these rows
        self._lengths = (array("i"), array("i"))  # of every row, before the cut: prefix, response
        self._sources = array("H")  # of every row
        self._chosen: list[int] | None = None

    @property
    def count(self) -> int:
        """Rows added."""
        return len(self._lengths[0])

    def rows_by_source(self) -> Counter[int]:
        """Count the rows that are kept, by the index of their data set."""
        return Counter(self.sources())

    def sources(self) -> list[int]:
        """Return the index of the data set of each row that is kept, in the order of the rows."""
        chosen = range(self.count) if self._chosen is None else self._chosen
        return [self._sources[at] for at in chosen]

    def add(self, example: dict[str, Any], response: int, position: float, source: int) -> None:
        """Add a row.

        Args:
            response: the number of its response tokens before the cut.
            position: that decides on the split, from `split_position`.
            source: index of its data set.
        """
        self._rows.append(example)
        self._tokens += len(example["input_ids"])
        self._lengths[0].append(example["prefix_length"])
        self._lengths[1].append(response)
        self._sources.append(source)
        self.lowest = min(self.lowest, position)
        if len(self._rows) == self._batch_rows or self._tokens > self._batch_tokens:
            self._flush()

    def keep_sample(self, limit: int | None) -> dict[int, list[tuple[int, int]]]:
        """Keep the first `limit` rows in `sample_order`, in any order of arrival; return prefix and
        response of the others, by the index of their data set.
        """
        left_out: dict[int, list[tuple[int, int]]] = {}
        if limit is None or self.count <= limit:
            return left_out
        with pa.memory_map(str(self._close())) as stream:
            rows = pa.ipc.open_stream(stream).read_all()
            ranked = sample_order(rows["id"].to_pylist(), rows["origin"].to_pylist())
        self._chosen = sorted(ranked[:limit])
        for at in ranked[limit:]:
            lengths = (self._lengths[0][at], self._lengths[1][at])
            left_out.setdefault(self._sources[at], []).append(lengths)
        return left_out

    def save(self) -> datasets.Dataset:
        """Write the split's directory and return the data set, memory-mapped from it."""
        file = self._close()
        # The library's own fingerprint depends on the path and the time: equal rows must be equal
        # files.
        dataset = datasets.Dataset(
            MemoryMappedTable.from_file(str(file)), fingerprint=hash_path(file)[:16]
        )
        if self._chosen is not None:
            dataset = dataset.select(self._chosen, keep_in_memory=True)
        with _no_bars():
            dataset.save_to_disk(str(self._folder))
        file.unlink()
        return datasets.load_from_disk(str(self._folder))

    def _close(self) -> Path:
        self._flush()
        self._writer.close()
        return self._file

    def _flush(self) -> None:
        if self._rows:
            tokens = array("i")
            for row in self._rows:
                tokens += row["input_ids"]
            ends = itertools.accumulate((len(row["input_ids"]) for row in self._rows), initial=0)
            flat = pa.Array.from_buffers(pa.int32(), len(tokens), [None, pa.py_buffer(tokens)])
            columns = [pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)]
            columns += [
                pa.array([row[field.name] for row in self._rows], field.type)
                for field in list(_SCHEMA)[1:]
            ]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
            self._rows, self._tokens = [], 0


def split_position(id: str) -> float:
    """Map a conversation's id to [0, 1): uniform, and independent of the rest of the data set."""
    return int(id[:13], 16) / 16**13


def content_hash(splits: dict[str, datasets.Dataset]) -> str:
    """Return the SHA-256 of the rows in order: equal for equal rows, tokenizer and cut, on any
    machine.
    """
    digest = hashlib.sha256()
    for split, dataset in splits.items():
        names = ("id", "length", "tokens", "prefix", "complete")
        columns = {name: hashlib.sha256() for name in names}  # separate: batches do not matter
        for table in dataset.with_format("arrow").iter(batch_size=_HASHED_ROWS):
            columns["id"].update("".join(table["id"].to_pylist()).encode())
            columns["length"].update(pc.list_value_length(table["input_ids"]).to_numpy().tobytes())
            columns["tokens"].update(pc.list_flatten(table["input_ids"]).to_numpy().tobytes())
            columns["prefix"].update(table["prefix_length"].to_numpy().tobytes())
            columns["complete"].update(bytes(table["complete"].to_pylist()))
        found = " ".join(column.hexdigest() for column in columns.values())
        digest.update(f"{split} {len(dataset)} {found}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the data set library's progress bars: writing is too short for one."""
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()

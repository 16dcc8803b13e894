"""Read the rows of tables: CSV and TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from canvastune.errors import UserError, one_line

_BATCH = 256  # rows of Parquet or Arrow decoded at a time
_CHUNK = 2**18  # bytes unpacked at a time
_Convert = Callable[[Any], Any]


class _Lines:
    """The lines of a text, which count the characters since the last row."""

    def __init__(self, stream: BinaryIO, max_row: int) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._max_row = max_row
        self.characters = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._max_row + 1)
        self.characters += len(line)
        if self.characters > self._max_row:
            raise OverflowError
        if not line:
            raise StopIteration
        return line


def read_delimited(
    file: str, stream: BinaryIO, delimiter: str, max_row: int
) -> Iterator[tuple[int, Any, str | None]]:
    """Read CSV or TSV with a header: rows of text by column, None where a cell is empty.

    A row that has more or fewer cells than the header, or text outside of its quotes, is a row with
    a problem. Blank lines are skipped.

    Raises:
        UserError: an unusable header, or a row that does not end: its quote is not closed.
    """
    lines = _Lines(stream, max_row)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number, line = 0, 0
    # The library's limit on a cell is one for the whole process, and lower than a row's.
    csv.field_size_limit(max(csv.field_size_limit(), max_row))
    while True:
        lines.characters = 0
        problem, cells = None, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (OverflowError, csv.Error) as error:
            if isinstance(error, OverflowError) or "unexpected end of data" in str(error):
                reached = "the file ends inside a quoted cell"
                if isinstance(error, OverflowError):
                    reached = f"longer than {max_row // 2**20} MiB"
                raise UserError(
                    f"{file}: row {number + 1} (line {line + 1}): {reached}",
                    hint='Close the quote; inside a quoted cell, write a quote as "".',
                ) from None
            problem = (
                'text after a closing quote; inside a quoted cell, a quote is written as ""'
                if "expected after" in str(error)
                else one_line(error)
            )
        first, line = line + 1, reader.line_num
        where = f"line {first}" if first == line else f"lines {first} to {line}"
        if problem is None and not cells:
            continue
        if header is None:
            if problem is not None:
                raise UserError(f"{file}: {where}: {problem}", hint="Write the header again.")
            header = _header(file, cells, delimiter)
            continue
        number += 1
        if problem is None and len(cells) != len(header):
            problem = f"{len(cells)} cells, expected {len(header)}, as in the header"
        if problem is not None:
            yield number, None, f"{where}: {problem}"
            continue
        yield number, {key: cell or None for key, cell in zip(header, cells, strict=True)}, None


def _header(file: str, cells: list[str], delimiter: str) -> list[str]:
    """Return the names of the columns; pandas leaves that of its index empty."""
    names = [cell.strip() or f"column {at}" for at, cell in enumerate(cells, 1)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{file}: the header has the column {repeated[0]!r} twice",
            hint="Rename one of them.",
        )
    others = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
    other = next((each for each in others if each != delimiter and each in names[0]), None)
    if len(names) == 1 and other is not None:
        kind = "csv" if delimiter == "," else "tsv"
        raise UserError(
            f"{file}: the header is one column, {names[0]!r}, expected columns separated by"
            f" {others[delimiter]} in a .{kind} file",
            hint=(
                f"Rename the file to .{'tsv' if other == chr(9) else 'csv'}."
                if other != ";"
                else "Save it with commas."
            ),
        )
    return names


def read_parquet(stream: BinaryIO) -> Iterator[tuple[int, Any, None]]:
    """Read Parquet, a few hundred rows at a time; a .gz file is unpacked to a temporary file."""
    with ExitStack() as stack:
        if isinstance(stream, gzip.GzipFile):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            while chunk := stream.read(_CHUNK):
                unpacked.write(chunk)
            unpacked.seek(0)
            stream = unpacked
        yield from _rows(pq.ParquetFile(stream).iter_batches(batch_size=_BATCH))


def read_ipc(path: Path) -> Iterator[tuple[int, Any, None]]:
    """Read an Arrow file, in the format of files or of streams, memory-mapped."""
    with pa.memory_map(str(path)) as stream:
        try:
            file = pa.ipc.open_file(stream)
        except pa.ArrowInvalid:
            stream.seek(0)
            batches = iter(pa.ipc.open_stream(stream))
        else:
            batches = (file.get_batch(at) for at in range(file.num_record_batches))
        yield from _rows(_checked(batches))


def read_dataset(file: str, table: datasets.Dataset) -> Iterator[tuple[int, Any, None]]:
    """Read a data set as Arrow: no image or audio is decoded.

    Raises:
        UserError: a damaged file; names `file` and the row reached.
    """
    tables = table.with_format("arrow").iter(batch_size=_BATCH)
    row = 0
    try:
        for found in _rows(_checked(batch for each in tables for batch in each.to_batches())):
            row = found[0]
            yield found
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: after row {row}: not a readable data set ({one_line(error)})",
            hint="Copy or save the data set again.",
        ) from None


def _checked(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Divide batches that come from a file as they are, and check them: to read an offset that is
    damaged would end the process.
    """
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            part.validate(full=True)
            yield part


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, Any, None]]:
    number = 0
    nested: dict[str, _Convert] | None = None
    for batch in batches:
        if nested is None:
            converts = {field.name: _as_json(field.type) for field in batch.schema}
            nested = {name: convert for name, convert in converts.items() if convert is not None}
        for row in batch.to_pylist():
            number += 1
            for name, convert in nested.items():
                if row[name] is not None:
                    row[name] = convert(row[name])
            yield number, row, None


def _as_json(kind: pa.DataType) -> _Convert | None:
    """Return what turns a value of this type into the JSON value that was stored; None if nothing
    has to be done.

    All structs of a column have the same keys: where one was missing, Arrow has a null. It does
    not record the difference, so a null inside of a column is taken for a missing key. A map with text
    keys is an object. `datasets` stores values whose keys or types differ, such as messages of
    which some have tool calls, as JSON text of Arrow's type `arrow.json`.
    """
    if isinstance(kind, pa.JsonType):
        return json.loads
    if pa.types.is_struct(kind):
        return _struct({field.name: _as_json(field.type) for field in kind})
    if pa.types.is_map(kind):
        return _map(_as_json(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list(_as_json(kind.value_type))
    return None


def _struct(converts: dict[str, _Convert | None]) -> _Convert:
    def convert(value: dict[str, Any]) -> dict[str, Any]:
        return {
            key: each if (inner := converts[key]) is None else inner(each)
            for key, each in value.items()
            if each is not None
        }

    return convert


def _list(inner: _Convert | None) -> _Convert | None:
    if inner is None:
        return None
    return lambda value: [None if each is None else inner(each) for each in value]


def _map(inner: _Convert | None) -> _Convert:
    def convert(value: list[tuple[Any, Any]]) -> Any:
        keys = {key for key, _ in value}
        if len(keys) < len(value) or not all(isinstance(key, str) for key in keys):
            return value  # not an object: the row's form is judged as it is
        return {
            key: each if inner is None else inner(each) for key, each in value if each is not None
        }

    return convert

"""Read the rows of one data file, each with its place.

A fault of one row (a line that is not JSON) is stored in the row, so that the step can count it; a
fault of a whole file (not gzip, truncated, not Parquet) is an error at once, with the file and the
last row that could be read.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from canvastune.errors import UserError, one_line
from canvastune.io.json_text import RepeatedKeyError, unique_keys
from canvastune.preparation.json_document import ReadLimits, read_document
from canvastune.preparation.tables import read_delimited, read_ipc, read_parquet

# A row's number, its value, and why it cannot be read (then the value is None) or None.
Found = tuple[int, Any, str | None]

_decode = json.JSONDecoder(object_pairs_hook=unique_keys).decode
_GZIP_MAGIC = b"\x1f\x8b"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        file: the path as the user would open it, or `hub-id[split]`.
        name: the same relative to the source: independent of where the data is stored.
        number: 1-based: the line of a .jsonl file, the position in any other, without the header.
        value: the decoded row, of any type; None if it has a problem.
        problem: why it cannot be read, or None.
        source: index of the data set among those that are read together.
    """

    file: str
    name: str
    number: int
    value: Any
    problem: str | None = None
    source: int = 0

    @property
    def origin(self) -> str:
        """`train.jsonl:12`, or `openai/gsm8k[train]:12`."""
        return f"{self.name}:{self.number}"


def read_file(file: str, path: Path, limits: ReadLimits) -> Iterator[Found]:
    """Read a local file by its suffix.

    Args:
        file: its name, for messages.

    Raises:
        UserError: any fault of the file; names the row reached.
    """
    row = 0
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        for found in _read(file, path, kind, limits):
            row = found[0]
            yield found
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"{file}: after row {row}" if row else file
        raise UserError(
            f"{where}: incomplete or invalid gzip file ({one_line(error)})",
            hint="Copy or compress the file again.",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: after row {row}: not UTF-8 ({error.reason})",
            hint="Convert the file to UTF-8.",
        ) from None
    except pa.ArrowException as error:
        where = f"{file}: after row {row}" if row else file
        raise UserError(
            f"{where}: not a readable {kind.capitalize()} file ({one_line(error)})",
            hint="Write or copy the file again.",
        ) from None
    except OSError as error:
        where = f"{file}: after row {row}" if row else file
        raise UserError(
            f"{where}: cannot be read ({one_line(error)})",
            hint="Check that the file is complete and that you may read it.",
        ) from None


def _read(file: str, path: Path, kind: str, limits: ReadLimits) -> Iterator[Found]:
    opened = functools.partial(_stream, file, path)
    if kind == "json":  # opened once per column, if it is an object of lists
        yield from read_document(file, opened, limits)
        return
    with opened() as stream:
        if kind == "jsonl":
            yield from _read_lines(file, stream, limits.row)
        elif kind in ("csv", "tsv"):
            delimiter = "," if kind == "csv" else "\t"
            yield from read_delimited(file, stream, delimiter, limits.row)
        elif kind == "arrow":
            yield from read_ipc(path)
        else:
            yield from read_parquet(stream)


@contextlib.contextmanager
def _stream(file: str, path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed if its name ends in .gz."""
    with path.open("rb") as raw:
        magic = raw.read(2)
        raw.seek(0)
        if not magic:
            raise UserError(f"{file}: the file is empty (0 bytes)", hint="Write the file again.")
        if path.name.endswith(".gz"):
            with gzip.open(raw) as stream:
                if stream.peek(2)[:2] in _UTF_16:
                    raise _not_utf8(file)
                yield stream  # type: ignore[misc]  # GzipFile is a binary stream, but not declared as one
            return
        if magic == _GZIP_MAGIC:
            raise UserError(
                f"{file}: the file is gzip, expected a name that ends in .gz",
                hint=f"Rename it to {path.name}.gz.",
            )
        if magic in _UTF_16:
            raise _not_utf8(file)
        yield raw


def _not_utf8(file: str) -> UserError:
    return UserError(
        f"{file}: row 1: the file is UTF-16, expected UTF-8",
        hint="Convert it, for example with iconv -f utf-16 -t utf-8.",
    )


def _read_lines(file: str, stream: BinaryIO, max_row: int) -> Iterator[Found]:
    """Read JSON lines; blank lines are skipped, a line that is not JSON is a row with a problem."""
    number = 0
    while line := stream.readline(max_row + 1):
        number += 1
        if len(line) > max_row:
            raise UserError(
                f"{file}: row {number}: longer than {max_row // 2**20} MiB",
                hint="Write one JSON object per line.",
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, _decode(line.decode("utf-8")), None
        except UnicodeDecodeError as error:
            byte, at = line[error.start], error.start + 1
            yield number, None, f"not UTF-8: byte 0x{byte:02x} at position {at} of the line"
        except RecursionError:
            yield number, None, "not JSON: nested too deeply"
        except RepeatedKeyError as error:
            yield number, None, str(error)
        except ValueError as error:
            yield number, None, f"not JSON: {one_line(error)}"

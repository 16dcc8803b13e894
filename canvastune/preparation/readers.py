"""Read the rows of a data set one at a time, each with its place: the only code that opens a user's
data.

A fault of one row (a line that is not JSON) is stored in the row, so that the step can count it; a
fault of a whole file (not gzip, truncated, not Parquet) is an error at once, with the file and the
last row that could be read.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from canvastune.config.schema import DataConfig
from canvastune.errors import UserError, one_line

_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz")
_BLANKS = re.compile(r"[ \t\r\n]*")
_BATCH = 256  # rows of Parquet or Arrow decoded at a time
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 2**18  # bytes unpacked at a time
_TRAIN_WORDS = frozenset({"train", "training"})
_HELD_OUT_WORDS = frozenset({"test", "testing", "validation", "valid", "val", "dev", "eval"})


@dataclass(frozen=True)
class ReadLimits:
    """Bounds of what a reader holds in memory."""

    row: int = 64 * 2**20  # bytes (JSON lines) or characters (JSON array) of one row
    window: int = 2**18  # characters of a JSON array read at a time


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        file: the path as the user would open it, or `hub-id[split]`.
        name: the same relative to the source: independent of where the data is stored.
        number: 1-based: the line of a .jsonl file, the position in any other.
        value: the decoded row, of any type; None if it has a problem.
        problem: why it cannot be read, or None.
    """

    file: str
    name: str
    number: int
    value: Any
    problem: str | None = None

    @property
    def origin(self) -> str:
        """`train.jsonl:12`, or `openai/gsm8k[train]:12`."""
        return f"{self.name}:{self.number}"


@dataclass(frozen=True)
class Source:
    """An opened data set. `path` is the local file or folder, None for the Hub."""

    label: str
    path: Path | None
    _parts: tuple[tuple[str, str, Any], ...]  # (file, name, Path or datasets.Dataset)

    def rows(self, limits: ReadLimits = ReadLimits()) -> Generator[Row, None, None]:
        """Read every row in order, with a few hundred of them in memory.

        Raises:
            UserError: a file that cannot be read completely; names the file, the row reached and
                the reason.
        """
        for file, name, part in self._parts:
            is_table = isinstance(part, datasets.Dataset)
            read = (
                _read_arrow(file, name, part) if is_table else _read_file(file, name, part, limits)
            )
            empty = True
            for row in read:
                empty = False
                yield row
            if empty:
                raise UserError(
                    f"{file}: has no rows, expected at least one",
                    hint="Use a file with rows, or remove this one from the folder.",
                )


def open_source(config: DataConfig) -> Source:
    """Find the data set that a recipe names: a local file, a folder of files, a local data set
    repository, or the Hub.

    A folder whose README.md describes configurations (the Hub's layout) is read as the Hub reads
    it, with `config.config` and `config.split`; from any other folder, all data files below it are
    read in the order of their names. `config.config` and `config.revision` are ignored for plain
    files.

    Raises:
        UserError: no such file or data set, an unsupported file type, a folder that mixes splits.
    """
    text = config.source
    path = Path(text).expanduser()
    if path.is_dir():
        return (
            _open_repository(config, str(path), path)
            if _is_repository(path)
            else _open_folder(path)
        )
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(
                f"data.source: {path}: unsupported file type, expected one of"
                f" {', '.join(_SUFFIXES)}",
                hint="Convert the file.",
            )
        return Source(str(path), path, ((str(path), path.name, path),))
    if text.startswith((".", "/", "~")) or text.endswith(_SUFFIXES) or text.count("/") > 1:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise UserError(
            f"data.source: {text}: no such file or folder",
            hint=(
                f"Did you mean {path.parent / near[0]}?"
                if near
                else "Check the path, or use a Hub data set id."
            ),
        )
    return _open_repository(config, text, None)


def _open_folder(folder: Path) -> Source:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name.endswith(_SUFFIXES)
        and not _is_hidden(path.relative_to(folder))
    )
    if not files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"data.source: {folder}: no data file in this folder: found {found}, expected"
            f" {', '.join(_SUFFIXES)}",
            hint="Use a folder with data files.",
        )
    words = {
        file: set(re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower()))
        for file in files
    }
    train = [file for file in files if words[file] & _TRAIN_WORDS]
    held_out = [file for file in files if words[file] & _HELD_OUT_WORDS]
    if train and held_out:  # reading both would silently train on the test set
        raise UserError(
            f"data.source: {folder}: the folder mixes splits ({train[0].relative_to(folder)},"
            f" {held_out[0].relative_to(folder)})",
            hint="Use one file, or a folder with only the training files.",
        )
    return Source(
        str(folder),
        folder,
        tuple((str(file), file.relative_to(folder).as_posix(), file) for file in files),
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_repository(folder: Path) -> bool:
    """Return whether the folder's README.md has the YAML front matter of a Hub data set."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    head = re.match(
        r"---\s*\n(.*?)\n---\s*(?:\n|$)",
        readme.read_text(encoding="utf-8", errors="replace"),
        re.DOTALL,
    )
    if head is None:
        return False
    try:
        tree = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise UserError(
            f"{readme}: invalid YAML front matter: {one_line(error)}",
            hint="Correct it, or remove the file.",
        ) from None
    return isinstance(tree, dict) and ("configs" in tree or "dataset_info" in tree)


def _open_repository(config: DataConfig, location: str, path: Path | None) -> Source:
    """Open a data set repository: `location` is a Hub id, or a local folder in the Hub's layout
    (then `path` is set).
    """
    what = " ".join(
        ["data.source:", location, *([f"(config {config.config})"] if config.config else [])]
    )
    revision = config.revision if path is None else None
    try:
        table = datasets.load_dataset(
            location, name=config.config, split=config.split, revision=revision
        )
    except DatasetNotFoundError as error:
        raise UserError(
            f"{what}: data set not found on the Hub at revision {revision or 'main'}, or access"
            f" denied ({one_line(error)})",
            hint="Check the name, the revision and HF_TOKEN, or use a local file.",
        ) from None
    except (
        ValueError
    ) as error:  # a missing configuration or split: the message lists the existing ones
        raise UserError(
            f"{what}: {one_line(error)}",
            hint=f"Set data.config and data.split (now {config.split!r}) to one of those.",
        ) from None
    except (
        HfHubHTTPError,
        ConnectionError,
        OSError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        if "scripts are no longer supported" in str(error):
            raise UserError(
                f"{what}: this data set needs a loading script; remote code is not executed",
                hint="Use its Parquet or JSON lines files.",
            ) from None
        raise UserError(
            f"{what}: cannot be downloaded or read ({one_line(error)})",
            hint="Check the network, or use a local file or folder.",
        ) from None
    label = f"{config.source}[{config.split}]"
    return Source(label, path, ((label, label, table),))


def _read_file(file: str, name: str, path: Path, limits: ReadLimits) -> Iterator[Row]:
    """Read one local file by its suffix; any fault of the file becomes a UserError with the row
    reached.
    """
    row = 0
    try:
        with _stream(file, path) as stream:
            plain = path.name.removesuffix(".gz")
            if plain.endswith(".jsonl"):
                read = _read_lines(file, name, stream, limits.row)
            elif plain.endswith(".json"):
                read = _read_array(file, name, stream, limits)
            else:
                read = _read_parquet(file, name, stream)
            for found in read:
                row = found.number
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
            f"{where}: not a readable Parquet file ({one_line(error)})",
            hint="Write or copy the file again.",
        ) from None
    except OSError as error:
        where = f"{file}: after row {row}" if row else file
        raise UserError(
            f"{where}: cannot be read ({one_line(error)})",
            hint="Check that the file is complete and that you may read it.",
        ) from None


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
                yield stream  # type: ignore[misc]  # GzipFile is a binary stream, but not declared as one
            return
        if magic == _GZIP_MAGIC:
            raise UserError(
                f"{file}: the file is gzip, expected a name that ends in .gz",
                hint=f"Rename it to {path.name}.gz.",
            )
        if magic in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                f"{file}: row 1: the file is UTF-16, expected UTF-8",
                hint="Convert it, for example with iconv -f utf-16 -t utf-8.",
            )
        yield raw


def _read_lines(file: str, name: str, stream: BinaryIO, max_row: int) -> Iterator[Row]:
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
            yield Row(file, name, number, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            yield Row(
                file,
                name,
                number,
                None,
                f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1} of the"
                " line",
            )
        except RecursionError:
            yield Row(file, name, number, None, "not JSON: nested too deeply")
        except ValueError as error:
            yield Row(file, name, number, None, f"not JSON: {one_line(error)}")


class _JsonText:
    """A JSON text decoded incrementally from a window that moves over it."""

    def __init__(self, stream: BinaryIO, limits: ReadLimits) -> None:
        self._limits = limits
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._decode = json.JSONDecoder().raw_decode
        self._window = ""
        self._at = 0
        self._at_end = False  # the window reaches the end of the text

    def peek(self) -> str:
        """Return the next character that is not blank, without consuming it; empty at the end of
        the text.
        """
        while True:
            self._at = _BLANKS.match(self._window, self._at).end()  # type: ignore[union-attr]  # matches nothing as well
            if self._at < len(self._window) or self._at_end:
                return self._window[self._at : self._at + 1]
            self._grow(self._limits.window)

    def take(self) -> str:
        """Consume the next character that is not blank; empty at the end of the text."""
        found = self.peek()
        self._at += len(found)
        return found

    def value(self) -> Any:
        """Consume the next JSON value.

        Raises:
            ValueError: it is not JSON, or longer than a row may be.
        """
        self.peek()
        while True:
            try:
                value, end = self._decode(self._window, self._at)
                if (
                    end < len(self._window) or self._at_end
                ):  # else a number may continue after the window
                    self._at = end
                    return value
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except ValueError:
                if self._at_end:
                    raise
                if len(self._window) - self._at > self._limits.row:
                    raise ValueError(
                        f"longer than {self._limits.row // 2**20} MiB, or an open string or bracket"
                    ) from None
            self._grow(max(self._limits.window, len(self._window) - self._at))

    def _grow(self, characters: int) -> None:
        more = self._text.read(characters)
        self._at_end = not more
        self._window = self._window[self._at :] + more
        self._at = 0


def _read_array(file: str, name: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Row]:
    """Read the elements of one JSON array; an element that is not JSON makes the rest of the file
    unreadable.
    """
    text = _JsonText(stream, limits)
    if (found := text.take()) != "[":
        what = {"{": "an object", "": "nothing"}.get(found, repr(found))
        raise UserError(
            f"{file}: expected one JSON array of objects, found {what}",
            hint="If there is one object per line, rename the file to .jsonl.",
        )
    if text.peek() == "]":
        return
    for number in itertools.count(1):
        try:
            value = text.value()
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise UserError(
                f"{file}: row {number}: not JSON ({one_line(error)}); the rest of the array cannot"
                " be read",
                hint="Correct this row, or write one object per line (.jsonl).",
            ) from None
        yield Row(file, name, number, value)
        if (found := text.take()) == "]":
            return
        if found != ",":
            what = f"found {found!r}" if found else "the file ends"
            raise UserError(
                f"{file}: after row {number}: expected ',' or ']', {what}",
                hint="Write the file again, or one object per line (.jsonl).",
            )


def _read_parquet(file: str, name: str, stream: BinaryIO) -> Iterator[Row]:
    """Read Parquet, a few hundred rows at a time; a .gz file is unpacked to a temporary file."""
    with contextlib.ExitStack() as stack:
        if isinstance(stream, gzip.GzipFile):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            while chunk := stream.read(_CHUNK):
                unpacked.write(chunk)
            unpacked.seek(0)
            stream = unpacked
        number = 0
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield Row(file, name, number, value)


def _read_arrow(file: str, name: str, table: datasets.Dataset) -> Iterator[Row]:
    number = 0
    for batch in table.with_format("arrow").iter(
        batch_size=_BATCH
    ):  # as Arrow: no image or audio is decoded
        for value in batch.to_pylist():
            number += 1
            yield Row(file, name, number, value)

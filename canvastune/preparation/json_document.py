"""Read the rows of one JSON document, without holding it: an array of objects, an object whose only
key holds such an array, or an object of equally long columns.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from canvastune.errors import UserError, one_line
from canvastune.io.json_text import RepeatedKeyError, unique_keys

_BLANKS = re.compile(r"[ \t\r\n]*")
_TURN_KEYS = frozenset({"role", "from"})  # an object with one of them is a turn, not a row

_PLAIN, _STRICT = json.JSONDecoder(), json.JSONDecoder(object_pairs_hook=unique_keys)

Streams = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class ReadLimits:
    """Bounds of what a reader holds in memory."""

    row: int = 64 * 2**20  # bytes (JSON lines) or characters (JSON, CSV) of one row
    window: int = 2**18  # characters of a JSON document read at a time


class _InvalidValue(dict[str, Any]):
    """Stands for a value that is JSON, but has an object in which a key appears twice."""

    problem = ""


class _JsonText:
    """A JSON text decoded incrementally from a window that moves over it."""

    def __init__(self, stream: BinaryIO, limits: ReadLimits) -> None:
        self._limits = limits
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._window = ""
        self._at = 0
        self._at_end = False  # the window reaches the end of the text

    def peek(self) -> str:
        """Return the next character that is not blank, unconsumed; empty at the end of the text."""
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

        An object with a repeated key, or a list with one, is an `_InvalidValue`.

        Raises:
            ValueError: it is not JSON, or longer than a row may be.
        """
        self.peek()
        while True:
            try:
                value, end = self._decode()
                # Else a number may continue after the window.
                if end < len(self._window) or self._at_end:
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

    def _decode(self) -> tuple[Any, int]:
        """Return the value at the current place of the window, and where it ends."""
        try:
            return _STRICT.raw_decode(self._window, self._at)
        except RepeatedKeyError as error:
            value = _InvalidValue()
            value.problem = str(error)
            return value, _PLAIN.raw_decode(self._window, self._at)[1]

    def _grow(self, characters: int) -> None:
        more = self._text.read(characters)
        self._at_end = not more
        self._window = self._window[self._at :] + more
        self._at = 0


@dataclass(frozen=True)
class _Member:
    """What the object at the top of a document holds under one key."""

    is_list: bool
    is_object: bool
    length: int = 0  # of a list
    first: Any = None  # element of a list
    all_objects: bool = False


def read_document(
    file: str, streams: Streams, limits: ReadLimits
) -> Iterator[tuple[int, Any, str | None]]:
    """Read the rows of a JSON document, numbered from 1, each with why it cannot be used or None.

    Args:
        file: its name, for messages.
        streams: opens it; an object of columns is read through one stream per column.

    Raises:
        UserError: not JSON (the rows before the fault are read), or of another shape.
    """
    with streams() as stream:
        text = _JsonText(stream, limits)
        first = text.take()
        if first == "[":
            yield from _numbered(_elements(file, text))
            return
        if first != "{":
            found = repr(first) if first else "nothing"
            raise UserError(
                f"{file}: expected one JSON array of objects, found {found}",
                hint="If there is one object per line, rename the file to .jsonl.",
            )
        members = _describe(file, text)
    columns = _columns(file, members)
    with ExitStack() as stack:
        opened = [_JsonText(stack.enter_context(streams()), limits) for _ in columns]
        read = [_column(file, text, key) for text, key in zip(opened, columns, strict=True)]
        if members[columns[0]].all_objects and len(columns) == 1:
            yield from _numbered(read[0])
            return
        yield from _numbered(_row(columns, cells) for cells in zip(*read, strict=True))


def _numbered(values: Iterator[Any]) -> Iterator[tuple[int, Any, str | None]]:
    for number, value in enumerate(values, 1):
        if isinstance(value, _InvalidValue):
            yield number, None, value.problem
        else:
            yield number, value, None


def _row(columns: list[str], cells: tuple[Any, ...]) -> dict[str, Any]:
    invalid = [cell for cell in cells if isinstance(cell, _InvalidValue)]
    return invalid[0] if invalid else dict(zip(columns, cells, strict=True))


def _elements(file: str, text: _JsonText) -> Iterator[Any]:
    """Read the elements of an array whose bracket was consumed; an element that is not JSON makes
    the rest of the file unreadable.
    """
    if text.peek() == "]":
        text.take()
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
        yield value
        if (found := text.take()) == "]":
            return
        if found != ",":
            what = f"found {found!r}" if found else "the file ends"
            raise UserError(
                f"{file}: after row {number}: expected ',' or ']', {what}",
                hint="Write the file again, or one object per line (.jsonl).",
            )


def _describe(file: str, text: _JsonText) -> dict[str, _Member]:
    """Read the object at the top, whose brace was consumed, and return what its keys hold."""
    members: dict[str, _Member] = {}
    while text.peek() != "}":
        if members:
            _take(file, text, ",")
        key = _key(file, text)
        if key in members:
            raise UserError(f"{file}: the key {key!r} appears twice", hint="Write the file again.")
        if text.peek() == "[":
            text.take()
            first, length, all_objects = None, 0, True
            for value in _elements(file, text):
                first = value if length == 0 else first
                length += 1
                all_objects &= isinstance(value, dict)
            members[key] = _Member(True, False, length, first, all_objects and length > 0)
        else:
            value = _value(file, text, key)
            members[key] = _Member(False, isinstance(value, dict))
    text.take()
    if text.peek():
        raise UserError(
            f"{file}: expected one JSON array of objects, found an object",
            hint="If there is one object per line, rename the file to .jsonl.",
        )
    return members


def _columns(file: str, members: dict[str, _Member]) -> list[str]:
    """Return the keys whose lists hold the rows: the only list of objects, or the columns.

    Raises:
        UserError: the document is no such object.
    """
    names = list(members)
    found = f"{file}: found one object with the keys {', '.join(names[:8]) or 'none'}"
    tables = [name for name in names if members[name].all_objects]
    lists = [name for name in names if members[name].is_list]
    if len(names) == len(tables) == 1 and not _TURN_KEYS & set(members[names[0]].first):
        return names
    if lists and lists == names and (len(tables) < len(names)):
        lengths = {members[name].length for name in names}
        if len(lengths) == 1:
            return names
        counts = ", ".join(f"{name}: {members[name].length:,}" for name in names[:8])
        raise UserError(
            f"{file}: found one object of columns of different lengths ({counts})",
            hint="Write the columns again, with a value or null in each row.",
        )
    if tables and not any(_TURN_KEYS & set(members[name].first) for name in tables):
        name = tables[0]
        raise UserError(
            f"{found}, expected an array of rows, or an object with only this array",
            hint=f"Extract the rows: jq -c '.[\"{name}\"][]' {file} > {Path(file).stem}.jsonl.",
        )
    if names and all(member.is_object for member in members.values()):
        raise UserError(
            f"{found}, each an object, expected an array of rows",
            hint="If pandas wrote it: to_json(..., orient='records', lines=True), as .jsonl.",
        )
    raise UserError(
        f"{found}, expected an array of rows",
        hint="If it is a single row, put it in brackets: [{...}].",
    )


def _column(file: str, text: _JsonText, wanted: str) -> Iterator[Any]:
    """Read the elements of one list of the object at the top; the object is known to be valid."""
    text.take()
    while (key := _key(file, text)) != wanted:
        if text.peek() == "[":
            text.take()
            for _ in _elements(file, text):
                pass
        else:
            _value(file, text, key)
        _take(file, text, ",")
    text.take()
    yield from _elements(file, text)


def _key(file: str, text: _JsonText) -> str:
    key = _value(file, text, None)
    if not isinstance(key, str):
        raise UserError(
            f"{file}: not JSON: expected a key in quotes, found {key!r}",
            hint="Write the file again.",
        )
    _take(file, text, ":")
    return key


def _value(file: str, text: _JsonText, key: str | None) -> Any:
    try:
        return text.value()
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        where = "" if key is None else f"key {key!r}: "
        raise UserError(
            f"{file}: {where}not JSON ({one_line(error)})",
            hint="Write the file again, as an array of objects.",
        ) from None


def _take(file: str, text: _JsonText, expected: str) -> None:
    if (found := text.take()) != expected:
        what = f"found {found!r}" if found else "the file ends"
        raise UserError(
            f"{file}: not JSON: expected {expected!r}, {what}", hint="Write the file again."
        )

"""Checks of the values in a row, for every form of row."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from typing import Any

from canvastune.errors import type_of
from canvastune.io.json_text import RepeatedKeyError, unique_keys
from canvastune.preparation.conversation import InvalidRow

_DEEPEST = 64  # levels of arguments: a template renders them recursively


def check_text(text: Any, role: str, where: str) -> str:
    """Return the text. Raises: InvalidRow, not text or not valid Unicode."""
    if not isinstance(text, str):
        raise InvalidRow(f"{where} ({role}): the content is {type_of(text)}, expected text")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(
            f"{where} ({role}): the content is not valid Unicode (half a surrogate pair at"
            f" character {error.start + 1})"
        ) from None
    return text


def check_value(value: Any, where: str, depth: int = 0) -> None:
    """Check that a value is what JSON can hold and a template can render.

    Raises:
        InvalidRow: another type, as Parquet's dates and bytes, a number that is not finite, text that
            is not valid Unicode, keys that are not text, too many levels.
    """
    if isinstance(value, str):
        if not value.isascii():
            check_text(value, "JSON", where)
    elif isinstance(value, dict | list):
        if depth == _DEEPEST:
            raise InvalidRow(f"{where}: more than {_DEEPEST} levels of nested values")
        for each in value:
            check_value(each, where, depth + 1)
        if isinstance(value, dict):
            if other := [key for key in value if not isinstance(key, str)]:
                raise InvalidRow(
                    f"{where}: the key {other[0]!r} is {type_of(other[0])}, expected text"
                )
            for item in value.values():
                check_value(item, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidRow(f"{where}: {value} is not a number that JSON has")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise InvalidRow(f"{where}: {type_of(value)} is not a value that JSON has")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text in a row. Raises: InvalidRow."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise InvalidRow(f"{where}: {error}") from None
    except (ValueError, RecursionError):
        raise InvalidRow(f"{where}: not JSON: {text[:40]!r}") from None


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, empty text or object, a list of nothing else."""
    if isinstance(value, list | tuple):
        return all(item is None for item in value)
    return value is None or (isinstance(value, str | dict) and not value)


def further_keys(value: Any, known: Collection[str], place: str) -> set[str]:
    """Return the keys with a value that an object, or an object in a list, has beyond the known
    ones, as `place.key`.
    """
    objects = value if isinstance(value, list) else [value]
    return {
        f"{place}.{key}"
        for each in objects
        if isinstance(each, dict)
        for key, item in each.items()
        if key not in known and not is_empty(item)
    }


def nested_keys(value: Any, levels: int = 6) -> Iterator[str]:
    """Yield the keys of all objects in a value, down to a number of levels."""
    if isinstance(value, dict):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, list) and levels:
        for each in value:
            yield from nested_keys(each, levels - 1)

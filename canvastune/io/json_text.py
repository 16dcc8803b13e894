"""JSON as the standard has it: a number that is not finite becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from canvastune.io.atomic import replace_text


def finite(value: Any) -> Any:
    """Return a tree of JSON values with None in the place of NaN and the infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def to_json_text(tree: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return a tree as JSON text that ends with a line break; every JSON reader accepts it."""
    text = json.dumps(finite(tree), allow_nan=False, indent=indent, ensure_ascii=ensure_ascii)
    return text + "\n"


def write_json(path: Path, tree: Any, *, indent: int | None = 2, ensure_ascii: bool = True) -> None:
    """Write a tree as JSON, completely or not at all. Raises: OSError."""
    replace_text(path, to_json_text(tree, indent=indent, ensure_ascii=ensure_ascii))


class RepeatedKeyError(ValueError):
    """An object in JSON text has a key twice, of which Python would keep the last value."""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object with these keys and values, for `object_pairs_hook` of a JSON decoder.

    Raises:
        RepeatedKeyError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"key {repeated!r} appears twice in one object")
    return found


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a file with one per line.

    A text may hold other line separators of Unicode, at which `str.splitlines` would break it.

    Raises:
        OSError, ValueError: the file cannot be read; a line is not JSON.
    """
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]

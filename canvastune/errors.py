"""The one kind of error that a user can cause, and how it is printed and read back."""

from __future__ import annotations

import contextlib
import json
from typing import Any

ERROR_PREFIX = "canvastune: error: "
_HINT_PREFIX = "  hint: "


class UserError(Exception):
    """A mistake in the input, not in the program: shown as its message and hint, never as a
    traceback.

    Args:
        message: names the file, row or key, what was found and what was expected, for example
            `data.source: file not found: x.jsonl`.
        hint: what to do about it, for example `Check the path, or use a Hub dataset id.`
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (str(self), self.hint)


def type_of(value: Any) -> str:
    """Return a value's type for a message: `null`, `a list`, `an int`."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def format_error(error: UserError) -> str:
    """Return what a command prints for an error: its message and, on another line, its hint."""
    hint = f"\n{_HINT_PREFIX}{error.hint}" if error.hint else ""
    return f"{ERROR_PREFIX}{error}{hint}"


def parse_error(output: str) -> UserError | None:
    """Find the last error in a command's output, logged as text or as a JSON event, if any."""
    _, mark, text = output.rpartition(ERROR_PREFIX)
    if mark:
        message, _, hint = text.partition(f"\n{_HINT_PREFIX}")
        return UserError(message.strip(), hint=hint.strip())
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(line)
            if event["event"] == "error":
                return UserError(event["message"], hint=event.get("hint", ""))
    return None


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """Return a library's error on one line of at most `limit` characters; without text, its type.

    A longer one ends with "...".
    """
    name = "" if isinstance(error, str) else type(error).__name__
    text = " ".join(str(error).split()).rstrip(".") or name
    return text if len(text) <= limit else f"{text[: limit - 4].rstrip()} ..."


def _restore(message: str, hint: str) -> UserError:
    return UserError(message, hint=hint)

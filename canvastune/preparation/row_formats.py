"""From a data row to a conversation: the forms of rows that are read, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from canvastune.config.schema import ColumnsConfig, DataConfig
from canvastune.errors import UserError

RowFormat = Literal["messages", "gsm8k", "columns"]
_ROLES = ("system", "user", "assistant")
_UNTRAINABLE = (
    "tool_calls",
    "function_call",
    "tool_responses",
    "reasoning",
    "reasoning_content",
    "thinking",
)
# json.dumps would create an encoder for every row.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class InvalidRow(ValueError):
    """A row that cannot be trained on. The message is the reason, without the place."""


@dataclass(frozen=True)
class Conversation:
    """Messages up to and including the last assistant turn; later turns of the row are left out."""

    messages: tuple[dict[str, str], ...]

    @property
    def history(self) -> list[dict[str, str]]:
        """The messages before the answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The content of the last assistant turn, as it was written."""
        return self.messages[-1]["content"]

    @functools.cached_property
    def id(self) -> str:
        """SHA-256 of roles and stripped contents, independent of the file and the row's format."""
        plain = [[message["role"], message["content"].strip()] for message in self.messages]
        return hashlib.sha256(_to_json(plain).encode()).hexdigest()


def required_columns(row_format: RowFormat, columns: ColumnsConfig) -> tuple[str, ...]:
    """Return the keys that a row of this format must have."""
    if row_format == "messages":
        return ("messages",)
    return ("question", "answer") if row_format == "gsm8k" else (columns.prompt, columns.response)


def detect_format(config: DataConfig, keys: Sequence[str]) -> RowFormat | None:
    """Return the format of a row with these keys, or None if no format has them.

    If the config sets a format, it is the only candidate.
    """
    every: tuple[RowFormat, ...] = ("messages", "gsm8k", "columns")
    candidates = every if config.format == "auto" else (config.format,)
    return next(
        (each for each in candidates if set(required_columns(each, config.columns)) <= set(keys)),
        None,
    )


def unknown_format(value: Any, where: str, config: DataConfig) -> UserError:
    """Return the error for a row that has no known format.

    Args:
        where: the file and the row.
    """
    if not isinstance(value, dict):
        return UserError(
            f"{where}: found {type(value).__name__}, expected an object; no row after it has a"
            " known format",
            hint="Write one object with named columns per row.",
        )
    found = ", ".join(map(str, value)) or "none"
    prompt, response = config.columns.prompt, config.columns.response
    if config.format == "auto":
        return UserError(
            f"{where}: unknown row format: found the columns {found}, expected messages; or "
            "question and answer; "
            f"or {prompt} and {response}",
            hint=(
                "Name your columns with data.format=columns data.columns.prompt=..."
                " data.columns.response=..."
            ),
        )
    missing = ", ".join(
        key for key in required_columns(config.format, config.columns) if key not in value
    )
    keys = (
        "data.columns.prompt and data.columns.response"
        if config.format == "columns"
        else "data.format"
    )
    return UserError(
        f"{where}: no column {missing}, which data.format {config.format} requires; found the"
        f" columns {found}",
        hint=f"Set {keys} to match.",
    )


def read_conversation(value: Any, row_format: RowFormat, columns: ColumnsConfig) -> Conversation:
    """Turn a row into a conversation.

    Raises:
        InvalidRow: a missing column, an unknown role, content that is not text, no assistant turn,
            nothing before it, an empty turn.
    """
    if not isinstance(value, dict):
        raise InvalidRow(
            f"the row is {_kind(value)}, expected an object with the columns"
            f" {', '.join(required_columns(row_format, columns))}"
        )
    missing = [key for key in required_columns(row_format, columns) if key not in value]
    if missing:
        raise InvalidRow(
            f"no column {missing[0]!r}; the row's columns: {', '.join(map(str, value)) or 'none'}"
        )
    if row_format == "messages":
        messages = _check_messages(value["messages"])
    else:
        prompt, response = required_columns(row_format, columns)
        messages = [
            _turn("user", value[prompt], f"column {prompt!r}"),
            _turn("assistant", value[response], f"column {response!r}"),
        ]
        if (
            row_format == "columns"
            and columns.system is not None
            and value.get(columns.system) not in (None, "")
        ):
            messages.insert(0, _turn("system", value[columns.system], f"column {columns.system!r}"))
    last = max(
        (at for at, message in enumerate(messages) if message["role"] == "assistant"), default=None
    )
    if last is None:
        raise InvalidRow("no assistant turn")
    if last == 0:
        raise InvalidRow("no turn before the assistant's: there is nothing to answer")
    return Conversation(tuple(messages[: last + 1]))


def _check_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise InvalidRow(
            f"column 'messages' is {_kind(value)}, expected a list of {{'role', 'content'}} objects"
        )
    if not value:
        raise InvalidRow("column 'messages' is an empty list")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise InvalidRow(
                f"message {number} is {_kind(message)}, expected an object with 'role' and"
                " 'content'"
            )
        if "role" not in message:
            raise InvalidRow(
                f"message {number} has no 'role'; its keys:"
                f" {', '.join(map(str, message)) or 'none'}"
            )
        if message["role"] not in _ROLES:
            raise InvalidRow(
                f"message {number}: unknown role {str(message['role'])[:40]!r}, expected"
                f" {', '.join(_ROLES)}"
            )
        if lost := [key for key in _UNTRAINABLE if message.get(key)]:
            raise InvalidRow(
                f"message {number} carries {lost[0]!r}, which is not supported; only 'content'"
                " would be trained on"
            )
        if "content" not in message:
            raise InvalidRow(f"message {number} ({message['role']}) has no 'content'")
        messages.append(_turn(message["role"], message["content"], f"message {number}"))
    return messages


def _turn(role: str, content: Any, where: str) -> dict[str, str]:
    if not isinstance(content, str):
        raise InvalidRow(f"{where} ({role}): the content is {_kind(content)}, expected text")
    if not content.strip() and role != "system":
        raise InvalidRow(f"{where} ({role}): the content is empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(
            f"{where} ({role}): the content is not valid Unicode (half a surrogate pair at"
            f" character {error.start + 1})"
        ) from None
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"

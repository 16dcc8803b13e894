"""From a data row to its messages: the forms of rows that are read, and what is refused.

Every key of a row is used, counted as unused, or the reason for which the row is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from canvastune.config.data import ColumnsConfig, DataConfig
from canvastune.errors import UserError, type_of
from canvastune.preparation.conversation import Conversation, InvalidRow, Message, ParsedRow
from canvastune.preparation.messages import (
    MARK_KEYS,
    THINKING_KEYS,
    Messages,
    is_learned,
    read_messages,
    text_of,
    turn,
)
from canvastune.preparation.row_values import check_text, is_empty, nested_keys
from canvastune.preparation.tools import ToolReader

RowFormat = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "gsm8k", "columns"]
_AUTO: tuple[RowFormat, ...] = (
    "messages",
    "sharegpt",
    "prompt_completion",
    "gsm8k",
    "alpaca",
    "columns",
)
_FORMS = (
    "messages; or conversations; or prompt and completion; or question and answer; or instruction"
    " and output"
)
# Usual names, the first one that a row has a value for.
_SYSTEM_COLUMNS = ("system", "system_prompt", "systemInstruction", "system_instruction")
_TOOLS_COLUMNS = ("tools", "functions")
_HISTORY_COLUMN = "history"
# Keys that change what a row means, with the way out where a format has no place for them.
_DROP_ROWS = "Remove these rows, or set data.ignore=[{key}] if the text says all without it."
_PREFERRED = (
    "To train on the preferred answers, set data.format=columns data.columns.response=chosen"
)
_MEANINGFUL = {
    **dict.fromkeys(
        ("context", "contexts", "document", "documents", "passage", "input", "schema"),
        "Set data.columns.context={key} to put it before the prompt, or data.ignore=[{key}].",
    ),
    **dict.fromkeys(
        ("images", "image", "audio", "audios", "video", "videos"),
        f"Only text can be trained on. {_DROP_ROWS}",
    ),
    **dict.fromkeys(("chosen", "rejected"), f"{_PREFERRED} data.columns.prompt={{prompt}}."),
    **dict.fromkeys(("choices", "options"), _DROP_ROWS),
    **dict.fromkeys(
        ("label", "labels", "score", "reward"),
        "Keep the rows that are to be learned, and set data.ignore=[{key}].",
    ),
    **dict.fromkeys(_SYSTEM_COLUMNS, "Set data.columns.system={key}, or data.ignore=[{key}]."),
    **dict.fromkeys(_TOOLS_COLUMNS, "Set data.columns.tools={key}, or data.ignore=[{key}]."),
    **dict.fromkeys(
        THINKING_KEYS,
        "Put it into the assistant's message as 'reasoning', or set data.ignore=[{key}].",
    ),
    _HISTORY_COLUMN: "Put these turns into the messages, or set data.ignore=[{key}].",
}
_TABLE = re.compile(r"\.[ct]sv(\.gz)?: ")
_SPEAKER = {"role", "from"}  # the key of a message that says whose it is
_PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem", "text")
_RESPONSES = ("response", "completion", "answer", "output", "solution", "chosen", "target")


class RowReader:
    """Reads rows of one format."""

    def __init__(
        self,
        row_format: RowFormat,
        source: DataConfig,
        data: DataConfig,
        described: Collection[str] = (),
    ) -> None:
        """Prepare to read.

        Args:
            row_format: of the rows, from `detect_format`.
            source: the format that was asked for, and the columns' names.
            data: what is ignored, learned and kept.
            described: columns that say something about a row, and are not part of it: no
                conversation depends on them.
        """
        self._format = row_format
        self._columns = columns = source.columns
        self._ignore = frozenset(data.ignore)
        self._described = frozenset(described)
        self._keep_thinking = data.thinking == "keep"
        self._learn = data.learn
        # Rows of question and answer often have more: only a recipe that says gsm8k takes them.
        self._strict = row_format == "gsm8k" and source.format == "auto"
        self._required = required_columns(row_format, columns)
        self._places = tuple(f"column {name!r}" for name in self._required)
        self._own = frozenset(self._required) | self._ignore
        self._system = (columns.system,) if columns.system else _SYSTEM_COLUMNS
        self._tools = (columns.tools,) if columns.tools else _TOOLS_COLUMNS
        self._tool_reader = ToolReader()
        self._thinking = (columns.thinking,) if columns.thinking else THINKING_KEYS
        named = {
            name: getattr(columns, name) for name in ("system", "context", "thinking", "tools")
        }
        self.unseen = {column: name for name, column in named.items() if column}
        """Columns that the recipe names and no row has had yet, with the name of their key."""
        self.unseen_ignored = set(data.ignore)
        """Names in `data.ignore` that no row has had yet."""

    def read(self, value: Any) -> tuple[ParsedRow, list[Conversation]]:
        """Return what a row says, and the examples in it: none if what would be learned is marked
        as not to be learned.

        Raises:
            InvalidRow: a missing column, a key that changes the row's meaning and has no place, and
                all that is refused in a message.
        """
        if not isinstance(value, dict):
            raise InvalidRow(
                f"the row is {type_of(value)}, expected an object with the columns"
                f" {', '.join(self._required)}"
            )
        for key in self._required:
            if key not in value:
                raise InvalidRow(
                    f"no column {key!r}; the row's columns: {', '.join(map(str, value)) or 'none'}"
                )
        extra = {
            key: item for key, item in value.items() if key not in self._own and not is_empty(item)
        }
        if self.unseen:
            for column in self.unseen.keys() & value.keys():
                del self.unseen[column]
        if self.unseen_ignored:
            keys = set(nested_keys(value))
            self.unseen_ignored -= {
                name
                for name in self.unseen_ignored
                if name in keys or name.rpartition(".")[2] in keys
            }
        if self._format in ("messages", "sharegpt"):
            parsed = self._read_conversation(value, extra)
        elif not extra and all(isinstance(value[name], str) for name in self._required):
            asked, answered = self._places
            prompt, response = (value[name] for name in self._required)
            parsed = ParsedRow([turn("user", prompt, asked), turn("assistant", response, answered)])
        else:
            parsed = self._read_sides(value, extra)
        return parsed, parsed.examples(self._learn)

    def _read_conversation(self, value: dict[str, Any], extra: dict[str, Any]) -> ParsedRow:
        column = self._required[0]
        found = read_messages(
            value[column], column, self._ignore, keep_thinking=self._keep_thinking
        )
        return self._parsed(found, extra)

    def _read_sides(self, value: dict[str, Any], extra: dict[str, Any]) -> ParsedRow:
        """Read a row whose prompt and response are columns, each text or a list of messages."""
        prompt, response = self._required
        asks = value[prompt]
        if isinstance(asks, dict) and _SPEAKER & asks.keys():
            asks = [asks]
        if not isinstance(asks, list):
            text = self._prompt_text(asks, prompt, extra)
            found = self._history(extra)
            found.append(text)
        else:
            found = self._messages(asks, prompt)
        asked = len(found.turns)
        answer = value[response]
        if isinstance(answer, dict) and _SPEAKER & answer.keys():
            answer = [answer]
        if isinstance(answer, list):
            self._extend(found, self._messages(answer, response), asked)
        else:
            found.append(turn("assistant", answer, f"column {response!r}"))
        if found.turns[asked:] and (
            thinking := next((key for key in self._thinking if key in extra), None)
        ):
            text_found = check_text(extra.pop(thinking), "thinking", f"column {thinking!r}")
            first = found.turns[asked]
            if not text_found.strip():
                pass  # blanks are not thinking
            elif not self._keep_thinking:
                found.unused.add(thinking)
            elif first["role"] != "assistant" or "reasoning" in first:
                raise InvalidRow(
                    f"column {thinking!r} has thinking, and the first turn of column {response!r}"
                    f" {'has its own' if 'reasoning' in first else 'is not of the assistant'}",
                    "Put it into the assistant's message as 'reasoning', or set"
                    f" data.ignore=[{thinking}].",
                )
            else:
                first["reasoning"] = text_found
        return self._parsed(found, extra)

    def _messages(self, value: Any, column: str) -> Messages:
        try:
            return read_messages(value, column, self._ignore, keep_thinking=self._keep_thinking)
        except InvalidRow as error:
            raise InvalidRow(f"column {column!r}: {error}", error.hint) from None

    def _extend(self, found: Messages, more: Messages, asked: int) -> None:
        """Add the messages of a response column; some of them repeat the prompt."""
        if more.turns[:asked] == found.turns:
            found.turns = more.turns
            found.marked |= more.marked
            found.unused |= more.unused
            return
        if more.turns[0]["role"] != "assistant":
            raise InvalidRow(
                f"column {self._required[1]!r} begins with a turn of the {more.turns[0]['role']}'s"
                " that is not the prompt's, expected the assistant's"
            )
        found.marked |= {at + asked for at in more.marked}
        found.unused |= more.unused
        found.turns += more.turns

    def _prompt_text(self, content: Any, column: str, extra: dict[str, Any]) -> Message:
        message = turn("user", content, f"column {column!r}")
        if self._format == "alpaca" and "input" in extra:
            more = check_text(extra.pop("input"), "user", "column 'input'")
            message["content"] = f"{message['content']}\n{more}"
        context = self._columns.context
        if context and context in extra:
            value = extra.pop(context)
            texts = value if isinstance(value, list) else [value]
            before = [check_text(text, "user", f"column {context!r}") for text in texts]
            message["content"] = "\n\n".join([*before, message["content"]])
        return message

    def _history(self, extra: dict[str, Any]) -> Messages:
        """Return the earlier turns of a row: a list of pairs, as Alpaca's rows have them, or of
        messages.
        """
        turns = extra.pop(_HISTORY_COLUMN, [])
        if isinstance(turns, list) and turns and all(map(_is_message, turns)):
            return self._messages(turns, _HISTORY_COLUMN)
        if not isinstance(turns, list) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in turns
        ):
            raise InvalidRow(
                f"column {_HISTORY_COLUMN!r} is not a list of pairs, expected [[prompt, response],"
                " ...], or a list of messages with 'role' and 'content'"
            )
        where = f"column {_HISTORY_COLUMN!r}"
        found = Messages()
        for user, answer in turns:
            found.append(turn("user", user, where))
            found.append(turn("assistant", answer, where))
        return found

    def _parsed(self, found: Messages, extra: dict[str, Any]) -> ParsedRow:
        """Add what accompanies the messages; every other column is counted or refused."""
        tools: tuple[dict[str, Any], ...] = ()
        for key in list(extra):
            if key in self._system:
                self._add_system(found, key, extra.pop(key))
            elif key in self._tools:
                read = self._tool_reader.read(extra.pop(key), key, found.unused)
                tools += tuple(tool for tool in read if tool not in tools)
            elif key in MARK_KEYS:
                if not is_learned(key, extra.pop(key), "the row"):
                    found.marked |= set(range(len(found.turns)))
            elif key == "label" and extra[key] is True:  # an answer that is wanted
                del extra[key]
            elif key == "rejected" and self._required[-1] == "chosen":
                continue
            elif key in (self._columns.context, self._columns.thinking):
                raise InvalidRow(
                    f"column {key!r} belongs to a prompt or a response in text, and this row has"
                    " lists of messages",
                    f"Put it into the messages, or set data.ignore=[{key}].",
                )
            elif key in _MEANINGFUL:
                raise InvalidRow(
                    f"column {key!r} has a value, and data.format {self._format} has no place for"
                    " it",
                    _MEANINGFUL[key].format(key=key, prompt=self._required[0]),
                )
            elif key in self._described:
                del extra[key]
            elif self._strict and isinstance(extra[key], str):
                raise InvalidRow(
                    f"column {key!r} holds text in addition to question and answer, which data.format auto"
                    " does not leave out",
                    f"Set data.columns.context={key} to put it before the question,"
                    f" data.ignore=[{key}] to leave it out, or data.format=gsm8k to leave out every"
                    " further column.",
                )
        if extra:
            found.unused |= {str(key) for key in extra}
        unused = sorted(name for name in found.unused if not self._is_ignored(name))
        return ParsedRow(found.turns, tools, frozenset(found.marked), unused)

    def _is_ignored(self, name: str) -> bool:
        return bool(self._ignore) and (
            name in self._ignore or name.rpartition(".")[2] in self._ignore
        )

    def _add_system(self, found: Messages, key: str, value: Any) -> None:
        text = check_text(text_of(value, "system", f"column {key!r}"), "system", f"column {key!r}")
        if not text.strip():
            return
        first = found.turns[0]
        if first["role"] != "system":
            found.turns.insert(0, {"role": "system", "content": text})
            found.marked = {at + 1 for at in found.marked}
        elif first["content"].strip() != text.strip():
            raise InvalidRow(
                f"column {key!r} and message 1 are two system turns, expected one: set"
                f" data.ignore=[{key}], or join them"
            )


def required_columns(row_format: RowFormat, columns: ColumnsConfig) -> tuple[str, ...]:
    """Return the keys that a row of this format must have: the messages, or prompt and response."""
    match row_format:
        case "messages":
            return (columns.messages or "messages",)
        case "sharegpt":
            return (columns.messages or "conversations",)
        case "prompt_completion":
            return ("prompt", "completion")
        case "alpaca":
            return ("instruction", "output")
        case "gsm8k":
            return ("question", "answer")
        case "columns":
            return (columns.prompt, columns.response)


def detect_format(source: DataConfig, keys: Sequence[str]) -> RowFormat | None:
    """Return the format of a row with these keys, or None if no format has them.

    If the recipe sets a format, it is the only candidate.
    """
    asked = source.format
    candidates: tuple[RowFormat, ...] = _AUTO if asked == "auto" else (asked,)
    return next(
        (each for each in candidates if set(required_columns(each, source.columns)) <= set(keys)),
        None,
    )


def unknown_format(value: Any, where: str, source: DataConfig) -> UserError:
    """Return the error for a row that has no known format.

    Args:
        where: the file and the row.
    """
    if not isinstance(value, dict):
        return UserError(
            f"{where}: found {type(value).__name__}, expected an object; no row after it has a"
            " known format",
            hint=(
                "Write an object with the messages per row: jq -c '{messages: .}'."
                if _is_messages(value)
                else "Write one object with named columns per row."
            ),
        )
    found = ", ".join(map(str, value)) or "none"
    prompt, response = source.columns.prompt, source.columns.response
    if source.format == "auto":
        return UserError(
            f"{where}: unknown row format: found the columns {found}, expected {_FORMS}; or"
            f" {prompt} and {response}",
            hint=_suggest(value, is_table=bool(_TABLE.search(where))),
        )
    missing = ", ".join(
        key for key in required_columns(source.format, source.columns) if key not in value
    )
    keys = {
        "columns": "data.columns.prompt and data.columns.response",
        "messages": "data.columns.messages, or data.format,",
        "sharegpt": "data.columns.messages, or data.format,",
    }.get(source.format, "data.format")
    return UserError(
        f"{where}: no column {missing}, which data.format {source.format} requires; found the"
        f" columns {found}",
        hint=f"Set {keys} to match.",
    )


def _suggest(value: Mapping[str, Any], is_table: bool) -> str:
    """Return the settings that would read a row, as far as its columns show.

    Args:
        is_table: whether the first line of a CSV or TSV file names the columns.
    """
    for column, item in value.items():
        if _is_messages(item):
            return f"Set data.columns.messages={column}."
        if isinstance(item, dict) and _is_messages(item.get("messages")):
            return f"Make the messages a column: jq -c '{{messages: .{column}.messages}}'."
    if list(value) == ["text"]:
        return (
            "Split the text into two columns, prompt and response: only a response is learned, and"
            " plain text does not say where it begins."
        )
    if {"chosen", "rejected"} <= value.keys():
        asked = _first(_PROMPTS, value) or "..."
        return f"{_PREFERRED}{'' if asked == 'prompt' else f' data.columns.prompt={asked}'}."
    prompt = _first(_PROMPTS, value) or _near("prompt", value)
    if is_table and prompt is None:
        return (
            "If the file has no header, add a line with the names of the columns; if it has, name"
            " them with data.format=columns data.columns.prompt=... data.columns.response=...."
        )
    response = _first([name for name in _RESPONSES if name != prompt], value)
    return (
        f"Name your columns with data.format=columns data.columns.prompt={prompt or '...'}"
        f" data.columns.response={response or _near('response', value) or '...'}."
    )


def _first(names: Sequence[str], value: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in value), None)


def _near(name: str, value: Mapping[str, Any]) -> str | None:
    """Return the only similar key: of response_j and response_k, one may be the rejected answer."""
    found = difflib.get_close_matches(name, [str(key) for key in value], n=2)
    return found[0] if len(found) == 1 else None


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _is_message(value[0])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(_SPEAKER & value.keys())

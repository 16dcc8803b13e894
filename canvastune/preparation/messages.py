"""Messages as data has them, in the one form that a chat template takes.

OpenAI's keys (`role`, `content`, `tool_calls`, `tool_call_id`, `name`), ShareGPT's (`from`,
`value`), Gemini's (`parts`) and Gemma's own (`tool_responses` in the assistant's message) are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from canvastune.errors import type_of
from canvastune.preparation.conversation import InvalidRow, Message
from canvastune.preparation.row_values import (
    check_text,
    check_value,
    further_keys,
    is_empty,
    parse_json,
)
from canvastune.preparation.tools import call_id, read_call_text, read_calls

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",  # ShareGPT: its text is the call
    "chatbot": "assistant",  # Cohere, which writes roles with a capital
}
_NAMED_ROLES = "system, developer, user, assistant, model, tool"
_PLAIN_KEYS = {"role", "content"}
_SPEAKER_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "parts")
THINKING_KEYS = ("reasoning", "reasoning_content", "thinking")
# Whether a turn is learned: OpenAI and Mistral say weight, ms-swift loss, Axolotl train/training.
MARK_KEYS = ("weight", "loss_weight", "loss", "train", "training", "trainable", "learn")
_MEDIA_KEYS = ("images", "image", "audio", "audios", "video", "videos")
_ROW_KEYS = ("tools", "functions")  # declarations: a template takes them with the conversation
_THINKING_PARTS = ("reasoning", "thinking")
_CALL_PART = "tool_call"
_DICT_KEYS = ("role", "type", "text", "value", "parts", "thought", *_MEDIA_KEYS)  # of one part
_PART_KEYS = (*_DICT_KEYS, *_THINKING_PARTS, "id", "name", "arguments")  # a part may be a call
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_MARKS = {"0": False, "false": False, "1": True, "true": True}  # as a table's cells have them
_MEDIA_PARTS = ("image", "image_url", "audio", "input_audio", "video", "video_url", "file")
_MEDIA_HELD = tuple(key for key in (*_MEDIA_KEYS, *_MEDIA_PARTS) if key != "file")


@dataclass
class Messages:
    """The messages of a row, with what was noticed on the way."""

    turns: list[Message] = field(default_factory=list)
    marked: set[int] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    unnamed: set[str] = field(default_factory=set)  # ids of calls that had none in the data

    def append(self, message: Message) -> None:
        """Add a turn."""
        self.turns.append(message)


def read_messages(
    value: Any, column: str, ignore: Collection[str] = (), *, keep_thinking: bool = True
) -> Messages:
    """Read a list of messages.

    Args:
        value: a list of objects, or the same as JSON text.
        column: for messages.
        ignore: keys of a message that are known to be unneeded, also as `column.key`.
        keep_thinking: whether thinking is kept; otherwise it is counted as unused.

    Raises:
        InvalidRow: anything that a chat template could not render as it is meant.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"column {column!r}")
    if isinstance(value, dict):
        value = _transpose(value)
    if not isinstance(value, list):
        raise InvalidRow(
            f"column {column!r} is {type_of(value)}, expected a list of {{'role', 'content'}} objects"
        )
    if not value:
        raise InvalidRow(f"column {column!r} is an empty list")
    found = Messages()
    for number, message in enumerate(value, 1):
        if isinstance(message, dict) and message.keys() == _PLAIN_KEYS:
            role, content = message["role"], message["content"]
            if role in ("user", "assistant") and isinstance(content, str):
                found.append(turn(role, content, f"message {number}"))
                continue
        _read_message(found, message, number, column, ignore, keep_thinking)
    return found


def _transpose(value: dict[str, Any]) -> Any:
    """Return the messages of an object of lists, as `datasets` before 4 stored a list of objects;
    any other object as it is.
    """
    lists = [item for item in value.values() if isinstance(item, list)]
    if not lists or len(lists) < len(value) or len({len(item) for item in lists}) > 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def _read_message(
    found: Messages,
    message: Any,
    number: int,
    column: str,
    ignore: Collection[str],
    keep_thinking: bool,
) -> None:
    where = f"message {number}"
    written, role = _role(message, where)
    keys = {
        key: item
        for key, item in message.items()
        if not is_empty(item) and not (ignore and (key in ignore or f"{column}.{key}" in ignore))
    }
    content_key = next((key for key in _CONTENT_KEYS if key in keys), None) or next(
        (key for key in _CONTENT_KEYS if key in message), None
    )
    content = message[content_key] if content_key else None
    if media := next((key for key in _MEDIA_KEYS if key in keys), None):
        raise InvalidRow(f"{where} ({written}) has {media!r}, and only text can be trained on")
    if declared := next((key for key in _ROW_KEYS if key in keys), None):
        raise InvalidRow(
            f"{where} ({written}) has {declared!r}, expected the declarations in a column of the row",
            f"Move them to a column 'tools', or set data.ignore=[{column}.{declared}].",
        )
    if "function_calls" in keys:
        raise InvalidRow(
            f"{where} ({written}) has 'function_calls', expected 'tool_calls' with names and"
            " arguments",
            f"Write them as 'tool_calls', or set data.ignore=[{column}.function_calls].",
        )
    calls: list[dict[str, Any]] = []
    if written == "function_call":
        calls, content = (
            read_call_text(content, where, column, found.unused)
            + read_calls(keys, where, column, found.unused),
            None,
        )
    elif role == "assistant":
        content, keys = _unfold(content, keys, where)
        calls = read_calls(keys, where, column, found.unused)
    if content_key is None and not calls:
        raise InvalidRow(f"{where} ({written}) has no 'content'")
    used = {next(key for key in _SPEAKER_KEYS if message.get(key) is not None), content_key}
    if role == "tool":
        used |= {"tool_call_id", "name"}
        _append_tool_response(found, keys, content, where)
    elif role == "assistant":
        thoughts = [key for key in THINKING_KEYS if key in keys]
        used |= {"tool_calls", "function_call", "tool_responses", *MARK_KEYS}
        # Some APIs write the same thinking under two keys.
        used |= {key for key in thoughts if keys[key] == keys[thoughts[0]]}
        _append_answer(found, keys, content, calls, where, column, keep_thinking)
    else:
        if lost := [key for key in ("tool_calls", "function_call") if key in keys]:
            raise InvalidRow(f"{where} ({written}) carries {lost[0]!r}, which an assistant's may")
        used |= set(MARK_KEYS)  # what is not the assistant's is never learned
        found.append(turn(role, content, where))
    found.unused |= {f"{column}.{key}" for key in keys.keys() - used}
    if isinstance(content, list):
        found.unused |= further_keys(content, _PART_KEYS, f"{column}.{content_key}")


def _unfold(content: Any, keys: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Move thinking and calls that are parts of the content (LLaMA-Factory's version 1) to the keys
    that other data has for them.
    """
    if not isinstance(content, list):
        return content, keys
    kinds = [
        ("thinking" if part.get("thought") is True else part.get("type"))  # Gemini marks thoughts
        if isinstance(part, dict)
        else None
        for part in content
    ]
    if _CALL_PART not in kinds and not set(_THINKING_PARTS) & set(kinds):
        return content, keys
    thoughts, calls, rest = [], [], []
    for what, part in zip(kinds, content, strict=True):
        if what in _THINKING_PARTS:
            text = part.get("value", part.get("text", part.get(what)))
            thoughts.append(check_text(text, "thinking", where))
        elif what == _CALL_PART:
            call = part.get("value", part)
            calls.append(parse_json(call, f"{where}: a call") if isinstance(call, str) else call)
        else:
            rest.append(part)
    if twice := [key for key in (*THINKING_KEYS, "tool_calls") if key in keys]:
        raise InvalidRow(f"{where} has {twice[0]!r}, and parts of the same kind in its content")
    moved = {"reasoning": "\n".join(thoughts), "tool_calls": calls}
    return rest or None, keys | {key: item for key, item in moved.items() if item}


def _role(message: Any, where: str) -> tuple[str, str]:
    """Return a message's role as it is written, and as the template knows it."""
    if not isinstance(message, dict):
        raise InvalidRow(
            f"{where} is {type_of(message)}, expected an object with 'role' and 'content'"
        )
    if not any(message.get(key) is not None for key in _SPEAKER_KEYS):
        raise InvalidRow(
            f"{where} has no 'role'; its keys: {', '.join(map(str, message)) or 'none'}"
        )
    written = next(message[key] for key in _SPEAKER_KEYS if message.get(key) is not None)
    role = _ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise InvalidRow(f"{where}: unknown role {str(written)[:40]!r}, expected {_NAMED_ROLES}")
    return written, role


def _append_answer(
    found: Messages,
    keys: Mapping[str, Any],
    content: Any,
    calls: list[dict[str, Any]],
    where: str,
    column: str,
    keep_thinking: bool,
) -> None:
    if calls or "tool_responses" in keys:
        text = "" if content is None else text_of(content, "assistant", where)
        message: Message = {"role": "assistant", "content": check_text(text, "assistant", where)}
    else:
        message = turn("assistant", content, where)
    for index, call in enumerate(calls):
        if "id" not in call:  # without ids the template gives every response the last call's name
            call["id"] = f"call_{len(found.turns)}_{index}"
            found.unnamed.add(call["id"])
    if calls:
        message["tool_calls"] = calls
    if thinking := next((key for key in THINKING_KEYS if key in keys), None):
        text = check_text(keys[thinking], "thinking", where)
        if keep_thinking and text.strip():  # blanks are not thinking
            message["reasoning"] = text
        elif text.strip():
            found.unused.add(f"{column}.{thinking}")
    if not all(is_learned(key, keys[key], where) for key in MARK_KEYS if key in keys):
        found.marked.add(len(found.turns))
    found.append(message)
    if "tool_responses" in keys:
        _split_responses(found, keys["tool_responses"], where)


def _split_responses(found: Messages, responses: Any, where: str) -> None:
    """Split Gemma's own form, call, responses and the answer to them in one message: the answer is
    written in a separate request, so it becomes a separate message.
    """
    message = found.turns[-1]
    calls = message.get("tool_calls", ())
    if not isinstance(responses, list) or not calls or len(responses) != len(calls):
        raise InvalidRow(f"{where}: 'tool_responses' is not a list with one response for each call")
    if not all(isinstance(each, dict) and "response" in each for each in responses):
        raise InvalidRow(f"{where}: a tool response without 'response'")
    check_value(responses, f"{where}: 'tool_responses'")
    responses = [  # without a name, the template calls the tool unknown
        {"name": each.get("name") or call["function"]["name"], "response": each["response"]}
        for each, call in zip(responses, calls, strict=True)
    ]
    found.turns[-1] = {**message, "content": "", "tool_responses": responses}
    if message["content"].strip():
        if len(found.turns) - 1 in found.marked:
            found.marked.add(len(found.turns))
        found.append({"role": "assistant", "content": message["content"]})


def _append_tool_response(
    found: Messages, keys: Mapping[str, Any], content: Any, where: str
) -> None:
    """Add the response to a call, with the id of that call: the template finds the name by it."""
    first = len(found.turns)
    while first and found.turns[first - 1]["role"] == "tool":
        first -= 1
    before = found.turns[first - 1] if first else {}
    calls = [] if "tool_responses" in before else before.get("tool_calls", [])
    answered = {message["tool_call_id"] for message in found.turns[first:]}
    waiting = [call for call in calls if call["id"] not in answered]
    asked, name = call_id(keys.get("tool_call_id")), keys.get("name")
    if asked is not None and not all(call["id"] in found.unnamed for call in waiting):
        waiting = [call for call in waiting if call["id"] == asked]
    elif name is not None:
        waiting = [call for call in waiting if call["function"]["name"] == name]
    if not waiting:
        of = f" {asked or name!r}" if asked or name else ""
        raise InvalidRow(
            f"{where} (tool) answers a call{of} that the assistant's turn before it does not make"
        )
    called = waiting[0]["function"]["name"]
    if name is not None and name != called:
        raise InvalidRow(
            f"{where} (tool) answers a call of {called!r} by its id, and its name is {name!r}"
        )
    if content is None:
        raise InvalidRow(f"{where} (tool): the content is null, expected text")
    if isinstance(content, dict):  # chat APIs take text, and so does the template here
        check_value(content, f"{where} (tool)")
        body = json.dumps(content, ensure_ascii=False)
    else:
        body = check_text(text_of(content, "tool", where), "tool", where)
    found.append({"role": "tool", "tool_call_id": waiting[0]["id"], "content": body})


def turn(role: str, content: Any, where: str) -> Message:
    """Return a message with text, checked.

    Raises:
        InvalidRow: content that is not text, is empty, or is not valid Unicode.
    """
    if not isinstance(content, str):
        content = text_of(content, role, where)
    if not content.strip() and role != "system":
        raise InvalidRow(f"{where} ({role}): the content is empty")
    return {"role": role, "content": check_text(content, role, where)}


def text_of(content: Any, role: str, where: str) -> str:
    """Return the text of a content: a string, or a list of text parts, which are joined as Gemma's
    template joins them.

    Raises:
        InvalidRow: a part that is not text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        if further := [
            key for key in content if key not in _DICT_KEYS and not is_empty(content[key])
        ]:
            raise InvalidRow(
                f"{where} ({role}): the content is an object with {further[0]!r}, expected text"
            )
        content = content.get("parts", [content])
    if not isinstance(content, list):
        raise InvalidRow(f"{where} ({role}): the content is {type_of(content)}, expected text")
    texts = []
    for part in content:
        text, what = part, None
        if isinstance(part, dict):
            text, what = part.get("text"), part.get("type")
            text = part.get("value") if text is None else text
            if media := next((key for key in _MEDIA_HELD if not is_empty(part.get(key))), None):
                raise InvalidRow(
                    f"{where} ({role}) holds a part with {media!r}, and only text can be trained on"
                )
            what = "thinking" if part.get("thought") is True else what
        if what in _THINKING_PARTS or what == _CALL_PART:
            raise InvalidRow(
                f"{where} ({role}) holds a part of type {what!r}, which an assistant's message may"
            )
        if what in _MEDIA_PARTS:
            raise InvalidRow(
                f"{where} ({role}) holds a part of type {what!r}, and only text can be trained on"
            )
        if what not in _TEXT_PARTS:
            raise InvalidRow(
                f"{where} ({role}) holds a part of type {str(what)[:40]!r}, expected text parts"
            )
        if not isinstance(text, str):
            raise InvalidRow(
                f"{where} ({role}): the content holds a part without 'text', expected text parts"
            )
        texts.append(text)
    if len(texts) == 1:
        return texts[0]
    return (" " if role == "system" else "").join(text.strip() for text in texts)


def is_learned(key: str, value: Any, where: str) -> bool:
    """Return what a mark says: true or 1, false or 0.

    Raises:
        InvalidRow: any other value.
    """
    mark = _MARKS.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(mark, bool | int | float) and mark in (0, 1):
        return bool(mark)
    raise InvalidRow(
        f"{where}: {key!r} is {str(value)[:40]!r}, expected 0 or 1: a turn is learned or it is not",
        f"Set data.ignore=[{key}] to learn every turn alike.",
    )

"""Read the tool calls of an answer, in the syntax of the released chat template."""

from __future__ import annotations

import json
import re
from typing import Any

_CALL, _CALL_END = "<|tool_call>call:", "<tool_call|>"
_QUOTE = '<|"|>'
_BARE = re.compile(r"[^,\]}]+")  # a number, true, false or null
_KEY = re.compile(r"[^:,{}\[\]]+")
_LITERALS = {"true": True, "false": False, "null": None, "None": None}
_DEEPEST = 64  # levels of arguments


class InvalidCall(ValueError):
    """A text that begins a call and is none."""


def read_tool_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return name and arguments of every call in a text; none if it calls nothing.

    Raises:
        InvalidCall: a call that is cut or not in the template's syntax.
    """
    calls = []
    place = text.find(_CALL)
    while place >= 0:
        start = text.find("{", place)
        if start < 0:
            raise InvalidCall(f"a call without arguments: {text[place : place + 60]}")
        name = text[place + len(_CALL) : start].strip()
        arguments, end = _read_object(text, start, 0)
        if not name or not text.startswith(_CALL_END, end):
            raise InvalidCall(f"a call that does not end: {text[place : place + 60]}")
        calls.append((name, arguments))
        place = text.find(_CALL, end)
    return calls


def _read_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Return the value at a place of the text, and where it ends."""
    if depth > _DEEPEST:
        raise InvalidCall(f"more than {_DEEPEST} levels of arguments")
    if text.startswith(_QUOTE, at):
        return _read_quoted(text, at)
    if text.startswith("{", at):
        return _read_object(text, at, depth)
    if text.startswith("[", at):
        return _read_list(text, at, depth)
    found = _BARE.match(text, at)
    if found is None:
        raise InvalidCall(f"no value: {text[at : at + 60]}")
    word = found.group().strip()
    if word in _LITERALS:
        return _LITERALS[word], found.end()
    try:
        return json.loads(word, parse_constant=refuse_constant), found.end()
    except ValueError:
        raise InvalidCall(f"neither text nor a number: {word[:60]}") from None


def _read_quoted(text: str, at: int) -> tuple[str, int]:
    end = text.find(_QUOTE, at + len(_QUOTE))
    if end < 0:
        raise InvalidCall(f"text that does not end: {text[at : at + 60]}")
    return text[at + len(_QUOTE) : end], end + len(_QUOTE)


def _read_object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at += 1
    while not text.startswith("}", at):
        if text.startswith(_QUOTE, at):
            key, at = _read_quoted(text, at)
        else:
            match = _KEY.match(text, at)
            if match is None:
                raise InvalidCall(f"no key: {text[at : at + 60]}")
            key, at = match.group().strip(), match.end()
        if not text.startswith(":", at) or key in found:
            raise InvalidCall(f"a key without a value, or twice: {key[:60]}")
        found[key], at = _read_value(text, at + 1, depth + 1)
        at = _after_comma(text, at, "}")
    return found, at + 1


def _read_list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found = []
    at += 1
    while not text.startswith("]", at):
        value, at = _read_value(text, at, depth + 1)
        found.append(value)
        at = _after_comma(text, at, "]")
    return found, at + 1


def _after_comma(text: str, at: int, end: str) -> int:
    if text.startswith(",", at):
        return at + 1
    if not text.startswith(end, at):
        raise InvalidCall(f"expected a comma or {end}: {text[at : at + 60]}")
    return at


def refuse_constant(name: str) -> Any:
    """Raise ValueError for NaN and the infinities, which JSON does not have."""
    raise ValueError(name)

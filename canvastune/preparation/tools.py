"""Tools in a row: declarations and calls, in the one form that a chat template takes."""

from __future__ import annotations

import marshal
from collections.abc import Mapping
from typing import Any

from canvastune.errors import type_of
from canvastune.preparation.conversation import InvalidRow
from canvastune.preparation.row_values import check_value, further_keys, is_empty, parse_json

_CALL_KEYS = ("id", "type", "function", "name", "arguments", "parameters")
_FUNCTION_KEYS = ("name", "arguments", "parameters")
_DECLARATION_KEYS = ("type", "name", "description", "parameters", "response")  # as Gemma's template
_REMEMBERED = 256  # lists of tools
_SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")  # OpenAI's, Anthropic's, MCP's


class ToolReader:
    """Reads the tools of rows. Rows have the same few lists of them: each is read once, and rows
    with the same list get the same objects.
    """

    def __init__(self) -> None:
        self._read: dict[bytes, tuple[tuple[dict[str, Any], ...], set[str]]] = {}

    def read(self, value: Any, column: str, unused: set[str]) -> tuple[dict[str, Any], ...]:
        """Read as `read_tools` does. The declarations are shared: they must not be changed.

        Raises:
            InvalidRow: as `read_tools`.
        """
        try:
            # Version 0: without references, which would depend on more than the value.
            key = marshal.dumps((column, value), 0)
        except ValueError:  # a type that JSON does not have, or too many levels
            return read_tools(value, column, unused)
        if key not in self._read:
            found: set[str] = set()
            tools = read_tools(value, column, found)
            if len(self._read) == _REMEMBERED:
                self._read.clear()
            self._read[key] = tools, found
        tools, found = self._read[key]
        unused |= found
        return tools


def read_tools(value: Any, column: str, unused: set[str]) -> tuple[dict[str, Any], ...]:
    """Read function declarations: OpenAI's list, bare functions, or either as JSON text.

    Args:
        column: that holds them.
        unused: gets the keys that no template writes.

    Raises:
        InvalidRow: no list, or a declaration without a name.
    """
    where = f"column {column!r}"
    if isinstance(value, str):
        value = parse_json(value, where)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InvalidRow(f"{where} is {type_of(value)}, expected a list of function declarations")
    tools = []
    for number, item in enumerate(value, 1):
        declared = f"{where}: declaration {number}"
        tool = parse_json(item, declared) if isinstance(item, str) else item
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow(
                f"{declared} has no name, expected {{'type': 'function',"
                " 'function': {'name', 'description', 'parameters'}}"
            )
        if function is not tool:
            unused |= further_keys(tool, ("type", "function"), column)
        unused |= further_keys(function, (*_DECLARATION_KEYS, *_SCHEMA_KEYS), column)
        tools.append({"type": "function", "function": _read_declaration(function, declared)})
    return tuple(tools)


def _read_declaration(function: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a declaration whose parameters are a JSON Schema: a template writes no other ones."""
    check_value(function, where)
    key = next((key for key in _SCHEMA_KEYS if not is_empty(function.get(key))), None)
    if key is None:
        return function
    parameters = function[key]
    if isinstance(parameters, str):
        parameters = parse_json(parameters, f"{where}: {key!r}")
        check_value(parameters, where)
    if not isinstance(parameters, dict) or not (
        not parameters or isinstance(parameters.get("type"), str) or "properties" in parameters
    ):
        raise InvalidRow(
            f"{where}: the {key} of {function['name']!r} are not a JSON Schema, which a template"
            " would leave out; expected {'type': 'object', 'properties': {...}}"
        )
    if key == "parameters" and parameters is function[key]:
        return function
    return {name: item for name, item in function.items() if name != key} | {
        "parameters": parameters
    }


def read_calls(
    keys: Mapping[str, Any], where: str, column: str, unused: set[str]
) -> list[dict[str, Any]]:
    """Read the calls of an assistant's message: `tool_calls`, and OpenAI's older `function_call`.

    Args:
        where: the message.
        column: that holds the messages.
        unused: gets the keys that no template writes.

    Raises:
        InvalidRow: a call without a name, arguments that are not an object, an id given twice.
    """
    calls = keys.get("tool_calls", [])
    if isinstance(calls, str):
        calls = parse_json(calls, f"{where}: 'tool_calls'")
    if not isinstance(calls, list):
        raise InvalidRow(f"{where}: 'tool_calls' is {type_of(calls)}, expected a list")
    if "function_call" in keys:
        calls = [*calls, keys["function_call"]]
    read = [_read_call(call, where, f"{column}.tool_calls", unused) for call in calls]
    ids = [call["id"] for call in read if "id" in call]
    if len(set(ids)) < len(ids):
        raise InvalidRow(f"{where}: two tool calls have the same id: {', '.join(ids)}")
    return read


def read_call_text(content: Any, where: str, column: str, unused: set[str]) -> list[dict[str, Any]]:
    """Read the calls that ShareGPT has as the text of a message. Raises: InvalidRow."""
    if isinstance(content, str):
        content = parse_json(content, f"{where}: the call")
    return [
        _read_call(call, where, f"{column}.function_call", unused)
        for call in (content if isinstance(content, list) else [content])
    ]


def _read_call(call: Any, where: str, place: str, unused: set[str]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRow(
            f"{where}: a tool call without a name, expected {{'function': {{'name', 'arguments'}}}}"
        )
    places = [
        holder[key]
        for holder in ([function] if function is call else [function, call])
        for key in ("arguments", "parameters")
        if not is_empty(holder.get(key))
    ]
    if len(places) > 1 and any(each != places[0] for each in places):
        raise InvalidRow(f"{where}: the call of {function['name']!r} has its arguments twice")
    arguments = places[0] if places else None
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}: the arguments of {function['name']!r}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise InvalidRow(
            f"{where}: the arguments of {function['name']!r} are {type_of(arguments)}, expected an"
            " object"
        )
    check_value(function["name"], f"{where}: the name of a call")
    check_value(arguments, f"{where}: the arguments of {function['name']!r}")
    unused |= further_keys(call, _CALL_KEYS, place)
    if function is not call:
        unused |= further_keys(function, _FUNCTION_KEYS, f"{place}.function")
    read: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if (known := call_id(call.get("id"))) is not None:
        check_value(known, f"{where}: the id of a call")
        read["id"] = known
    return read


def call_id(value: Any) -> str | None:
    """Return the id of a call as text: some data numbers its calls."""
    return None if is_empty(value) else str(value)

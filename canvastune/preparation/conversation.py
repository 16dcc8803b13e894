"""What a row says, whatever its form: messages, tools, and which assistant turns are learned."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]  # as a chat template takes it: role, content, and what the role adds
# json.dumps would create an encoder for every row.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode
_quote = json.encoder.encode_basestring  # a text as JSON; other characters than ASCII stay
_PLAIN_KEYS = {"role", "content"}


class InvalidRow(ValueError):
    """A row that cannot be trained on.

    The message is the reason, without the place; `hint` says what to do, if it is something else
    than to correct the row.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Conversation:
    """One example: the messages up to and including the assistant turn that is learned.

    Attributes:
        messages: the last one is learned, the others are its history.
        tools: function declarations in OpenAI's form.
        thinking: whether the chat template is asked with `enable_thinking`.
        row_id: the id of the row's whole conversation; examples of one row share it.
        turn: 1-based number of the learned message, or None if the row has one example.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = False
    row_id: str | None = None
    turn: int | None = None

    @property
    def history(self) -> list[Message]:
        """The messages before the answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The content of the learned turn, as it was written."""
        content: str = self.messages[-1]["content"]
        return content

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether there is nothing but roles and contents."""
        return not self.tools and all(message.keys() == _PLAIN_KEYS for message in self.messages)

    @functools.cached_property
    def id(self) -> str:
        """SHA-256 of what the template is given, independent of the file and the row's format."""
        return hash_messages(self.messages, self.tools)

    @property
    def characters(self) -> int:
        """Size of its text, roughly: tools are not counted, which repeat from row to row."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def group(self) -> str:
        """The id that decides on which side of the validation split the example falls."""
        return self.row_id or self.id


@dataclass(frozen=True)
class ParsedRow:
    """A whole row.

    Attributes:
        messages: all turns.
        tools: function declarations in OpenAI's form.
        marked: indices of assistant turns that the row marks as not to be learned.
        unused: names of columns and message keys that have a value and are not used.
    """

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    marked: frozenset[int] = frozenset()
    unused: list[str] = field(default_factory=list)

    @functools.cached_property
    def answers(self) -> list[int]:
        """Indices of the assistant turns that have a turn before them."""
        return [
            at for at, message in enumerate(self.messages) if at and message["role"] == "assistant"
        ]

    def examples(self, learn: Literal["last", "all"]) -> list[Conversation]:
        """Return one example per learned turn: none if all of them are marked.

        Raises:
            InvalidRow: no assistant turn, or nothing before it.
        """
        answers = self.answers
        if not answers:
            if not any(message["role"] == "assistant" for message in self.messages):
                raise InvalidRow("no assistant turn")
            raise InvalidRow("no turn before the assistant's: there is nothing to answer")
        if learn == "last":
            return [] if answers[-1] in self.marked else [self._example(answers[-1])]
        row_id = hash_messages(self.messages[: answers[-1] + 1], self.tools)
        return [self._example(at, row_id) for at in answers if at not in self.marked]

    def _example(self, at: int, row_id: str | None = None) -> Conversation:
        learned = self.messages[at]
        if "tool_responses" in learned:  # written by the environment, after the call
            learned = {key: item for key, item in learned.items() if key != "tool_responses"}
        return Conversation(
            (*self.messages[:at], learned),
            self.tools,
            self._thinks(at),
            row_id,
            None if row_id is None else at + 1,
        )

    def _thinks(self, at: int) -> bool:
        """Return whether a turn has thinking: all messages between two of the user are one turn,
        and whether a model thinks is a setting of the request, not of the message.
        """
        start = end = at
        while start and self.messages[start - 1]["role"] != "user":
            start -= 1
        while end < len(self.messages) and self.messages[end]["role"] != "user":
            end += 1
        return any("reasoning" in message for message in self.messages[start:end])


def hash_messages(
    messages: tuple[Message, ...] | list[Message], tools: tuple[dict[str, Any], ...]
) -> str:
    """Return the SHA-256 of roles and stripped contents, and of tools, calls and thinking where
    there are any. Of the ids of calls only counts which response belongs to which call: logs of the
    same conversation have other ids.
    """
    if not tools and all(message.keys() == _PLAIN_KEYS for message in messages):
        # What the encoder writes, in half of its time.
        turns = [
            f"[{_quote(message['role'])},{_quote(message['content'].strip())}]"
            for message in messages
        ]
        return hashlib.sha256(f"[{','.join(turns)}]".encode()).hexdigest()
    plain: list[Any] = []
    places: dict[str, int] = {}  # of the calls that the next responses answer, by their id
    for message in messages:
        content = message["content"].strip()
        if message.keys() == _PLAIN_KEYS:
            plain.append([message["role"], content])
            continue
        known = {**message, "content": content}
        if calls := message.get("tool_calls"):
            places = {call["id"]: at for at, call in enumerate(calls)}
            known["tool_calls"] = [call["function"] for call in calls]
        elif "tool_call_id" in message:
            known["tool_call_id"] = places[message["tool_call_id"]]
        plain.append(known)
    return hashlib.sha256(_to_json([plain, tools] if tools else plain).encode()).hexdigest()

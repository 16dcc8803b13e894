"""From a row to messages, and from messages to tokens with a response span (objective.md section 1).

The prefix is, token for token, what inference feeds the model: the chat template's own generation prompt. The response
is the assistant's content and the marker that closes its turn. For every conversation the two are proved against the
template's own rendering of the whole conversation, byte for byte, before a token is trained on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from canvastune.config.schema import ColumnsConfig, DataConfig
from canvastune.errors import UserError

Form = Literal["messages", "gsm8k", "columns"]

_ROLES = ("system", "user", "assistant")
_UNTRAINABLE = ("tool_calls", "function_call", "tool_responses", "reasoning", "reasoning_content", "thinking")
_SENTINEL = "Zq7SentinelAnswer7qZ"  # stands for the answer when a template's own text is taken apart; never trained on
_REMEDY = "Give the folder of an unchanged checkpoint"
_MOST_SHAPES = 1000  # sequences of roles whose template text is remembered
# What Gemma 4's larger models write after the model turn's header when they answer without thinking. It stands in the
# generation prompt alone, not in the rendering of a finished conversation: the one documented difference between them.
_EMPTY_THOUGHT = re.compile(r"<\|channel>thought\s*<channel\|>\s*")
_as_text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make an encoder for every row


class InvalidRow(ValueError):
    """A row that cannot be trained on. The message is the reason, without the place."""


@dataclass(frozen=True)
class Conversation:
    """Messages up to and including the last assistant turn; what a row says after it is not trained on and left out."""

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
        """SHA-256 of roles and contents without outer blanks: the same conversation has the same id from any file, in any form."""
        plain = [[message["role"], message["content"].strip()] for message in self.messages]
        return hashlib.sha256(_as_text(plain).encode()).hexdigest()


def needed_columns(form: Form, columns: ColumnsConfig) -> tuple[str, ...]:
    """The keys that a row of this form must have."""
    if form == "messages":
        return ("messages",)
    return ("question", "answer") if form == "gsm8k" else (columns.prompt, columns.response)


def detect_form(config: DataConfig, keys: Sequence[str]) -> Form | None:
    """The form of a row with these keys, or None if they are no form's. A form that the config sets is the only candidate."""
    candidates: tuple[Form, ...] = ("messages", "gsm8k", "columns") if config.format == "auto" else (config.format,)
    return next((form for form in candidates if set(needed_columns(form, config.columns)) <= set(keys)), None)


def read_conversation(value: Any, form: Form, columns: ColumnsConfig) -> Conversation:
    """Turn a row into a conversation.

    Raises:
        InvalidRow: a missing column, an unknown role, content that is not text, no assistant turn, nothing before it, an empty turn.
    """
    if not isinstance(value, dict):
        raise InvalidRow(f"the row is {_kind(value)}, expected an object with the columns {', '.join(needed_columns(form, columns))}")
    missing = [key for key in needed_columns(form, columns) if key not in value]
    if missing:
        raise InvalidRow(f"no column {missing[0]!r}; the row's columns: {', '.join(map(str, value)) or 'none'}")
    if form == "messages":
        messages = _check_messages(value["messages"])
    else:
        prompt, response = needed_columns(form, columns)
        messages = [_turn("user", value[prompt], f"column {prompt!r}"), _turn("assistant", value[response], f"column {response!r}")]
        if form == "columns" and columns.system is not None and value.get(columns.system) not in (None, ""):
            messages.insert(0, _turn("system", value[columns.system], f"column {columns.system!r}"))
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise InvalidRow("no assistant turn")
    if last == 0:
        raise InvalidRow("no turn before the assistant's: there is nothing to answer")
    return Conversation(tuple(messages[: last + 1]))


def _check_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise InvalidRow(f"column 'messages' is {_kind(value)}, expected a list of {{'role', 'content'}} objects")
    if not value:
        raise InvalidRow("column 'messages' is an empty list")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise InvalidRow(f"message {number} is {_kind(message)}, expected an object with 'role' and 'content'")
        if "role" not in message:
            raise InvalidRow(f"message {number} has no 'role'; its keys: {', '.join(map(str, message)) or 'none'}")
        if message["role"] not in _ROLES:
            raise InvalidRow(f"message {number}: unknown role {str(message['role'])[:40]!r}, expected {', '.join(_ROLES)}")
        if lost := [key for key in _UNTRAINABLE if message.get(key)]:
            raise InvalidRow(f"message {number} carries {lost[0]!r}, which is not supported; only 'content' would be trained on")
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
            f"{where} ({role}): the content is not valid Unicode (half a surrogate pair at character {error.start + 1})"
        ) from None
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


class Encoded(NamedTuple):
    """The tokens of one conversation, uncut: as int32, which go to another process and to disk as they are."""

    tokens: array[int]
    prefix: int  # how many of them inference feeds, header of the model turn included; the others are the response: content and marker


@dataclass(frozen=True)
class _Shape:
    """What the chat template itself writes for one sequence of roles."""

    thought: str  # the empty thought channel at the end of the generation prompt, or ""
    closing: str  # what follows the answer, the marker that closes the turn first
    markers: list[int]  # control tokens of the generation prompt, in order
    problem: str | None = None  # why conversations of this shape cannot be trained on


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        """Take the template's end of turn apart.

        Args:
            where: the model folder, for messages.

        Raises:
            UserError: no chat template, or one whose end of turn is not a token of the tokenizer.
        """
        self._tokenizer = tokenizer
        self._shapes: dict[tuple[str, ...], _Shape] = {}
        if not tokenizer.chat_template:
            raise UserError(f"{where}: the tokenizer has no chat template. Give a model whose folder has chat_template.jinja")
        tokenizer([_SENTINEL], add_special_tokens=False)  # takes off what tokenizer.json says of padding and cutting
        added = tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            rendered = self._render([probe])[0]
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"{where}: the chat template cannot render a user and an assistant turn ({error}). {_REMEDY}") from None
        if rendered.count(_SENTINEL) != 1:
            raise UserError(
                f"{where}: the chat template shows an assistant's content {rendered.count(_SENTINEL)} times, expected once. {_REMEDY}"
            )
        # The newline after the marker belongs to the template's next turn, not to this one.
        self.closing = rendered.partition(_SENTINEL)[2].rstrip()
        self.closing_ids = self._tokenize([self.closing])[0]
        if not self.closing_ids or not set(self.closing_ids) <= self._added:
            raise UserError(
                f"{where}: the chat template closes a turn with {self.closing!r}, which the tokenizer has no token for. "
                "Template and tokenizer do not belong together: give the folder of an unchanged checkpoint"
            )
        self._check_boundary(self._render([probe[:1]], generation=True)[0], where)
        # Control tokens: all special ones, and whatever opens or closes the template's turns even if it is not marked special.
        chrome = self._tokenize([self._render([probe[:1]], generation=True)[0] + self.closing])[0]
        self._control = {i for i, token in added.items() if token.special} | (self._added & set(chrome))

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | InvalidRow]:
        """Encode a batch; a conversation that cannot be trained on comes back as the InvalidRow that says why."""
        shapes = [self._shape(conversation) for conversation in conversations]
        texts = self._texts(conversations, shapes)
        good = [text for text in texts if not isinstance(text, InvalidRow)]
        prefixes = iter(self._tokenize([prefix for prefix, _ in good]))
        # Tokenized apart from the prefix: the boundary is then a token boundary, as it is at inference.
        responses = iter(self._tokenize([response for _, response in good]))
        encoded: list[Encoded | InvalidRow] = []
        for shape, text in zip(shapes, texts, strict=True):
            if isinstance(text, InvalidRow):
                encoded.append(text)
            else:
                encoded.append(self._check(shape, next(prefixes), next(responses)))
        return encoded

    def _check_boundary(self, prompt: str, where: str) -> None:
        """Where tokens of the whole text have their boundary between prompt and answer, they must be the tokens of the two apart.

        They are not if the tokenizer puts a blank before every text: the answer would be taught with one that inference never sees.
        """
        answer = _SENTINEL + self.closing
        whole = self._tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in whole["offset_mapping"]]
        if len(prompt) not in starts:  # a token straddles the boundary: only the two apart are what inference has
            return
        if whole["input_ids"] != [token for tokens in self._tokenize([prompt, answer]) for token in tokens]:
            raise UserError(
                f"{where}: the tokenizer encodes an answer differently behind the prompt and alone; it may begin every text with a blank. "
                "Expected Gemma's tokenizer: give the folder of an unchanged checkpoint"
            )

    def _texts(self, conversations: Sequence[Conversation], shapes: Sequence[_Shape]) -> list[tuple[str, str] | InvalidRow]:
        """Prefix and response text of each conversation, proved to make up the template's own rendering."""
        histories = [conversation.history for conversation in conversations]
        wholes = [list(conversation.messages) for conversation in conversations]
        try:
            prompts: Sequence[str | InvalidRow] = self._render(histories, generation=True)
            renderings: Sequence[str | InvalidRow] = self._render(wholes)
        except Exception:  # the template refuses one of them, with whatever it raises: find out which
            prompts = [self._render_one(history, generation=True) for history in histories]
            renderings = [self._render_one(whole) for whole in wholes]
        texts: list[tuple[str, str] | InvalidRow] = []
        for conversation, shape, prompt, rendering in zip(conversations, shapes, prompts, renderings, strict=True):
            if isinstance(prompt, InvalidRow) or isinstance(rendering, InvalidRow):
                texts.append(prompt if isinstance(prompt, InvalidRow) else rendering)  # type: ignore[arg-type]
            else:
                texts.append(self._split(conversation, shape, prompt, rendering))
        return texts

    def _split(self, conversation: Conversation, shape: _Shape, prompt: str, rendering: str) -> tuple[str, str] | InvalidRow:
        if shape.problem:
            return InvalidRow(shape.problem)
        stock_prefix = prompt.removesuffix(shape.thought)
        for answer in (conversation.answer.strip(), conversation.answer):  # Gemma's templates take outer blanks away
            if prompt.endswith(shape.thought) and rendering == stock_prefix + answer + shape.closing:
                return prompt, answer + self.closing
        return InvalidRow("the chat template changes the answer (it holds a thought or another control sequence that the template removes)")

    def _check(self, shape: _Shape, prefix: list[int], response: list[int]) -> Encoded | InvalidRow:
        """Refuse text that became a control token: it would open or close a turn that nobody wrote."""
        content, end = response[: -len(self.closing_ids)], response[-len(self.closing_ids) :]
        found, inside = list(filter(self._control.__contains__, prefix)), self._control.intersection(content)
        if found == shape.markers and not inside and end == self.closing_ids and content:
            return Encoded(array("i", prefix + response), len(prefix))
        extra = [token for token in content if token in inside] or _first_difference(found, shape.markers)
        unknown = self._tokenizer.unk_token_id
        if extra == [unknown]:
            return InvalidRow("the text holds a character that the tokenizer has no token for")
        name = self._tokenizer.convert_ids_to_tokens(extra[0]) if extra else self.closing
        return InvalidRow(f"the text holds the control token {name!r}, which would become a marker of the chat, not text")

    def _shape(self, conversation: Conversation) -> _Shape:
        roles = tuple([message["role"] for message in conversation.messages])
        if roles not in self._shapes:
            if len(self._shapes) == _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[roles] = self._take_apart(roles)
        return self._shapes[roles]

    def _take_apart(self, roles: tuple[str, ...]) -> _Shape:
        """Render one conversation of this shape with a sentinel as the answer, and find what the template writes around it."""
        messages = [{"role": role, "content": "x"} for role in roles[:-1]] + [{"role": roles[-1], "content": _SENTINEL}]
        sequence = ", ".join(roles)
        rendering, prompt = self._render_one(messages), self._render_one(messages[:-1], generation=True)
        if isinstance(rendering, InvalidRow) or isinstance(prompt, InvalidRow):
            return _Shape(
                "", "", [], f"the chat template refuses the turns {sequence}: {rendering if isinstance(rendering, InvalidRow) else prompt}"
            )
        before, sentinel, closing = rendering.partition(_SENTINEL)
        thought = prompt[len(before) :]
        if not sentinel or _SENTINEL in closing or closing.rstrip() != self.closing:
            return _Shape("", "", [], f"the chat template writes the turns {sequence} in a way that hides where the answer ends")
        if not prompt.startswith(before) or (thought and not _EMPTY_THOUGHT.fullmatch(thought)):
            return _Shape(
                "",
                "",
                [],
                f"the chat template asks for an answer to the turns {', '.join(roles[:-1])} otherwise than it writes one: {prompt!r}",
            )
        markers = [token for token in self._tokenize([prompt])[0] if token in self._control]
        return _Shape(thought, closing, markers)

    def _render(self, conversations: list[list[dict[str, str]]], *, generation: bool = False) -> list[str]:
        """What the tokenizer's apply_chat_template renders, without its copies of messages and variables, which took half of the time."""
        template = _compile_jinja_template(self._tokenizer.get_chat_template())  # the library keeps what it compiled
        tokens = self._tokenizer.special_tokens_map
        variables = {**template.globals, **tokens, "tools": None, "documents": None, "add_generation_prompt": generation}
        contexts = (template.new_context({**variables, "messages": messages}, shared=True) for messages in conversations)
        return ["".join(template.root_render_func(context)) for context in contexts]

    def _render_one(self, messages: list[dict[str, str]], *, generation: bool = False) -> str | InvalidRow:
        try:
            return self._render([messages], generation=generation)[0]
        except Exception as error:  # a template may raise anything that its expressions raise
            return InvalidRow(f"the chat template refuses it: {' '.join(str(error).split())}")

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # Not through the tokenizer's own call, which finds the place of every token in the text and makes a dict of every row: half
        # the time again. The tokens are the same.
        backend = self._tokenizer.backend_tokenizer
        if isinstance(backend.model, BPE):
            # It would keep 10,000 words of up to 256 bytes, 60 to 90 MB. To Gemma's tokenizer all text between two control tokens is
            # one word, which does not come again.
            backend.model._resize_cache(0)
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _first_difference(found: list[int], expected: list[int]) -> list[int]:
    """The first token of `found` that is not at its place in `expected`, as a list of one; empty if there is none."""
    for at, token in enumerate(found):
        if at >= len(expected) or token != expected[at]:
            return [token]
    return []

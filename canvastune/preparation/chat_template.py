"""From a conversation to tokens with a response span, by the chat template.

The prefix is, token for token, what inference feeds the model: the chat template's own generation
prompt, with the conversation's tools. The response is what the model writes then: its thinking, its
calls, its content, and the marker that ends its turn or hands over to a tool. For every
conversation the two are compared with the template's own rendering of the whole conversation, byte
for byte, before a token is trained on. Where the released template's two renderings differ, the
generation prompt decides (docs/data.md lists the differences).
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from canvastune.errors import UserError, one_line
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.conversation import Conversation, InvalidRow
from canvastune.preparation.template_renderer import TemplateRenderer

_SENTINEL = "Zq7SentinelAnswer7qZ"  # the answer of a probe; never trained on
_HINT = "Use the directory of an unchanged checkpoint."
_OPEN_THOUGHT, _CLOSE_THOUGHT = "<|channel>thought", "<channel|>"
_NOT_WORDS = re.compile(r"[^\w\s]")
# Control tokens of these two shapes are found by one pass over a text, whatever their number.
_SHAPES = re.compile(r"<[^<>\[\]\s]+>|\[[^<>\[\]\s]+\]")

# What templates of other models write around turns: ChatML, Llama, Mistral, Phi, GLM, DeepSeek,
# gpt-oss, and Gemma before version 4. Not <s> and </s>, which are HTML as well.
FOREIGN_CONTROL = frozenset(
    {
        *(
            "<|im_start|>",
            "<|im_end|>",
            "<|im_sep|>",
            "<|endoftext|>",
            "<|end|>",
            "<|endofprompt|>",
        ),
        *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|return|>", "<|call|>"),
        *("<start_of_turn>", "<end_of_turn>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)


class EncodedConversation(NamedTuple):
    """The tokens of one conversation, uncut, as int32: sent to another process and to disk without
    conversion.

    Attributes:
        tokens: prefix and response.
        prefix_length: tokens that inference feeds, with the header of the model turn.
        answer: what a response with tool calls says, without thinking and closing marker; None:
            the learned message's content.
        foreign: control tokens of other models in the texts.
    """

    tokens: array[int]
    prefix_length: int
    answer: str | None = None
    foreign: tuple[str, ...] = ()


class _Text(NamedTuple):
    """A conversation as text: what inference feeds, and what the model writes."""

    prefix: str
    response: str
    foreign: tuple[str, ...]


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template."""

    def __init__(self, tokenizer: ChatTokenizer, where: str) -> None:
        """Find the template's end of turn.

        Args:
            where: the model directory, for messages.

        Raises:
            UserError: no chat template, or one whose end of turn is not a token of the tokenizer.
        """
        self._tokenizer = tokenizer
        self._unknown = tokenizer.unknown_id
        if not tokenizer.template:
            raise UserError(
                f"{where}: the tokenizer has no chat template",
                hint="Use a model whose directory has chat_template.jinja.",
            )
        self._renderer = TemplateRenderer(tokenizer.template, tokenizer.special_tokens)
        added = tokenizer.added_tokens
        asked = {"role": "user", "content": "x"}
        probe = Conversation((asked, {"role": "assistant", "content": _SENTINEL}))
        try:
            rendered = self._renderer.render([probe])[0]
            prompt = self._renderer.render([probe], generation=True)[0]
        except Exception as error:  # a template may raise anything that its expressions raise
            raise UserError(
                f"{where}: the chat template cannot render a user and an assistant turn"
                f" ({one_line(error)})",
                hint=_HINT,
            ) from None
        if rendered.count(_SENTINEL) != 1:
            raise UserError(
                f"{where}: the chat template shows an assistant's content"
                f" {rendered.count(_SENTINEL)} times, expected once",
                hint=_HINT,
            )
        # The newline after the marker belongs to the template's next turn, not to this one.
        self.closing = rendered.partition(_SENTINEL)[2].rstrip()
        self.closing_ids = tokenizer.encode([self.closing])[0]
        if not self.closing_ids or not set(self.closing_ids) <= set(added):
            raise UserError(
                f"{where}: the chat template closes a turn with {self.closing!r}, which is not a "
                "token of the tokenizer: they belong to different models",
                hint=_HINT,
            )
        self._check_boundary(prompt, where)
        # What opens a turn of the model, and what the template writes again after a tool's response
        # although its generation prompt does not.
        question = self._renderer.render([Conversation((asked,))])[0]
        self._header = prompt.removeprefix(question) if prompt.startswith(question) else ""
        if _OPEN_THOUGHT in self._header:
            self._header = self._header[: self._header.index(_OPEN_THOUGHT)]
        # Control tokens: all special ones, and those of the template even if they are not marked
        # special. Gemma's line breaks are added tokens too, but text.
        control = {
            token.content
            for token in added.values()
            if token.special
            or (_NOT_WORDS.search(token.content) and token.content in tokenizer.template)
        }
        self._control = frozenset(control)
        others = [re.escape(token) for token in control if not _SHAPES.fullmatch(token)]
        self._other_control = re.compile("|".join(others)) if others else None
        self._tool_texts: dict[tuple[int, ...], str] = {}
        self._call_closing = self._probe_call()

    @property
    def call_closing_id(self) -> int | None:
        """The token that ends a turn with a tool call; None if the template renders no calls."""
        return self._call_closing

    def encode(
        self, conversations: Sequence[Conversation]
    ) -> list[EncodedConversation | InvalidRow]:
        """Encode a batch; an InvalidRow takes the place of what cannot be trained on."""
        texts = self._texts(conversations)
        good = [text for text in texts if not isinstance(text, InvalidRow)]
        prefixes = iter(self._tokenizer.encode([text.prefix for text in good]))
        # Tokenized separately from the prefix: the boundary is then a token boundary, as in
        # inference.
        responses = iter(self._tokenizer.encode([text.response for text in good]))
        return [
            text
            if isinstance(text, InvalidRow)
            else self._encoded(conversation, text, next(prefixes), next(responses))
            for conversation, text in zip(conversations, texts, strict=True)
        ]

    def _check_boundary(self, prompt: str, where: str) -> None:
        """Check that prompt and answer have the same tokens separately and together.

        They differ if the tokenizer puts a blank before every text: training would then see a blank
        before the answer that inference never sees.
        """
        answer = _SENTINEL + self.closing
        whole = self._tokenizer.backend.encode(prompt + answer, add_special_tokens=False)
        starts = [start for start, _ in whole.offsets]
        if len(prompt) not in starts:
            return  # a token straddles the boundary: inference only has the two separately
        if whole.ids != [
            token for tokens in self._tokenizer.encode([prompt, answer]) for token in tokens
        ]:
            raise UserError(
                f"{where}: the tokenizer encodes an answer differently after the prompt and "
                "separately, perhaps with a blank before every text; expected Gemma's tokenizer",
                hint=_HINT,
            )

    def _probe_call(self) -> int | None:
        """Return the token that the template ends a turn with a tool call with."""
        call = {"type": "function", "id": "1", "function": {"name": _SENTINEL, "arguments": {}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        rendered = self._render_one(Conversation(({"role": "user", "content": "x"}, calling)))
        if isinstance(rendered, InvalidRow) or _SENTINEL not in rendered:
            return None
        last = self._tokenizer.encode([rendered.rstrip()])[0][-1]
        return last if self._tokenizer.backend.id_to_token(last) in self._control else None

    def _texts(self, conversations: Sequence[Conversation]) -> list[_Text | InvalidRow]:
        """Return prefix and response text of each conversation, checked against the template's own
        rendering.
        """
        try:
            prompts: Sequence[str | InvalidRow]
            renderings: Sequence[str | InvalidRow]
            prompts, renderings = self._renderer.render_both(conversations)
        except Exception:  # a template may raise anything: find out for which conversation
            prompts = [self._render_one(each, generation=True) for each in conversations]
            renderings = [self._render_one(each) for each in conversations]
        self._tool_texts.clear()  # by identity: the tools live until the batch ends
        texts: list[_Text | InvalidRow] = []
        for conversation, prompt, rendering in zip(conversations, prompts, renderings, strict=True):
            if isinstance(prompt, InvalidRow):
                texts.append(prompt)
            elif isinstance(rendering, InvalidRow):
                texts.append(rendering)
            else:
                try:
                    texts.append(self._text(conversation, prompt, rendering))
                except InvalidRow as reason:
                    texts.append(reason)
        return texts

    def _text(self, conversation: Conversation, prompt: str, rendering: str) -> _Text:
        """Split a conversation's rendering after what inference feeds, and prove that nothing of
        the conversation is lost or changed.

        Raises:
            InvalidRow: the template leaves something out, or text would become a control token.
        """
        written = _after(prompt, rendering, self._header, self.closing)
        if written is None:
            roles = ", ".join(message["role"] for message in conversation.history)
            shown = prompt if len(prompt) <= 200 else f"...{prompt[-200:]}"
            raise InvalidRow(
                f"the chat template's generation prompt after the turns {roles} differs from how"
                f" it writes an answer: {shown!r}"
            )
        response = written.rstrip()  # the blanks after the marker belong to the next turn
        learned = conversation.messages[-1]
        content = learned["content"]
        if learned.keys() <= {"role", "content"}:
            body = response.removesuffix(self.closing)
            body = body.removeprefix(_CLOSE_THOUGHT) if conversation.thinking else body
            same = response.endswith(self.closing) and body in (content.strip(), content)
        else:
            same = content.strip() in response and (
                "tool_calls" in learned or response.endswith(content.strip() + self.closing)
            )
        if not same:
            raise InvalidRow(
                "the chat template changes the answer (it holds a thought or another control"
                " sequence that the template removes)"
            )
        if not conversation.is_plain:
            self._check_extras(conversation, prompt, response)
        name, foreign = self._find_control(conversation)
        if name:
            raise InvalidRow(
                f"the text holds the control token {name!r}, which would become a marker of the"
                " chat, not text"
            )
        return _Text(prompt, response, foreign)

    def _check_extras(self, conversation: Conversation, prompt: str, response: str) -> None:
        """Refuse what the template does not write: tools, calls, tool responses, thinking.

        Thinking of earlier turns is left out by Gemma's template, as it is at inference.
        """
        for tool in conversation.tools:
            if tool["function"]["name"] not in prompt:
                raise InvalidRow(
                    "the model's chat template does not write tool declarations",
                    "Use a model whose template does, or set data.ignore=[tools].",
                )
        learned = conversation.messages[-1]
        for message in conversation.messages:
            where = response if message is learned else prompt
            calls = message.get("tool_calls", ())
            if any(call["function"]["name"] not in where for call in calls):
                raise InvalidRow(
                    "the model's chat template does not write tool calls",
                    "Use a model whose template does, or remove these rows.",
                )
            if message["role"] == "tool" and message["content"].strip() not in prompt:
                raise InvalidRow(
                    "the model's chat template does not write tool responses",
                    "Use a model whose template does, or remove these rows.",
                )
        if "reasoning" in learned and learned["reasoning"].strip() not in response:
            raise InvalidRow(
                "the model's chat template does not write thinking",
                "Use a model whose template does, or set data.thinking=drop.",
            )

    def _find_control(self, conversation: Conversation) -> tuple[str | None, tuple[str, ...]]:
        """Return a control token in the texts of a conversation, which would open or close something
        that is not in the data, and those of other models, which are text to this one. Texts are
        joined: a template may write two of them side by side.
        """
        if conversation.is_plain:
            text = "".join([message["content"].strip() for message in conversation.messages])
        else:
            text = "".join(_strings(conversation.messages, [])) + self._tool_text(conversation)
        shaped = _SHAPES.findall(text) if "<" in text or "[" in text else []
        for token in shaped:
            if token in self._control:
                return str(token), ()
        if self._other_control and (found := self._other_control.search(text)):
            return found[0], ()
        return None, tuple(sorted(FOREIGN_CONTROL.intersection(shaped))) if shaped else ()

    def _tool_text(self, conversation: Conversation) -> str:
        """Return the texts of the tools; rows of a batch share them."""
        if not conversation.tools:
            return ""
        key = tuple(map(id, conversation.tools))
        if key not in self._tool_texts:
            self._tool_texts[key] = "".join(_strings(conversation.tools, []))
        return self._tool_texts[key]

    def _encoded(
        self, conversation: Conversation, text: _Text, prefix: list[int], response: list[int]
    ) -> EncodedConversation | InvalidRow:
        ids = prefix + response
        # An array made from the list itself takes three times as long.
        tokens = array("i", struct.pack(f"{len(ids)}i", *ids))
        if self._unknown is not None and (np.frombuffer(tokens, np.intc) == self._unknown).any():
            return InvalidRow("the text holds a character that the tokenizer has no token for")
        if "tool_calls" not in conversation.messages[-1]:
            return EncodedConversation(tokens, len(prefix), foreign=text.foreign)
        if response[-1] != self._call_closing:
            name = self._tokenizer.backend.id_to_token(response[-1])
            return InvalidRow(
                f"the chat template ends a tool call with {name!r}, where generation would not stop"
            )
        closing = self._tokenizer.decode(response[-1:])
        said = text.response.rpartition(_CLOSE_THOUGHT)[2].removesuffix(closing)
        return EncodedConversation(tokens, len(prefix), said, text.foreign)

    def _render_one(
        self, conversation: Conversation, *, generation: bool = False
    ) -> str | InvalidRow:
        try:
            return self._renderer.render([conversation], generation=generation)[0]
        except Exception as error:  # a template may raise anything that its expressions raise
            return InvalidRow(f"the chat template refuses it: {' '.join(str(error).split())}")


def _after(prompt: str, rendering: str, header: str, closing: str) -> str | None:
    """Return what a conversation's rendering has after what inference feeds, or None if the two
    disagree. Four differences of Gemma's templates are known:

    - the larger models' generation prompt ends with an empty thought, which no rendering has;
    - after a tool's response the prompt writes nothing, and the rendering opens the turn again;
    - there, with thinking, the prompt opens the thought that a rendering has only if there is one;
    - there, after a call with text, the prompt closes the turn and opens none.
    """
    written = _continue(prompt, rendering, header)
    if written is None:
        head, closed, opened = prompt.rpartition(closing)
        if closed and not opened.removeprefix("\n").removeprefix(_OPEN_THOUGHT).strip():
            written = _continue(head + opened.removeprefix("\n"), rendering, header)
    return written


def _continue(prompt: str, rendering: str, header: str) -> str | None:
    if rendering.startswith(prompt):
        return rendering[len(prompt) :].removeprefix(header)
    at = prompt.rfind(_OPEN_THOUGHT)
    if at < 0 or not rendering.startswith(prompt[:at]):
        return None
    opened, written = prompt[at:], rendering[at:]
    thought = opened.removeprefix(_OPEN_THOUGHT)
    if not thought.strip():
        written = written.removeprefix(header)
        return written[len(opened) :] if written.startswith(opened) else _CLOSE_THOUGHT + written
    return written if thought.strip() == _CLOSE_THOUGHT else None


def _strings(value: Any, found: list[str]) -> list[str]:
    """Add all texts in a value, keys included, as a template writes them."""
    if isinstance(value, str):
        found.append(value.strip())
    elif isinstance(value, dict):
        for key, item in value.items():
            found.append(str(key))
            _strings(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _strings(item, found)
    return found

"""From a conversation to tokens with a response span, by the chat template.

The prefix is, token for token, what inference feeds the model: the chat template's own generation
prompt. The response is the assistant's content and the marker that closes its turn. For every
conversation the two are compared with the template's own rendering of the whole conversation, byte
for byte, before a token is trained on.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jinja2 import TemplateError
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from canvastune.errors import UserError
from canvastune.preparation.row_formats import Conversation, InvalidRow

_SENTINEL = "Zq7SentinelAnswer7qZ"  # the answer while a template is parsed; never trained on
_HINT = "Use the directory of an unchanged checkpoint."
_CACHED_TEMPLATES = 1000  # sequences of roles whose template text is cached
# What Gemma 4's larger models write after the model turn's header when they answer without
# thinking. Only the generation prompt has it, not the rendering of a finished conversation: the one
# documented difference between them.
_EMPTY_THOUGHT = re.compile(r"<\|channel>thought\s*<channel\|>\s*")


class EncodedConversation(NamedTuple):
    """The tokens of one conversation, uncut, as int32: sent to another process and to disk without
    conversion.
    """

    tokens: array[int]
    prefix_length: (
        int  # tokens that inference feeds, with the header of the model turn; the response follows
    )


@dataclass(frozen=True)
class _TurnTemplate:
    """What the chat template writes around the answer, for one sequence of roles."""

    thought: str  # the empty thought channel at the end of the generation prompt, or ""
    closing: str  # what follows the answer, the marker that closes the turn first
    markers: list[int]  # control tokens of the generation prompt, in order
    problem: str | None = None  # why conversations with these roles cannot be trained on


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        cached_templates: int = _CACHED_TEMPLATES,
    ) -> None:
        """Find the template's end of turn.

        Args:
            where: the model directory, for messages.
            cached_templates: sequences of roles whose template text is kept.

        Raises:
            UserError: no chat template, or one whose end of turn is not a token of the tokenizer.
        """
        self._tokenizer = tokenizer
        self._cached_templates = cached_templates
        self._templates: dict[tuple[str, ...], _TurnTemplate] = {}
        if not tokenizer.chat_template:
            raise UserError(
                f"{where}: the tokenizer has no chat template",
                hint="Use a model whose directory has chat_template.jinja.",
            )
        tokenizer(
            [_SENTINEL], add_special_tokens=False
        )  # resets the padding and truncation of tokenizer.json
        added = tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            rendered = self._render([probe])[0]
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"{where}: the chat template cannot render a user and an assistant turn ({error})",
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
        self.closing_ids = self._tokenize([self.closing])[0]
        if not self.closing_ids or not set(self.closing_ids) <= self._added:
            raise UserError(
                f"{where}: the chat template closes a turn with {self.closing!r}, which is not a "
                "token of the tokenizer: "
                "they belong to different models",
                hint=_HINT,
            )
        self._check_boundary(self._render([probe[:1]], generation=True)[0], where)
        # Control tokens: all special ones, and those that open or close a turn even if they are not
        # marked special.
        markers = self._tokenize([self._render([probe[:1]], generation=True)[0] + self.closing])[0]
        self._control = {i for i, token in added.items() if token.special} | (
            self._added & set(markers)
        )

    def encode(
        self, conversations: Sequence[Conversation]
    ) -> list[EncodedConversation | InvalidRow]:
        """Encode a batch; an InvalidRow with the reason takes the place of a conversation that
        cannot be trained on.
        """
        templates = [self._template(conversation) for conversation in conversations]
        texts = self._texts(conversations, templates)
        good = [text for text in texts if not isinstance(text, InvalidRow)]
        prefixes = iter(self._tokenize([prefix for prefix, _ in good]))
        # Tokenized separately from the prefix: the boundary is then a token boundary, as in
        # inference.
        responses = iter(self._tokenize([response for _, response in good]))
        encoded: list[EncodedConversation | InvalidRow] = []
        for template, text in zip(templates, texts, strict=True):
            if isinstance(text, InvalidRow):
                encoded.append(text)
            else:
                encoded.append(self._check(template, next(prefixes), next(responses)))
        return encoded

    def _check_boundary(self, prompt: str, where: str) -> None:
        """Check that prompt and answer have the same tokens separately and together.

        They differ if the tokenizer puts a blank before every text: training would then see a blank
        before the answer that inference never sees.
        """
        answer = _SENTINEL + self.closing
        whole = self._tokenizer(
            prompt + answer, add_special_tokens=False, return_offsets_mapping=True
        )
        starts = [start for start, _ in whole["offset_mapping"]]
        if (
            len(prompt) not in starts
        ):  # a token straddles the boundary: inference only has the two separately
            return
        if whole["input_ids"] != [
            token for tokens in self._tokenize([prompt, answer]) for token in tokens
        ]:
            raise UserError(
                f"{where}: the tokenizer encodes an answer differently after the prompt and "
                "separately, perhaps with a "
                "blank before every text; expected Gemma's tokenizer",
                hint=_HINT,
            )

    def _texts(
        self, conversations: Sequence[Conversation], templates: Sequence[_TurnTemplate]
    ) -> list[tuple[str, str] | InvalidRow]:
        """Return prefix and response text of each conversation, checked against the template's own
        rendering.
        """
        histories = [conversation.history for conversation in conversations]
        wholes = [list(conversation.messages) for conversation in conversations]
        try:
            prompts: Sequence[str | InvalidRow] = self._render(histories, generation=True)
            renderings: Sequence[str | InvalidRow] = self._render(wholes)
        except Exception:  # a template may raise anything: find out for which conversation
            prompts = [self._render_one(history, generation=True) for history in histories]
            renderings = [self._render_one(whole) for whole in wholes]
        texts: list[tuple[str, str] | InvalidRow] = []
        for conversation, template, prompt, rendering in zip(
            conversations, templates, prompts, renderings, strict=True
        ):
            if isinstance(prompt, InvalidRow) or isinstance(rendering, InvalidRow):
                texts.append(prompt if isinstance(prompt, InvalidRow) else rendering)  # type: ignore[arg-type]
            else:
                texts.append(self._split(conversation, template, prompt, rendering))
        return texts

    def _split(
        self, conversation: Conversation, template: _TurnTemplate, prompt: str, rendering: str
    ) -> tuple[str, str] | InvalidRow:
        if template.problem:
            return InvalidRow(template.problem)
        stock_prefix = prompt.removesuffix(template.thought)
        for answer in (
            conversation.answer.strip(),
            conversation.answer,
        ):  # Gemma's templates strip contents
            if (
                prompt.endswith(template.thought)
                and rendering == stock_prefix + answer + template.closing
            ):
                return prompt, answer + self.closing
        return InvalidRow(
            "the chat template changes the answer (it holds a thought or another control sequence"
            " that the template removes)"
        )

    def _check(
        self, template: _TurnTemplate, prefix: list[int], response: list[int]
    ) -> EncodedConversation | InvalidRow:
        """Refuse text that became a control token: it would open or close a turn that is not in the
        data.
        """
        content, end = response[: -len(self.closing_ids)], response[-len(self.closing_ids) :]
        found, inside = (
            list(filter(self._control.__contains__, prefix)),
            self._control.intersection(content),
        )
        if found == template.markers and not inside and end == self.closing_ids and content:
            return EncodedConversation(array("i", prefix + response), len(prefix))
        extra = [token for token in content if token in inside] or _first_difference(
            found, template.markers
        )
        unknown = self._tokenizer.unk_token_id
        if extra == [unknown]:
            return InvalidRow("the text holds a character that the tokenizer has no token for")
        name = self._tokenizer.convert_ids_to_tokens(extra[0]) if extra else self.closing
        return InvalidRow(
            f"the text holds the control token {name!r}, which would become a marker of the chat,"
            " not text"
        )

    def _template(self, conversation: Conversation) -> _TurnTemplate:
        roles = tuple([message["role"] for message in conversation.messages])
        if roles not in self._templates:
            if len(self._templates) == self._cached_templates:
                self._templates.clear()
            self._templates[roles] = self._parse_template(roles)
        return self._templates[roles]

    def _parse_template(self, roles: tuple[str, ...]) -> _TurnTemplate:
        """Render one conversation with these roles and a sentinel as the answer; find what the
        template writes around it.
        """
        messages = [{"role": role, "content": "x"} for role in roles[:-1]] + [
            {"role": roles[-1], "content": _SENTINEL}
        ]
        sequence = ", ".join(roles)
        rendering, prompt = (
            self._render_one(messages),
            self._render_one(messages[:-1], generation=True),
        )
        if isinstance(rendering, InvalidRow) or isinstance(prompt, InvalidRow):
            reason = rendering if isinstance(rendering, InvalidRow) else prompt
            return _TurnTemplate(
                "", "", [], f"the chat template refuses the turns {sequence}: {reason}"
            )
        before, sentinel, closing = rendering.partition(_SENTINEL)
        thought = prompt[len(before) :]
        if not sentinel or _SENTINEL in closing or closing.rstrip() != self.closing:
            problem = f"the chat template hides where the answer ends in the turns {sequence}"
            return _TurnTemplate("", "", [], problem)
        if not prompt.startswith(before) or (thought and not _EMPTY_THOUGHT.fullmatch(thought)):
            problem = (
                f"the chat template's generation prompt after the turns {', '.join(roles[:-1])} "
                "differs from how it "
                f"writes an answer: {prompt!r}"
            )
            return _TurnTemplate("", "", [], problem)
        markers = [token for token in self._tokenize([prompt])[0] if token in self._control]
        return _TurnTemplate(thought, closing, markers)

    def _render(
        self, conversations: list[list[dict[str, str]]], *, generation: bool = False
    ) -> list[str]:
        """Render as the tokenizer's apply_chat_template, without its copies of messages and
        variables, half of the time.
        """
        template = _compile_jinja_template(
            self._tokenizer.get_chat_template()
        )  # cached by the library
        tokens = self._tokenizer.special_tokens_map
        variables = {
            **template.globals,
            **tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation,
        }
        contexts = (
            template.new_context({**variables, "messages": messages}, shared=True)
            for messages in conversations
        )
        return ["".join(template.root_render_func(context)) for context in contexts]

    def _render_one(
        self, messages: list[dict[str, str]], *, generation: bool = False
    ) -> str | InvalidRow:
        try:
            return self._render([messages], generation=generation)[0]
        except Exception as error:  # a template may raise anything that its expressions raise
            return InvalidRow(f"the chat template refuses it: {' '.join(str(error).split())}")

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # The tokenizer's own call also computes offsets and creates a dict for every row, which
        # doubles the time. The tokens are the same.
        backend = self._tokenizer.backend_tokenizer
        if isinstance(backend.model, BPE):
            # It would cache 10,000 words of up to 256 bytes, 60 to 90 MB. To Gemma's tokenizer all
            # text between two control tokens is one word, which does not repeat.
            backend.model._resize_cache(0)
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _first_difference(found: list[int], expected: list[int]) -> list[int]:
    """Return the first token of `found` that differs from `expected`, as a list of one; empty if
    there is none.
    """
    for at, token in enumerate(found):
        if at >= len(expected) or token != expected[at]:
            return [token]
    return []

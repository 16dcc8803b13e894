"""A tokenizer with its chat template, as preparation uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer and its chat template."""

    backend: Tokenizer
    template: str  # "": there is none
    special_tokens: Mapping[str, str]  # that the template may name, as `bos_token`
    class_name: str  # in transformers

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
        """Return what transformers loaded. Raises: ValueError, several templates and no default."""
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        backend: Tokenizer = tokenizer.backend_tokenizer
        return cls(backend, template, tokenizer.special_tokens_map, type(tokenizer).__name__)

    @property
    def unknown_id(self) -> int | None:
        """The token of a character that the vocabulary lacks."""
        return self.id_of("unk")

    @property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokens that are found in a text before it is split."""
        found: Mapping[int, AddedToken] = self.backend.get_added_tokens_decoder()
        return found

    def id_of(self, name: str) -> int | None:
        """Return the id of the special token `name`, as "pad"; None without one."""
        token = self.special_tokens.get(f"{name}_token")
        found: int | None = None if token is None else self.backend.token_to_id(token)
        return found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, control tokens in it included, none added."""
        if isinstance(self.backend.model, BPE):
            # It would cache 10,000 words of up to 256 bytes, 60 to 90 MB. To Gemma's tokenizer all
            # text between two control tokens is one word, which does not repeat.
            self.backend.model._resize_cache(0)
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, control tokens included."""
        text: str = self.backend.decode(tokens, skip_special_tokens=False)
        return text

"""Load the tokenizer of a checkpoint, and check that it belongs to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from canvastune.config.model_sizes import TokenIds, read_sizes, token_ids
from canvastune.errors import UserError, one_line

if TYPE_CHECKING:  # takes seconds to import, and a checkpoint in the released form needs none of it
    from transformers import DiffusionGemmaConfig, PreTrainedTokenizerBase

_HINT = "Use the directory of an unchanged checkpoint."
_PANIC = "PanicException"  # of tokenizers' Rust code, no Exception and of no public module
_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast")  # one class, by its names in version 5 and 4
_TEMPLATE = "chat_template.jinja"
# Other places where transformers finds tokens and chat templates.
_OTHER_FILES = (
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    "additional_chat_templates",
)
_TOKEN_KEY = re.compile(r"_token(_\d+)?$")  # Gemma has numbered ones, which have no effect
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
_SIDES = ("left", "right")
# Keys of tokenizer_config.json that do not change tokens, or what a template sees.
_WITHOUT_EFFECT: dict[str, Callable[[Any], bool]] = {
    "backend": lambda value: value == "tokenizers",
    "clean_up_tokenization_spaces": lambda value: type(value) is bool,
    "is_local": lambda value: type(value) is bool,
    "local_files_only": lambda value: type(value) is bool,
    "model_max_length": lambda value: type(value) in (int, float),
    "padding_side": lambda value: value in _SIDES,
    "processor_class": lambda value: type(value) is str,
    "response_schema": lambda value: isinstance(value, dict),
    "tokenizer_class": lambda value: value in _CLASSES,
    "truncation_side": lambda value: value in _SIDES,
}
# In tokenizer.json: parts of words that are marked, which transformers ignores and a tokenizer may
# refuse to be made with; and merges in their older form, which transformers reads more strictly.
_OTHER_MODEL = re.compile(
    r'"(?:continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"|"merges"\s*:\s*\[\s*"'
)
# What transformers puts into a GemmaTokenizer whatever tokenizer.json says; its post-processor only
# adds special tokens, which a chat template writes itself.
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_PRE_TOKENIZER = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


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


@dataclass(frozen=True)
class ModelTokenizer:
    """A checkpoint's tokenizer, and the sizes of its text configuration."""

    tokenizer: ChatTokenizer
    vocab_size: int  # rows of the embedding table; the tokenizer may name fewer
    canvas_length: int  # tokens of a response block
    positions: int  # tokens of the longest sequence that the model is made for


def load_tokenizer(model: Path) -> ModelTokenizer:
    """Load the tokenizer and the configuration of a checkpoint directory; no weights are read, no
    remote code is run.

    A checkpoint in the form of the released one is read without transformers, whose import takes
    seconds; of any other one, transformers says what it means. Tests hold both to each other.

    Raises:
        UserError: no DiffusionGemma checkpoint, no fast tokenizer, ids beyond the vocabulary,
            special tokens that disagree.
    """
    _refuse_missing(model)
    sizes = read_sizes(model)
    if sizes is None:
        config = _read_config(model)
        text = config.text_config
        ids = token_ids(text.to_dict())
        found = text.vocab_size, config.canvas_length, text.max_position_embeddings
    else:
        ids, found = sizes.token_ids, (sizes.vocabulary, sizes.canvas, sizes.longest)
    tokenizer = None if sizes is None else _read_tokenizer(model)
    if tokenizer is None:
        loaded = _load(model)
        try:
            tokenizer = ChatTokenizer.of(loaded)
        except ValueError as error:
            raise UserError(f"{model}: {one_line(error)}", hint=_HINT) from None
    _check_ids(tokenizer, found[0], ids, model)
    return ModelTokenizer(tokenizer, *found)


def load_transformers_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer as transformers does.

    Raises:
        UserError: as `load_tokenizer`.
    """
    _refuse_missing(model)
    text = _read_config(model).text_config
    tokenizer = _load(model)
    _check_ids(ChatTokenizer.of(tokenizer), text.vocab_size, token_ids(text.to_dict()), model)
    return tokenizer


def _refuse_missing(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise UserError(
            f"{model}: no config.json",
            hint="Use the directory of a checkpoint in the Hub's layout.",
        )


def _read_config(model: Path) -> DiffusionGemmaConfig:
    from transformers import AutoConfig, DiffusionGemmaConfig, DiffusionGemmaTextConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception as error:  # of a value: transformers', huggingface_hub's or Python's own
        raise UserError(
            f"{model / 'config.json'}: cannot be read ({one_line(error)})", hint=_HINT
        ) from None
    if not isinstance(config, DiffusionGemmaConfig) or not isinstance(
        config.text_config, DiffusionGemmaTextConfig
    ):
        raise UserError(
            f"{model / 'config.json'}: model_type is {config.model_type!r}, expected"
            " 'diffusion_gemma'",
            hint=_HINT,
        )
    if not config.canvas_length:
        raise UserError(f"{model / 'config.json'}: canvas_length is missing", hint=_HINT)
    return config


def _load(model: Path) -> PreTrainedTokenizerBase:
    if not (model / "tokenizer.json").is_file():  # the library would make one without a vocabulary
        raise UserError(f"{model}: no tokenizer.json, which a fast tokenizer requires", hint=_HINT)
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, local_files_only=True
        )
    except BaseException as error:  # what the library raises for a file that it cannot parse
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise UserError(
            f"{model}: the tokenizer cannot be loaded ({one_line(error)})",
            hint="Use the directory of an unchanged checkpoint, including tokenizer.json.",
        ) from None
    if not isinstance(getattr(loaded, "backend_tokenizer", None), Tokenizer):
        raise UserError(
            f"{model}: tokenizer_class is {type(loaded).__name__}, expected a fast tokenizer, as"
            f" {_CLASSES[0]}",
            hint=_HINT,
        )
    return loaded


def _read_tokenizer(model: Path) -> ChatTokenizer | None:
    """Read a tokenizer in the form of the released one; None: ask transformers."""
    if any((model / name).exists() for name in _OTHER_FILES):
        return None
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = (model / _TEMPLATE).read_text(encoding="utf-8")
        named = _named_tokens(settings)
        text = (model / "tokenizer.json").read_text(encoding="utf-8")
        if named is None or _OTHER_MODEL.search(text):
            return None
        backend = Tokenizer.from_str(text)
    except Exception:  # tokenizers raises nothing more special; transformers says what is wrong
        return None
    if backend.truncation or backend.padding or not _is_gemma(backend, named["unk_token"]):
        return None
    special = {
        token.content for token in backend.get_added_tokens_decoder().values() if token.special
    }
    # transformers adds those that are missing.
    if not special.issuperset([*named.values(), *settings.get("extra_special_tokens", ())]):
        return None
    return ChatTokenizer(backend, template, named, _CLASSES[0])


def _named_tokens(settings: Any) -> dict[str, str] | None:
    """Return the special tokens of a tokenizer_config.json by their names; None: it has a setting
    whose meaning only transformers knows.
    """
    if not isinstance(settings, dict) or "tokenizer_class" not in settings:
        return None
    given = dict(settings)
    extra = given.pop("extra_special_tokens", [])
    specific = given.pop("model_specific_special_tokens", {})
    tokens = {key: value for key, value in given.items() if _TOKEN_KEY.search(key)}
    in_template = {key for key in tokens if key.endswith("_token")}
    if (
        not isinstance(extra, list)
        or not isinstance(specific, dict)
        or not tokens.keys() >= set(_NAMED)
        # In one of the two places: of what is in both, transformers has separate rules.
        or (specific and in_template != set(_NAMED))
        or not all(key.endswith("_token") and key not in _NAMED for key in specific)
        or not all(
            type(each) is str and each for each in [*extra, *specific.values(), *tokens.values()]
        )
        or not all(
            key in tokens or (key in _WITHOUT_EFFECT and _WITHOUT_EFFECT[key](value))
            for key, value in given.items()
        )
    ):
        return None
    return {key: value for key, value in (tokens | specific).items() if key.endswith("_token")}


def _is_gemma(backend: Tokenizer, unknown: str) -> bool:
    """Return whether a tokenizer.json holds what transformers makes of it."""
    model = backend.model
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return (
        isinstance(model, BPE)
        and (model.unk_token, model.fuse_unk, model.byte_fallback) == (unknown, True, True)
        and not (model.dropout or model.ignore_merges)
        and [part and json.loads(part.__getstate__()) for part in parts]
        == [_NORMALIZER, _PRE_TOKENIZER, _DECODER]
    )


def _check_ids(
    tokenizer: ChatTokenizer,
    vocab_size: int,
    ids: TokenIds,
    model: Path,
) -> None:
    """Refuse a tokenizer of another model.

    Args:
        ids: what the model's configuration says of the tokens "pad", "bos" and "eos".

    Raises:
        UserError: a token id beyond the model's vocabulary, or a pad, bos or eos id that differs
            from the configuration's.
    """
    highest = max(tokenizer.backend.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"{model}: the tokenizer does not belong to the model: its highest token id is "
            f"{highest}, "
            f"text_config.vocab_size of config.json is {vocab_size}",
            hint=_HINT,
        )
    for name, expected in ids.items():
        found = tokenizer.id_of(name)
        if found not in (expected if isinstance(expected, list) else [expected]):
            raise UserError(
                f"{model}: the tokenizer does not belong to the model: its {name} token is "
                f"{tokenizer.special_tokens.get(f'{name}_token')!r} "
                f"with id {found}, text_config.{name}_token_id of config.json is {expected}",
                hint=_HINT,
            )


def check_end_of_turn(model: Path, closing: str, closing_ids: list[int]) -> None:
    """Refuse a chat template whose end of turn does not end generation, if the checkpoint names the
    tokens that do.

    Args:
        closing: the text that closes a turn, `<turn|>` in Gemma's template.
        closing_ids: its tokens.

    Raises:
        UserError: generation_config.json does not stop there, so a tuned answer would not end where
            it was trained to.
    """
    file = model / "generation_config.json"
    stops = _stop_tokens(file)
    if stops and closing_ids[-1] not in stops:
        raise UserError(
            f"{file}: eos_token_id is {stops}, but the chat template closes a turn with {closing!r} "
            f"(id {closing_ids[-1]}): "
            "generation would not stop there; tokenizer and model do not belong together",
            hint=_HINT,
        )


def check_end_of_call(model: Path, tokenizer: ChatTokenizer, closing_id: int | None) -> list[str]:
    """Return a remark if the checkpoint's own generation would not stop after a tool call.

    Args:
        closing_id: the token that ends a turn with a call.
    """
    file = model / "generation_config.json"
    stops = _stop_tokens(file)
    if closing_id is None or not stops or closing_id in stops:
        return []
    token = tokenizer.backend.id_to_token(closing_id)
    return [
        f"a tool call ends with {token} (id {closing_id}), which eos_token_id of {file} lacks:"
        " a server that reads only this file does not stop there"
    ]


def _stop_tokens(file: Path) -> list[int]:
    """Return eos_token_id of generation_config.json; empty if there is none.

    Raises:
        UserError: the file cannot be read.
    """
    if not file.is_file():
        return []
    try:
        stop = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})", hint=_HINT) from None
    if stop is None:
        return []
    return stop if isinstance(stop, list) else [stop]

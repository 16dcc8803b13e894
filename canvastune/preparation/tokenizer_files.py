"""Read a tokenizer from the files of a checkpoint, without transformers.

Only what needs no judgment is read here: files in the form of the released checkpoint's. Of any
other ones, transformers says what they mean or why they are refused; tests hold both readings to
each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from canvastune.preparation.chat_tokenizer import ChatTokenizer

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


def read_tokenizer(model: Path) -> ChatTokenizer | None:
    """Return the tokenizer of a checkpoint's folder; None: ask transformers."""
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

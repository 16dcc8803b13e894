"""Load the tokenizer of a checkpoint, and check that it belongs to the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from canvastune.config.model_sizes import TokenIds, read_sizes, token_ids
from canvastune.errors import UserError, one_line
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.tokenizer_files import read_tokenizer

if TYPE_CHECKING:  # takes seconds to import
    from transformers import DiffusionGemmaConfig, PreTrainedTokenizerBase

_HINT = "Use the directory of an unchanged checkpoint."
_PANIC = "PanicException"  # of tokenizers' Rust code, no Exception and of no public module


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
    seconds.

    Raises:
        UserError: no DiffusionGemma checkpoint, no fast tokenizer, ids beyond the vocabulary,
            special tokens that disagree.
    """
    _refuse_missing(model)
    sizes = read_sizes(model)
    if sizes is not None:
        found, ids = (sizes.vocabulary, sizes.canvas, sizes.longest), sizes.token_ids
        tokenizer = read_tokenizer(model) or _chat_tokenizer(_load(model), model)
    else:
        config = _read_config(model)
        text = config.text_config
        found = (text.vocab_size, config.canvas_length, text.max_position_embeddings)
        ids = token_ids(text.to_dict())
        tokenizer = _chat_tokenizer(_load(model), model)
    _check_ids(tokenizer, found[0], ids, model)
    return ModelTokenizer(tokenizer, *found)


def load_transformers_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer as transformers does.

    Raises:
        UserError: as `load_tokenizer`.
    """
    _refuse_missing(model)
    text = _read_config(model).text_config
    loaded = _load(model)
    ids = token_ids(text.to_dict())
    _check_ids(_chat_tokenizer(loaded, model), text.vocab_size, ids, model)
    return loaded


def _chat_tokenizer(loaded: PreTrainedTokenizerBase, model: Path) -> ChatTokenizer:
    try:
        return ChatTokenizer.of(loaded)
    except ValueError as error:  # several templates, and none is the default
        raise UserError(f"{model}: {one_line(error)}", hint=_HINT) from None


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
            " GemmaTokenizer",
            hint=_HINT,
        )
    return loaded


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

"""Load the tokenizer of a checkpoint, and check that it belongs to the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoTokenizer,
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
    PreTrainedTokenizerBase,
)

from canvastune.errors import UserError, one_line

_HINT = "Use the directory of an unchanged checkpoint."


@dataclass(frozen=True)
class ModelTokenizer:
    """A checkpoint's tokenizer, and the sizes of its text configuration."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # rows of the embedding table; the tokenizer may name fewer
    canvas_length: int  # tokens of a response block
    positions: int  # tokens of the longest sequence that the model is made for


def load_tokenizer(model: Path) -> ModelTokenizer:
    """Load the tokenizer and the configuration of a checkpoint directory; no weights are read, no
    remote code is run.

    Raises:
        UserError: no DiffusionGemma checkpoint, no fast tokenizer, ids beyond the vocabulary,
            special tokens that disagree.
    """
    if not (model / "config.json").is_file():
        raise UserError(
            f"{model}: no config.json",
            hint="Use the directory of a checkpoint in the Hub's layout.",
        )
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    if not (model / "tokenizer.json").is_file():  # the library would make one without a vocabulary
        raise UserError(f"{model}: no tokenizer.json, which a fast tokenizer requires", hint=_HINT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # what the library raises for a file that it cannot parse
        raise UserError(
            f"{model}: the tokenizer cannot be loaded ({one_line(error)})",
            hint="Use the directory of an unchanged checkpoint, including tokenizer.json.",
        ) from None
    _check_ids(tokenizer, config.text_config, model)
    text = config.text_config
    return ModelTokenizer(
        tokenizer, text.vocab_size, config.canvas_length, text.max_position_embeddings
    )


def _check_ids(
    tokenizer: PreTrainedTokenizerBase, text: DiffusionGemmaTextConfig, model: Path
) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        UserError: a token id beyond the model's vocabulary, or a pad, bos or eos id that differs
            from the configuration's.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= text.vocab_size:
        raise UserError(
            f"{model}: the tokenizer does not belong to the model: its highest token id is "
            f"{highest}, "
            f"text_config.vocab_size of config.json is {text.vocab_size}",
            hint=_HINT,
        )
    for name in ("pad", "bos", "eos"):
        expected = getattr(text, f"{name}_token_id")
        found = getattr(tokenizer, f"{name}_token_id")
        if expected is None:
            continue
        allowed = expected if isinstance(expected, list) else [expected]
        if found not in allowed:
            raise UserError(
                f"{model}: the tokenizer does not belong to the model: its {name} token is "
                f"{getattr(tokenizer, f'{name}_token')!r} "
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


def check_end_of_call(
    model: Path, tokenizer: PreTrainedTokenizerBase, closing_id: int | None
) -> list[str]:
    """Return a remark if the checkpoint's own generation would not stop after a tool call.

    Args:
        closing_id: the token that ends a turn with a call.
    """
    file = model / "generation_config.json"
    stops = _stop_tokens(file)
    if closing_id is None or not stops or closing_id in stops:
        return []
    token = tokenizer.convert_ids_to_tokens(closing_id)
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

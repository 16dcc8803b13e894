"""The tokenizer of a checkpoint, and the proof that it belongs to the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, DiffusionGemmaConfig, DiffusionGemmaTextConfig, PreTrainedTokenizerBase

from canvastune.errors import UserError

_REMEDY = "Give the folder of an unchanged checkpoint"


@dataclass(frozen=True)
class ModelTokenizer:
    """A checkpoint's tokenizer, and what its configuration says of text."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # rows of the embedding table; the tokenizer may name fewer
    canvas_length: int  # tokens of a response block


def load_tokenizer(model: Path) -> ModelTokenizer:
    """Load the tokenizer and the configuration of a checkpoint folder; no weights are read and no code of its own is run.

    Raises:
        UserError: no DiffusionGemma checkpoint, no fast tokenizer, ids beyond the vocabulary, special tokens that disagree.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no config.json. Give the folder of a checkpoint in the Hub's layout")
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model / 'config.json'}: cannot be read ({_one_line(error)}). {_REMEDY}") from None
    if not isinstance(config, DiffusionGemmaConfig) or not isinstance(config.text_config, DiffusionGemmaTextConfig):
        raise UserError(f"{model / 'config.json'}: model_type is {config.model_type!r}, expected 'diffusion_gemma'. {_REMEDY}")
    if not config.canvas_length:
        raise UserError(f"{model / 'config.json'}: canvas_length is missing. {_REMEDY}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot parse
        raise UserError(f"{model}: the tokenizer cannot be loaded ({_one_line(error)}). {_REMEDY}, tokenizer.json included") from None
    if not tokenizer.is_fast:
        raise UserError(f"{model}: the tokenizer has no tokenizer.json, which maps tokens to text. {_REMEDY}")
    _check_ids(tokenizer, config.text_config, model)
    return ModelTokenizer(tokenizer, config.text_config.vocab_size, config.canvas_length)


def _check_ids(tokenizer: PreTrainedTokenizerBase, text: DiffusionGemmaTextConfig, model: Path) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        UserError: a token id beyond the model's vocabulary, or a pad, bos or eos id that differs from the configuration's.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= text.vocab_size:
        raise UserError(
            f"{model}: the tokenizer does not belong to the model: its highest token id is {highest}, "
            f"config.json says text_config.vocab_size {text.vocab_size}. {_REMEDY}"
        )
    for name in ("pad", "bos", "eos"):
        expected = getattr(text, f"{name}_token_id")
        found = getattr(tokenizer, f"{name}_token_id")
        if expected is None:
            continue
        allowed = expected if isinstance(expected, list) else [expected]
        if found not in allowed:
            raise UserError(
                f"{model}: the tokenizer does not belong to the model: its {name} token is {getattr(tokenizer, f'{name}_token')!r} "
                f"with id {found}, config.json says text_config.{name}_token_id {expected}. {_REMEDY}"
            )


def check_end_of_turn(model: Path, closing: str, closing_ids: list[int]) -> None:
    """Refuse a chat template whose end of turn is not among the tokens that end generation, if the checkpoint names those.

    Args:
        closing: the text that closes a turn, `<turn|>` in Gemma's template.
        closing_ids: its tokens.

    Raises:
        UserError: generation_config.json does not stop there, so a tuned answer would not end where it was taught to.
    """
    file = model / "generation_config.json"
    if not file.is_file():
        return
    try:
        stop = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({_one_line(error)}). {_REMEDY}") from None
    stops = stop if isinstance(stop, list) else [stop]
    if stop is not None and closing_ids[-1] not in stops:
        raise UserError(
            f"{file}: eos_token_id is {stop}, but the chat template closes a turn with {closing!r} (id {closing_ids[-1]}): "
            f"generation would not stop there. Tokenizer and model do not belong together. {_REMEDY}"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

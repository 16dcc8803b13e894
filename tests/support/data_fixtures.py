"""A small Gemma tokenizer, two chat templates and a model folder, for tests of the preparation."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
)

from canvastune.config import RunConfig
from canvastune.preparation.chat_template import ChatEncoder
from canvastune.preparation.chat_tokenizer import ChatTokenizer

# A turn is <|turn>role\n{content}<turn|>\n, contents without outer blanks, as in Gemma 4.
PLAIN = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
    "{{- message['content'] | trim -}}"
    "{{- '<turn|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}"
)
# Gemma 4's larger models: thoughts are taken out of written turns, and an empty one opens the
# answer that is asked for.
THOUGHT = (
    "{%- macro spoken(text) -%}"
    "{%- for part in text.split('<channel|>') -%}{{- part.split('<|channel>')[0] -}}{%- endfor -%}"
    "{%- endmacro -%}"
    + PLAIN.replace("message['content'] | trim", "(spoken(message['content']) | trim)")
).replace("{{- '<|turn>model\\n' -}}", "{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}")

SPECIAL = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|image|>"]
# What the released template writes in addition: thinking, declarations, calls, responses, quotes.
TOOL_SPECIAL = [
    *SPECIAL,
    "<|think|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
]
WORDS = ["user", "model", "system", "thought", "the", "and", "####"]


def make_tokenizer(
    template: str = PLAIN, *, words: list[str] = WORDS, special: list[str] = SPECIAL
) -> GemmaTokenizer:
    """Byte-level fall-back BPE with Gemma's special tokens, printable ASCII, and a few words that
    are one token each.
    """
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\n",
        "▁",
    ]
    pieces += [chr(code) for code in range(33, 127)]
    merges: Any = []  # pairs: a piece that holds a blank could not be written as one text
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = GemmaTokenizer(
        vocab={piece: at for at, piece in enumerate(pieces)},
        merges=merges,
        extra_special_tokens=special,
    )
    tokenizer.chat_template = template
    return tokenizer


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of a tokenizer that transformers made."""
    return ChatEncoder(ChatTokenizer.of(tokenizer), "model")


def released_template(training: bool = False) -> str:
    """The chat template released with the model, as TRL ships it; `training` has generation marks."""
    name = "diffusion_gemma_training.jinja" if training else "diffusion_gemma.jinja"
    return (files("trl") / "chat_templates" / name).read_text(encoding="utf-8")


def make_model(
    folder: Path, template: str = PLAIN, special: list[str] = SPECIAL, **text: Any
) -> Path:
    """Write a model folder without weights: config.json, generation_config.json and the tokenizer.
    `text` changes the text config.
    """
    tokenizer = make_tokenizer(template, special=special)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 4,
        "top_k_experts": 2,
    }
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**(settings | text)), canvas_length=16
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<turn|>")
    (folder / "generation_config.json").write_text(
        json.dumps({"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [1, end]})
    )
    return folder


def run_config(source: Path | str, **data: Any) -> RunConfig:
    """A recipe that prepares `source`; `data` changes keys of its data section."""
    section = {"source": str(source), "validation_fraction": 0.2, "seq_length": 256} | data
    return RunConfig.model_validate({"name": "test", "data": section})


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines; a row that is a str is written as it stands."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def problems(count: int) -> list[dict[str, str]]:
    """GSM8K-form rows, all different."""
    return [
        {
            "question": f"Ann has {n} apples and eats {n % 7}. How many?",
            "answer": f"{n}-{n % 7}={n - n % 7}\n#### {n - n % 7}",
        }
        for n in range(count)
    ]

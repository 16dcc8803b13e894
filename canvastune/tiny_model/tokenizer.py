"""The tokenizer of a tiny model: transformers' own Gemma tokenizer with few words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.tiny_model.word_problems import NAMES, THINGS

if TYPE_CHECKING:
    from transformers import GemmaTokenizer

# Gemma 4's own ids; the other rows of its vocabulary are replaced by the characters and words
# below.
_GEMMA_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "\n": 107,
}
IMAGE_TOKENS = ("<|image>", "<|image|>", "<image|>")
# The model has no audio, but stock transformers' processor takes no text from a tokenizer without.
_AUDIO_TOKENS = ("<|audio>", "<|audio|>", "<audio|>")
VOCABULARY = 768  # tokens; a multiple of 8, so that the embedding shards evenly over 8 ranks
_PROSE_VOCABULARY = 1536

_WORDS = (
    *(
        "has",
        "buys",
        "finds",
        "gets",
        "gives",
        "loses",
        "sells",
        "away",
        "more",
        "fewer",
        "than",
        "does",
        "have",
        "now",
        "left",
    ),
    *("How", "many", "and", "the", "a", "of", "is", "in", "to", "are", "They", "together"),
)
# Tokens that may occur without a leading space.
_OPENERS = ("user", "model", "system", "thought", *NAMES)

# Words of tool declarations, calls and responses; their merges are last, so that they change no
# other text.
_TOOL_WORDS = (
    *("declaration", "description", "parameters", "properties", "required", "type"),
    *("OBJECT", "STRING", "response", "value", "call", "count"),
)
_TOOL_TOKENS = (
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)

# Like the released template: roles on a separate line, the assistant is `model`, surrounding
# whitespace is dropped, tools are declared in the system turn, thinking is a channel before the
# answer, calls and their responses are in the model's turn.
_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def make_tokenizer() -> GemmaTokenizer:
    """Build transformers' own Gemma tokenizer.

    Words of the problems whole, digits single, any other text by character or byte.
    """
    merges: list[tuple[str, str]] = []
    pieces: list[str] = [chr(code) for code in range(33, 127)] + ["▁"]
    # A word grows letter by letter from its leading space, so no merge can start inside a word.
    # Openers are last: `▁Tom` wins over `Tom`.
    for word in [*(f"▁{word}" for word in (*_WORDS, *NAMES, *THINGS)), *_OPENERS]:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    pieces += ["##", "####"]
    merges += [("#", "#"), ("##", "##")]
    tool_merges: list[tuple[str, str]] = []
    tool_pieces: list[str] = []
    for word in _TOOL_WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces and word[:end] not in tool_pieces:
                tool_pieces.append(word[:end])
                tool_merges.append((word[: end - 1], word[end - 1]))
    return _build_tokenizer(pieces, tool_pieces, merges + tool_merges, VOCABULARY)


def learn_tokenizer(text: Iterable[str]) -> GemmaTokenizer:
    """Build transformers' own Gemma tokenizer: frequent words of a text whole, digits single."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    # No merge may start inside a word, as the tokenizer itself splits nothing.
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    characters = [chr(code) for code in range(33, 127)] + ["▁"]
    room = _PROSE_VOCABULARY - len(_GEMMA_IDS) - 256 - len(IMAGE_TOKENS) - len(_TOOL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    learned.train_from_iterator([*text, *_OPENERS, *_TOOL_WORDS], trainer)
    tree = json.loads(learned.to_str())["model"]
    pieces = sorted(tree["vocab"], key=tree["vocab"].__getitem__)
    merges = [(left, right) for left, right in tree["merges"]]
    return _build_tokenizer(pieces, [], merges, _PROSE_VOCABULARY)


def _build_tokenizer(
    pieces: list[str], tool_pieces: list[str], merges: list[tuple[str, str]], size: int
) -> GemmaTokenizer:
    """Build the tokenizer of `size` tokens: the pieces of words, bytes, and control tokens."""
    from transformers import GemmaTokenizer

    tokens = [*IMAGE_TOKENS, *pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*tool_pieces, *_TOOL_TOKENS]
    unused = size - len(_GEMMA_IDS) - len(tokens) - len(_AUDIO_TOKENS)
    tokens += [f"<unused{index}>" for index in range(unused)]
    tokens += _AUDIO_TOKENS
    free = [index for index in range(size) if index not in _GEMMA_IDS.values()]
    vocabulary = _GEMMA_IDS | dict(zip(tokens, free, strict=True))
    tokenizer = GemmaTokenizer(
        vocab=dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        merges=merges,
        model_max_length=4096,
        extra_special_tokens={
            "sot_token": "<|turn>",
            "eot_token": "<turn|>",
            "soc_token": "<|channel>",
            "eoc_token": "<channel|>",
            "think_token": "<|think|>",
            "boi_token": IMAGE_TOKENS[0],
            "image_token": IMAGE_TOKENS[1],
            "eoi_token": IMAGE_TOKENS[2],
            "boa_token": _AUDIO_TOKENS[0],
            "audio_token": _AUDIO_TOKENS[1],
            "eoa_token": _AUDIO_TOKENS[2],
            **{f"tool_token_{at}": token for at, token in enumerate(_TOOL_TOKENS)},
        },
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer

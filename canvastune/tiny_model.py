"""Create a random DiffusionGemma small enough for a laptop, and word problems to train it on."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory

if TYPE_CHECKING:  # word problems are written without them
    from transformers import DiffusionGemmaForBlockDiffusion, GemmaTokenizer
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
    )

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
_IMAGE_TOKENS = ("<|image>", "<|image|>", "<image|>")
# The model has no audio, but stock transformers' processor takes no text from a tokenizer without.
_AUDIO_TOKENS = ("<|audio>", "<|audio|>", "<audio|>")
# What a processor of text and images reads; vLLM builds one even for text only.
_PROCESSOR_FILE = "processor_config.json"
_IMAGE_LENGTH = 70  # tokens of an image: the smallest number that the processor takes
_VOCABULARY = 768  # tokens; a multiple of 8, so that the embedding shards evenly over 8 ranks
_PROSE_VOCABULARY = 1536
# Tokens: rows of prose, and their answers, are longer than those of word problems.
_PROSE_WINDOW, _PROSE_ANSWER = 96, 64

_NAMES = ("Tom", "Ana", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida", "Kim", "Joe")
_THINGS = (
    "apples",
    "books",
    "coins",
    "pens",
    "cards",
    "eggs",
    "stamps",
    "shells",
    "cups",
    "balls",
    "nuts",
    "keys",
)
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
_OPENERS = (
    "user",
    "model",
    "system",
    "thought",
    *_NAMES,
)  # tokens that may occur without a leading space

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
_CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- elif part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro value(item) -%}
    {%- if item is none -%}
        null
    {%- elif item is string -%}
        {{- '<|"|>' + item + '<|"|>' -}}
    {%- elif item is boolean -%}
        {{- item | string | lower -}}
    {%- elif item is mapping -%}
        {{- '{' -}}
        {%- for key, inner in item | dictsort -%}
            {{- ',' if not loop.first -}}{{- key -}}:{{- value(inner) -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif item is sequence -%}
        {{- '[' -}}
        {%- for inner in item -%}{{- ',' if not loop.first -}}{{- value(inner) -}}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}
        {{- item -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro schema(item) -%}
    {{- '{' -}}
    {%- for key, inner in item | dictsort if key != 'type' -%}
        {{- key -}}:
        {%- if key == 'properties' -%}
            {{- '{' -}}
            {%- for name, property in inner | dictsort -%}
                {{- ',' if not loop.first -}}{{- name -}}:{{- schema(property) -}}
            {%- endfor -%}
            {{- '}' -}}
        {%- else -%}
            {{- value(inner) -}}
        {%- endif -%}
        {{- ',' -}}
    {%- endfor -%}
    {{- 'type:<|"|>' + item['type'] | upper + '<|"|>}' -}}
{%- endmacro -%}
{%- macro declaration(tool) -%}
    {%- set function = tool['function'] -%}
    {{- '<|tool>declaration:' + function['name'] + '{description:' -}}
    {{- value(function['description'] | default('')) -}}
    {%- if function['parameters'] -%}
        {{- ',parameters:' -}}{{- schema(function['parameters']) -}}
    {%- endif -%}
    {{- '}<tool|>' -}}
{%- endmacro -%}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{#- Rows without tools and thinking, the most, are rendered with no more work than they need: in the
    `else` of a loop over the messages that are not plain. -#}
{%- for any in (messages[:1] if tools or thinks else messages) if tools or thinks or any | length > 2 -%}
{%- if loop.first -%}
{%- set state = namespace(open=false, calls=[]) -%}
{{- bos_token -}}
{%- set system = messages[0]['role'] == 'system' -%}
{%- if system or tools or thinks -%}
    {{- '<|turn>system\\n' -}}
    {{- '<|think|>\\n' if thinks -}}
    {{- text(messages[0]['content']) if system -}}
    {%- for tool in tools or [] -%}
        {{- declaration(tool) -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages[1 if system else 0:] -%}
    {%- set role = message['role'] -%}
    {%- set content = message['content'] -%}
    {%- if role == 'tool' -%}
        {%- for call in state.calls if call['id'] == message['tool_call_id'] -%}
            {{- '<|tool_response>response:' + call['function']['name'] + '{value:' -}}
        {%- endfor -%}
        {{- '<|"|>' + content + '<|"|>' if content is string else value(content) -}}
        {{- '}<tool_response|>' -}}
    {%- else -%}
        {%- if role != 'assistant' -%}
            {{- '<|turn>' + role + '\\n' -}}
        {%- elif not state.open -%}
            {{- '<|turn>model\\n' -}}
        {%- endif -%}
        {%- if 'reasoning' in message and message['reasoning'] -%}
            {%- set rest = messages[loop.index0 + (1 if system else 0):] -%}
            {%- if 'user' not in rest | map(attribute='role') | list -%}
                {{- '<|channel>thought\\n' + message['reasoning'] | trim + '\\n<channel|>' -}}
            {%- endif -%}
        {%- endif -%}
        {%- if 'tool_calls' in message and message['tool_calls'] -%}
            {%- for call in message['tool_calls'] -%}
                {{- '<|tool_call>call:' + call['function']['name'] -}}
                {{- value(call['function']['arguments']) + '<tool_call|>' -}}
            {%- endfor -%}
            {{- content | trim if content is string else text(content) -}}
            {%- set state.open = true -%}
            {%- set state.calls = message['tool_calls'] -%}
            {%- if loop.last or loop.nextitem['role'] != 'tool' -%}
                {{- '<|tool_response>' -}}
            {%- endif -%}
        {%- else -%}
            {{- content | trim if content is string else text(content) -}}
            {%- set state.open = false -%}
            {{- '<turn|>\\n' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if not state.open -%}
        {{- '<|turn>model\\n' -}}
    {%- elif thinks and messages[-1]['role'] == 'tool' -%}
        {{- '<|channel>thought\\n' -}}
    {%- endif -%}
{%- endif -%}
{%- endif -%}
{%- else -%}
    {{- bos_token -}}
    {%- for message in messages -%}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
        {{- '<|turn>' + role + '\\n' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] | trim -}}
        {%- else -%}
            {{- text(message['content']) -}}
        {%- endif -%}
        {{- '<turn|>\\n' -}}
    {%- endfor -%}
    {{- '<|turn>model\\n' if add_generation_prompt -}}
{%- endfor -%}
"""


def make_tiny_model(folder: Path, seed: int = 0, text: Iterable[str] | None = None) -> None:
    """Write a DiffusionGemma checkpoint in the Hub's layout.

    The 26B model's architecture, 1.6 M random float32 weights.

    The same seed gives the same weights. Only the Hub's files are written, and none on failure.

    Args:
        text: what the tokenizer learns its words from, for longer rows than the word problems;
            None: it knows the words of the problems.

    Raises:
        UserError: `folder` exists and is not empty.
    """
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    tokenizer = _make_tokenizer() if text is None else _learn_tokenizer(text)
    tree = _config_tree(tokenizer)
    if text is not None:
        tree["text_config"]["sliding_window"] = _PROSE_WINDOW
    config = DiffusionGemmaConfig(**tree)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(config).float()
    _condition_attention(model)
    model.generation_config = _generation_config(tokenizer)
    if text is not None:
        model.generation_config.max_new_tokens = _PROSE_ANSWER
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial, max_shard_size="2MB")
        tokenizer.save_pretrained(partial)
        (partial / _PROCESSOR_FILE).write_text(
            json.dumps(_processor_tree(), indent=2) + "\n", encoding="utf-8"
        )
        # save_pretrained rewrites the keys of the full-attention layers in a form that other tools
        # cannot read
        about = {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "dtype": "float32",
            "model_type": "diffusion_gemma",
        }
        (partial / "config.json").write_text(
            json.dumps(about | tree, indent=2) + "\n", encoding="utf-8"
        )


def _config_tree(tokenizer: GemmaTokenizer) -> dict[str, Any]:
    """Return `config.json` as in the Hub's checkpoint.

    Every dimension of a matrix is a multiple of 8.
    """
    boi, image, eoi = tokenizer.convert_tokens_to_ids(list(_IMAGE_TOKENS))
    return {
        "canvas_length": 16,
        "boi_token_id": boi,
        "eoi_token_id": eoi,
        "image_token_id": image,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "sliding_window": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_global_key_value_heads": 1,
            "global_head_dim": 64,
            "attention_k_eq_v": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "max_position_embeddings": 4096,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": "vision",
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1_000_000.0,
                },
            },
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "max_position_embeddings": 256,
            "standardize": True,
        },
    }


def _processor_tree() -> dict[str, Any]:
    """Return `processor_config.json` for the vision tower of `_config_tree`.

    The model has no audio, but stock transformers builds the processor only with a feature
    extractor.
    """
    patches = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": _IMAGE_LENGTH}
    return {
        "processor_class": "Gemma4Processor",
        "image_seq_length": _IMAGE_LENGTH,
        "image_processor": {"image_processor_type": "Gemma4ImageProcessor", **patches},
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor", **patches},
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    }


def _generation_config(tokenizer: GemmaTokenizer) -> DiffusionGemmaGenerationConfig:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    return DiffusionGemmaGenerationConfig(
        max_new_tokens=32,
        max_denoising_steps=16,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.2,  # below the released model's 0.4 to 0.8: arithmetic has one right answer
        t_max=0.4,
        stability_threshold=1,
        confidence_threshold=0.005,
        bos_token_id=2,
        eos_token_id=[1, *tokenizer.convert_tokens_to_ids(["<turn|>", "<|tool_response>"])],
        pad_token_id=0,
    )


def _condition_attention(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Put 1/sqrt(head_dim), which attention does not apply, into `q_norm`.

    Without it float32 noise reaches 3e-3.
    """
    for layer in model.model.decoder.layers:  # tied: the encoder's norms are the same tensors
        norm = layer.self_attn.q_norm.weight.data
        norm.fill_(norm.numel() ** -0.5)


def _make_tokenizer() -> GemmaTokenizer:
    """Build transformers' own Gemma tokenizer.

    Words of the problems whole, digits single, any other text by character or byte.
    """
    merges: list[tuple[str, str]] = []
    pieces: list[str] = [chr(code) for code in range(33, 127)] + ["▁"]
    # A word grows letter by letter from its leading space, so no merge can start inside a word.
    # Openers are last: `▁Tom` wins over `Tom`.
    for word in [*(f"▁{word}" for word in (*_WORDS, *_NAMES, *_THINGS)), *_OPENERS]:
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
    return _build_tokenizer(pieces, tool_pieces, merges + tool_merges, _VOCABULARY)


def _learn_tokenizer(text: Iterable[str]) -> GemmaTokenizer:
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
    room = _PROSE_VOCABULARY - len(_GEMMA_IDS) - 256 - len(_IMAGE_TOKENS) - len(_TOOL_TOKENS)
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

    tokens = [*_IMAGE_TOKENS, *pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
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
            "boi_token": _IMAGE_TOKENS[0],
            "image_token": _IMAGE_TOKENS[1],
            "eoi_token": _IMAGE_TOKENS[2],
            "boa_token": _AUDIO_TOKENS[0],
            "audio_token": _AUDIO_TOKENS[1],
            "eoa_token": _AUDIO_TOKENS[2],
            **{f"tool_token_{at}": token for at, token in enumerate(_TOOL_TOKENS)},
        },
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _change(rng: random.Random) -> tuple[str, str]:
    """Write a problem in which someone gets or loses some.

    Numbers appear in the order of their use.
    """
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    if rng.random() < 0.5:
        first, second = rng.randint(1, 9), rng.randint(1, 9)
        verb, sign, result, end = rng.choice(("buys", "finds", "gets")), "+", first + second, "now"
        how = f"{verb} {second} more"
    else:
        first = rng.randint(2, 9)
        second = rng.randint(1, first - 1)
        verb, sign, result, end = (
            rng.choice(("gives", "sells", "loses")),
            "-",
            first - second,
            "left",
        )
        how = f"{verb} {second}"
    question = f"{name} has {first} {thing}. {name} {how}. How many {thing} does {name} have {end}?"
    return question, f"{first}{sign}{second}={result}\n#### {result}"


def _compare(rng: random.Random) -> tuple[str, str]:
    """Write a problem that compares two people, the smaller number first.

    The answer subtracts it from the second.
    """
    (one, other), thing = rng.sample(_NAMES, 2), rng.choice(_THINGS)
    small, large = sorted(rng.sample(range(1, 10), 2))
    asked = (
        f"more {thing} does {other} have than {one}"
        if rng.random() < 0.5
        else f"fewer {thing} does {one} have than {other}"
    )
    question = f"{one} has {small} {thing}. {other} has {large} {thing}. How many {asked}?"
    return question, f"{large}-{small}={large - small}\n#### {large - small}"


_COUNT_TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "How many",
        "parameters": {
            "type": "object",
            "properties": {"who": {"type": "string"}},
            "required": ["who"],
        },
    },
}


def _ask(rng: random.Random) -> dict[str, Any]:
    """Write a conversation in which a tool knows how many, and the answer repeats it."""
    name, thing, number = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 9)
    asked = rng.choice(
        (
            f"How many {thing} does {name} have?",
            f"How many {thing} does {name} have now?",
            f"{name} has {thing}. How many?",
            f"{name} has {thing}. How many {thing} does {name} have?",
        )
    )
    call = {"name": "count", "arguments": {"who": name}}
    return {
        "tools": [_COUNT_TOOL],
        "messages": [
            {"role": "user", "content": asked},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": str(number)},
            {"role": "assistant", "content": f"{name} has {number} {thing}.\n#### {number}"},
        ],
    }


def _pair(write: Callable[[random.Random], tuple[str, str]]) -> Callable[..., dict[str, Any]]:
    return lambda rng: dict(zip(("question", "answer"), write(rng), strict=True))


KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "change": _pair(_change),
    "compare": _pair(_compare),
    "tools": _ask,
}


def write_problems(path: Path, kind: str, rows: int, seed: int) -> None:
    """Write `rows` different word problems of one kind as JSON lines.

    Kinds: `change` (someone gets or loses some; what the tiny base learns) and `compare` (who has
    how many more than whom; what `make run` adapts it to), {"question", "answer"} as GSM8K; `tools`
    (a tool is asked how many), {"tools", "messages"}. The same arguments give the same bytes.

    Raises:
        UserError: an unknown kind, or more rows than it has different problems.
    """
    if kind not in KINDS:
        raise UserError(
            f"kind of word problems: found {kind!r}, expected one of {', '.join(KINDS)}",
            hint="Choose one of them.",
        )
    rng = random.Random(f"{kind}-{seed}")
    problems: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(problems) < rows:
        row = KINDS[kind](rng)
        asked = row["question"] if "question" in row else row["messages"][0]["content"]
        misses = misses + 1 if asked in problems else 0
        if misses > 1000:
            raise UserError(
                f"word problems of kind {kind!r}: found about {len(problems)} different ones, "
                f"expected {rows}",
                hint="Request fewer rows.",
            )
        problems[asked] = row
    write_rows(path, problems.values())


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines: all of them, or no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row) + "\n")
        partial.rename(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()

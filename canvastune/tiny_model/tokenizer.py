"""The tokenizer of a tiny model: transformers' own Gemma tokenizer with few words."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
_OPENERS = (
    "user",
    "model",
    "system",
    "thought",
    *NAMES,
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
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer

"""Claims about rows becoming messages, and messages becoming tokens with a response span
(objective.md section 1).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from tokenizers import normalizers
from transformers import GemmaTokenizer

from benchmarks.resident import read_status
from canvastune.config.data import ColumnsConfig, DataConfig
from canvastune.errors import UserError
from canvastune.preparation.chat_template import ChatEncoder, EncodedConversation
from canvastune.preparation.conversation import Conversation, InvalidRow
from canvastune.preparation.row_formats import RowFormat, RowReader, detect_format
from canvastune.preparation.template_renderer import TemplateRenderer, _compile
from tests.support.data_fixtures import PLAIN, SPECIAL, THOUGHT, WORDS, encoder_of, make_tokenizer

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
TOKENIZERS = {
    name: make_tokenizer(template) for name, template in (("plain", PLAIN), ("thought", THOUGHT))
}
ENCODERS = {name: encoder_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *SPECIAL]
both_templates = pytest.mark.parametrize("template", ["plain", "thought"])


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=4))
def test_the_id_of_plain_messages_is_the_digest_of_their_json(texts: list[str]) -> None:
    """Ids decide on the split, so that prepared data sets of earlier versions stay as they are."""
    messages = tuple({"role": "user", "content": text} for text in texts)
    told = json.dumps(
        [["user", text.strip()] for text in texts], ensure_ascii=False, separators=(",", ":")
    )
    assert Conversation(messages).id == hashlib.sha256(told.encode()).hexdigest()


def read(row: Any, row_format: RowFormat, **data: Any) -> Conversation:
    """The one example of a row."""
    config = DataConfig(source="x", format=row_format, **data)
    return RowReader(row_format, config, config).read(row)[1][0]


def talk(*turns: tuple[str, str]) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in turns]
    return read({"messages": messages}, "messages")


class Tokens(NamedTuple):
    prefix: list[int]
    response: list[int]


def encode(conversation: Conversation, encoder: ChatEncoder) -> Tokens:
    encoded = encoder.encode([conversation])[0]
    assert isinstance(encoded, EncodedConversation), f"a good conversation was refused: {encoded}"
    return Tokens(
        encoded.tokens[: encoded.prefix_length].tolist(),
        encoded.tokens[encoded.prefix_length :].tolist(),
    )


def inference_prompt(conversation: Conversation, tokenizer: GemmaTokenizer) -> Any:
    """The tokens that a user of the stock library would feed to ask for the answer."""
    return tokenizer.apply_chat_template(
        conversation.history, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def stock_text(conversation: Conversation, tokenizer: GemmaTokenizer) -> str:
    """What the stock library renders for the whole conversation."""
    return str(tokenizer.apply_chat_template(list(conversation.messages), tokenize=False))


TALKS = {
    "one turn": talk(("user", "How many apples?"), ("assistant", "The 3 and 4\n#### 7")),
    "outer blanks": talk(("user", "  a \n"), ("assistant", "\n\t 12 = 12  \n")),
    "system": talk(("system", "Be short."), ("user", "Hi"), ("assistant", "Ho")),
    "several turns": talk(
        ("user", "1+1"), ("assistant", "2"), ("user", "and +1?"), ("assistant", "3")
    ),
    "two answers running": talk(("user", "q"), ("assistant", "a"), ("assistant", "b")),
    "beyond the vocabulary": talk(("user", "é 漢字 🙂"), ("assistant", "naïve 🙂\u200d\u0301 end")),
}


@both_templates
@pytest.mark.parametrize("name", TALKS)
def test_the_prefix_is_what_inference_feeds(name: str, template: str) -> None:
    encoded = encode(TALKS[name], ENCODERS[template])
    assert encoded.prefix == inference_prompt(TALKS[name], TOKENIZERS[template]), (
        "training conditions on other tokens than inference"
    )


@both_templates
@pytest.mark.parametrize("name", TALKS)
def test_rendered_text_equals_the_stock_templates(name: str, template: str) -> None:
    tokenizer, conversation = TOKENIZERS[template], TALKS[name]
    encoded = encode(conversation, ENCODERS[template])
    stock = stock_text(conversation, tokenizer)
    prefix, response = (
        str(tokenizer.decode(encoded.prefix)),
        str(tokenizer.decode(encoded.response)),
    )
    thought = EMPTY_THOUGHT if template == "thought" else ""
    assert prefix.endswith(thought)
    assert prefix.removesuffix(thought) + response + "\n" == stock, (
        "the trained text is not the template's"
    )


@both_templates
@pytest.mark.parametrize("name", TALKS)
def test_header_is_never_supervised(name: str, template: str) -> None:
    """Against the offsets of the stock rendering, tokenized whole: the response begins with the
    answer's first character.
    """
    tokenizer, conversation = TOKENIZERS[template], TALKS[name]
    encoded = encode(conversation, ENCODERS[template])
    stock = stock_text(conversation, tokenizer)
    answer = conversation.answer.strip()
    start = len(stock) - len(answer + "<turn|>\n")
    whole = tokenizer(stock, add_special_tokens=False, return_offsets_mapping=True)
    expected = [
        token
        for token, (first, _) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
        if first >= start
    ]
    assert stock[:start].endswith("<|turn>model\n")
    assert encoded.response == expected[:-1], (
        "the response is not the answer and the marker that closes the turn"
    )
    assert tokenizer.decode(encoded.response) == answer + "<turn|>"
    assert encoded.response[-1] == tokenizer.convert_tokens_to_ids("<turn|>"), (
        "the newline after the turn was supervised"
    )


@both_templates
def test_earlier_assistant_turns_are_history(template: str) -> None:
    encoded = encode(
        talk(("user", "q"), ("assistant", "FIRST"), ("user", "r"), ("assistant", "SECOND")),
        ENCODERS[template],
    )
    assert "FIRST" in TOKENIZERS[template].decode(encoded.prefix)
    assert TOKENIZERS[template].decode(encoded.response) == "SECOND<turn|>"


def test_the_empty_thought_that_inference_feeds_is_prefix() -> None:
    tokenizer = TOKENIZERS["thought"]
    encoded = encode(TALKS["one turn"], ENCODERS["thought"])
    assert str(tokenizer.decode(encoded.prefix)).endswith(f"<|turn>model\n{EMPTY_THOUGHT}")
    assert "thought" not in tokenizer.decode(encoded.response)


def test_a_token_across_header_and_answer_is_split_as_at_inference() -> None:
    tokenizer = make_tokenizer(words=[*WORDS, "\nAnn"])
    conversation = talk(("user", "who"), ("assistant", "Ann"))
    whole = tokenizer(stock_text(conversation, tokenizer), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("\nAnn") in whole, (
        "the fixture does not straddle: this test shows nothing"
    )
    encoded = encode(conversation, encoder_of(tokenizer))
    assert encoded.prefix == inference_prompt(conversation, tokenizer)
    assert tokenizer.decode(encoded.response) == "Ann<turn|>"


def test_a_template_that_keeps_outer_blanks_is_followed() -> None:
    tokenizer = make_tokenizer(PLAIN.replace(" | trim", ""))
    encoded = encode(talk(("user", " q "), ("assistant", " a\n")), encoder_of(tokenizer))
    assert tokenizer.decode(encoded.response) == " a\n<turn|>"


@both_templates
@pytest.mark.parametrize(
    "marker", ["<turn|>", "<|turn>model\n", "<eos>", "<bos>", "<pad>", "<mask>", "<|image|>"]
)
@pytest.mark.parametrize("place", range(4))
def test_chat_markers_in_the_text_are_refused_by_name(
    marker: str, place: int, template: str
) -> None:
    contents = ["system text", "question", "earlier answer", "answer"]
    contents[place] = f"see {marker} here"
    conversation = talk(*zip(["system", "user", "assistant", "assistant"], contents, strict=True))
    refused = ENCODERS[template].encode([conversation])[0]
    assert isinstance(refused, InvalidRow), f"{marker!r} in the text became a control token"
    assert marker.strip().removesuffix("model") in str(refused)


def test_pieces_of_markers_are_plain_text() -> None:
    tokenizer = TOKENIZERS["plain"]
    text = "<|turn |> turn|> <turn | < |turn> eos <e os>"
    assert (
        tokenizer.decode(
            encode(talk(("user", text), ("assistant", text)), ENCODERS["plain"]).response
        )
        == text + "<turn|>"
    )


def test_an_answer_whose_thought_the_template_removes_is_refused() -> None:
    refused = ENCODERS["thought"].encode(
        [talk(("user", "q"), ("assistant", "<|channel>thought\nhm<channel|>a"))]
    )[0]
    assert isinstance(refused, InvalidRow)
    assert "answer" in str(refused)


def test_a_row_that_the_template_refuses_does_not_take_its_neighbours_with_it() -> None:
    alternate = (
        "{%- if messages[-1]['content'] == 'no' -%}{{ raise_exception('I refuse no') }}{%-"
        " endif -%}" + PLAIN
    )
    encoder = encoder_of(make_tokenizer(alternate))
    good, bad, also_good = encoder.encode(
        [talk(("user", "q"), ("assistant", answer)) for answer in ("yes", "no", "yes too")]
    )
    assert isinstance(good, EncodedConversation)
    assert isinstance(also_good, EncodedConversation)
    assert isinstance(bad, InvalidRow)
    assert "refuse no" in str(bad), "the template's own reason is lost"


def test_a_template_that_asks_otherwise_than_it_writes_is_refused() -> None:
    encoder = encoder_of(
        make_tokenizer(
            PLAIN.replace("{{- '<|turn>model\\n' -}}", "{{- '<|turn>model\\nSure: ' -}}")
        ),
    )
    refused = encoder.encode([talk(("user", "q"), ("assistant", "a"))])[0]
    assert isinstance(refused, InvalidRow)
    assert re.search(r"prompt .*\buser\b", str(refused))


def test_a_template_without_its_end_of_turn_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model: .*'<turn\|>'"):
        encoder_of(make_tokenizer(special=[token for token in SPECIAL if token != "<turn|>"]))


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^model: ") as refused:
        encoder_of(tokenizer)
    assert "chat_template.jinja" in refused.value.hint


def test_a_tokenizer_that_begins_every_text_with_a_blank_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    with pytest.raises(UserError, match=r"^model: the tokenizer "):
        encoder_of(tokenizer)


def test_a_batch_is_encoded_as_its_rows_are() -> None:
    conversations, encoder = list(TALKS.values()), ENCODERS["thought"]
    assert encoder.encode(conversations) == [
        encoder.encode([conversation])[0] for conversation in conversations
    ]


# What a template may use in addition to the messages: the tokenizer's tokens, the library's
# functions and tags, and all that is undefined.
EVERYTHING = """\
{%- macro turn(message) -%}{{ '<|turn>' + message.role + '\n' + message['content'] | trim + '<turn|>\n' }}{%- endmacro -%}
{{- bos_token ~ pad_token ~ (tools is none) ~ (documents is none) ~ (enable_thinking is defined) ~ add_generation_prompt -}}
{%- set state = namespace(turns=0) -%}
{%- for message in messages -%}
    {%- if message.content == 'no' -%}{{ raise_exception('I refuse no') }}{%- endif -%}
    {%- if loop.index > 5 -%}{%- break -%}{%- endif -%}
    {%- set state.turns = state.turns + 1 -%}
    {%- generation -%}{{ turn(message) }}{%- endgeneration -%}
{%- endfor -%}
{{- dict(turns=state.turns, last=messages[-1]) | tojson ~ strftime_now('%Y') ~ (messages is mapping) ~ messages[1:] | length -}}
"""


@pytest.mark.parametrize("template", [PLAIN, THOUGHT, EVERYTHING])
@pytest.mark.parametrize("generation", [False, True])
def test_templates_are_rendered_as_the_library_renders_them(
    template: str, generation: bool
) -> None:
    tokenizer = make_tokenizer(PLAIN)
    tokenizer.chat_template = template
    conversations = list(TALKS.values())
    stock = tokenizer.apply_chat_template(
        [each.history if generation else list(each.messages) for each in conversations],
        tokenize=False,
        add_generation_prompt=generation,
    )
    renderer = TemplateRenderer(template, tokenizer.special_tokens_map)
    assert renderer.render(conversations, generation=generation) == stock


MACROS = """\
{%- macro name(tool) -%}{{ tool['function']['name'] }}{%- endmacro -%}
{%- macro nested(tool) -%}
    {%- if tool['type'] -%}{%- set kind = tool['type'] | upper -%}{{ kind }}{%- endif -%}
    {%- for key in tool['function'] | dictsort if key -%}{{ loop.index }}{{ key }}{%- endfor -%}
    {{- name(tool) -}}
{%- endmacro -%}
{%- macro maybe_unset(tool) -%}
    {%- if tool['function']['name'] == 'a' -%}{%- set mark = 'own' -%}{%- endif -%}{{ mark }}
{%- endmacro -%}
{%- macro outside(tool) -%}{{ number }}{%- endmacro -%}
{%- macro through(tool) -%}{{ outside(tool) }}{%- endmacro -%}
{%- macro year(tool) -%}{{ strftime_now('%Y') }}{%- endmacro -%}
{%- macro extra(tool) -%}{{ varargs }}{%- endmacro -%}
{%- macro kept(tool) -%}{%- set found = namespace(x=1) -%}{{ found.x }}{%- endmacro -%}
{%- set number = messages[0]['content'] | length -%}
{%- set mark = messages[0]['content'] -%}
{%- for tool in tools or [] -%}
    {{- name(tool) }} {{ nested(tool) }} {{ maybe_unset(tool) }} {{ through(tool) }} {{ year(tool) }}
    {{- extra(tool, number) }} {{ kept(tool) }} {{ name(messages[-1] | default(tool)) -}}
{%- endfor -%}
"""


def test_only_macros_that_depend_on_their_arguments_alone_are_remembered() -> None:
    _, sandbox = _compile(MACROS)
    assert sandbox.pure == {"name", "nested", "kept"}
    tokenizer = make_tokenizer(PLAIN)
    tokenizer.chat_template = MACROS.replace("name(messages[-1] | default(tool))", "''")
    tools = tuple(
        {"type": "function", "function": {"name": name, "description": "x"}} for name in "abc"
    )
    talks = [
        Conversation(({"role": "user", "content": text},), tools[at:])
        for at, text in enumerate(("one", "three", "one"))
    ]
    stock = [
        tokenizer.apply_chat_template(list(talk.messages), tools=list(talk.tools), tokenize=False)
        for talk in talks
    ]
    renderer = TemplateRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
    assert renderer.render(talks) == stock
    assert renderer.render(talks) == stock


def test_a_template_stays_in_the_sandbox_whatever_was_asked_before() -> None:
    """Also for a second object of the type, and a second name."""
    source = "{{ messages[0]['content'].%s }}"
    talk = Conversation(({"role": "user", "content": "x"},))
    for name in ("upper()", "__class__", "upper()", "__class__"):
        rendered = TemplateRenderer(source % name, {}).render([talk, talk])
        assert rendered == (["X", "X"] if name == "upper()" else ["", ""])
    with pytest.raises(SecurityError):
        TemplateRenderer("{{ messages.append(1) }}", {}).render([talk])


def test_a_tokenizer_of_many_texts_takes_no_more_memory() -> None:
    """In this process and in another one, to which it is sent: a tokenizer of Gemma's kind
    remembers texts that never come again.
    """
    for encoder in (
        encoder_of(make_tokenizer()),
        pickle.loads(pickle.dumps(ENCODERS["plain"])),
    ):
        held = []
        for start in range(0, 6000, 500):
            encoder._tokenizer.encode(
                [f"{number} " + "abcdefgh" * 25 for number in range(start, start + 500)]
            )
            held.append(read_status(os.getpid())["RssAnon"])
        assert held[-1] - held[1] < 10 * 2**20, (
            f"5,000 texts left {(held[-1] - held[1]) / 2**20:.0f} MiB behind"
        )


# The tokenizer itself writes a blank as U+2581: it cannot tell the two apart, nor can anyone who
# decodes.
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")).filter(
    lambda text: text.strip() and not any(token in text for token in CONTROL)
)


@settings(max_examples=150, deadline=None, database=None)
@given(question=plain_text, answer=plain_text, template=st.sampled_from(["plain", "thought"]))
def test_any_plain_text_comes_back_from_its_tokens(
    question: str, answer: str, template: str
) -> None:
    tokenizer = TOKENIZERS[template]
    encoded = encode(talk(("user", question), ("assistant", answer)), ENCODERS[template])
    assert tokenizer.decode(encoded.response[:-1]) == answer.strip()
    assert question.strip() in tokenizer.decode(encoded.prefix)


pieces = [
    "<|turn>",
    "<turn|>",
    "<eos>",
    "<|image|>",
    "<|",
    "turn",
    "|>",
    "<",
    "|",
    "model\n",
    "\n",
    " ",
    "thought",
    "a",
    "<turn |>",
    "eos>",
]
fragments = st.lists(st.sampled_from(pieces), min_size=1, max_size=4).map("".join)
turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), fragments), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None, database=None)
@given(history=turns, answer=fragments, template=st.sampled_from(["plain", "thought"]))
def test_no_text_opens_or_closes_a_turn(
    history: list[tuple[str, str]], answer: str, template: str
) -> None:
    """Whatever is accepted has exactly the template's own markers, and is what inference feeds."""
    tokenizer = TOKENIZERS[template]
    try:
        conversation = talk(*history, ("assistant", answer))
    except InvalidRow:
        return
    encoded = ENCODERS[template].encode([conversation])[0]
    if isinstance(encoded, InvalidRow):
        return
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens.tolist())
    assert encoded.tokens[: encoded.prefix_length].tolist() == inference_prompt(
        conversation, tokenizer
    )
    assert tokens.count("<|turn>") == tokens.count("<turn|>") == len(conversation.messages)
    assert tokens.count("<eos>") == tokens.count("<|image|>") == 0


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not an object": ([1], r"a list, .*\bmessages$"),
    "no column": ({"text": 1, "id": 2}, r"'messages'; .* text, id$"),
    "messages is text": ({"messages": "hi"}, r"column 'messages' .*\bstr, .*\blist\b"),
    "messages is null": ({"messages": None}, r"column 'messages' .*\bnull\b"),
    "no messages": ({"messages": []}, r"column 'messages' .*\bempty\b"),
    "message is text": ({"messages": ["hi"]}, r"message 1 .*\bstr, .*\bobject\b"),
    "no role": ({"messages": [{"content": "a"}]}, r"message 1 .*'role'; .* content$"),
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "a"}]},
        r"message 1: .*'narrator', expected system, developer, user, assistant",
    ),
    "no content": ({"messages": [{"role": "user"}]}, r"message 1 \(user\) .*\bno 'content'"),
    "number": (
        {"messages": [{"role": "user", "content": 3}]},
        r"message 1 \(user\): .*\bint, expected text\b",
    ),
    "null": (
        {"messages": [{"role": "user", "content": None}]},
        r"message 1 \(user\): .*\bnull\b",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"message 1 \(user\) .*\btype 'image'",
    ),
    "tool call": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
        r"message 1 \(user\) .*'tool_calls'",
    ),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, r"\bassistant\b"),
    "no question": ({"messages": [{"role": "assistant", "content": "a"}]}, r"\banswer\b"),
    "empty answer": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": " \n\u2003"},
            ]
        },
        r"message 2 \(assistant\): .*\bempty\b",
    ),
    "half a pair": (
        {"messages": [{"role": "user", "content": "ab\ud800"}]},
        r"\bUnicode \(.*\b3\)",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_trained_on_says_why(name: str) -> None:
    row, reason = BAD_ROWS[name]
    with pytest.raises(InvalidRow, match=reason):
        read(row, "messages")


def test_columns_say_which_one_is_wrong() -> None:
    with pytest.raises(InvalidRow, match=r"column 'answer' \(assistant\): .*\bempty\b"):
        read({"question": "q", "answer": " "}, "gsm8k")
    with pytest.raises(InvalidRow, match=r"column 'in' \(user\): .*\bint\b"):
        read({"in": 3, "out": "b"}, "columns", columns=ColumnsConfig(prompt="in", response="out"))


def test_the_same_conversation_has_the_same_id_in_any_form() -> None:
    columns = ColumnsConfig(prompt="in", response="out", system="sys")
    conversations = [
        read({"question": "q", "answer": "a\n"}, "gsm8k"),
        read({"in": "q ", "out": "a", "sys": ""}, "columns", columns=columns),
        talk(("user", "q"), ("assistant", "a")),
        talk(
            ("user", "q"),
            ("assistant", "a"),
            ("user", "a turn after the last answer is not trained on"),
        ),
    ]
    assert len({conversation.id for conversation in conversations}) == 1, (
        "repeats in another form would not be found"
    )
    others = [
        talk(("user", "q"), ("assistant", "b")),
        talk(("system", "q"), ("assistant", "a")),
        talk(("user", "qa"), ("assistant", "a")),
    ]
    assert len({conversation.id for conversation in [*conversations, *others]}) == 4


def test_a_system_column_becomes_a_system_turn() -> None:
    conversation = read(
        {"p": "q", "r": "a", "s": "short"},
        "columns",
        columns=ColumnsConfig(prompt="p", response="r", system="s"),
    )
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("keys", "form"),
    [
        (["id", "messages"], "messages"),
        (["question", "answer", "id"], "gsm8k"),
        (["prompt", "response"], "columns"),
        (["messages", "question", "answer"], "messages"),
        (["question", "solution"], None),
    ],
)
def test_the_format_follows_from_the_keys(keys: list[str], form: str | None) -> None:
    assert detect_format(DataConfig(source="x"), keys) == form


def test_a_format_that_is_set_is_the_only_candidate() -> None:
    config = DataConfig(
        source="x", format="columns", columns=ColumnsConfig(prompt="question", response="answer")
    )
    assert detect_format(config, ["question", "answer"]) == "columns"
    assert detect_format(DataConfig(source="x", format="messages"), ["question", "answer"]) is None

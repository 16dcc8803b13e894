"""Claims about tools and thinking, with the chat template released with the model: the prefix is
what inference feeds, and what the model writes is learned, no more and no less.
"""

from __future__ import annotations

import copy
import datetime
import itertools
from typing import Any

import pytest

from canvastune.config.data import DataConfig
from canvastune.preparation.chat_template import EncodedConversation
from canvastune.preparation.conversation import Conversation, InvalidRow
from canvastune.preparation.row_formats import RowReader
from canvastune.preparation.tools import ToolReader
from tests.support.data_fixtures import (
    PLAIN,
    TOOL_SPECIAL,
    encoder_of,
    make_tokenizer,
    released_template,
)

TOKENIZER = make_tokenizer(released_template(), special=TOOL_SPECIAL)
ENCODER = encoder_of(TOKENIZER)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks it up.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
    for name in ("get_weather", "get_time")
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(*names: str, text: str | None = None, ids: bool = True, **more: Any) -> dict[str, Any]:
    calls = [
        {
            **({"id": f"id-{name}"} if ids else {}),
            "type": "function",
            "function": {"name": name, "arguments": {"city": "Bern", "days": 2}},
        }
        for name in names
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls, **more}


def result(name: str, text: str, ids: bool = True) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({"tool_call_id": f"id-{name}"} if ids else {})


def examples(row: dict[str, Any], **data: Any) -> list[Conversation]:
    config = DataConfig(source="x", **data)
    return RowReader("messages", config, config).read(row)[1]


def encode(conversation: Conversation) -> EncodedConversation:
    encoded = ENCODER.encode([conversation])[0]
    assert isinstance(encoded, EncodedConversation), f"refused: {encoded}"
    return encoded


def texts(conversation: Conversation) -> tuple[str, str]:
    """Prefix and response as text."""
    encoded = encode(conversation)
    tokens = encoded.tokens.tolist()
    return (
        str(TOKENIZER.decode(tokens[: encoded.prefix_length])),
        str(TOKENIZER.decode(tokens[encoded.prefix_length :])),
    )


def stock_prompt(messages: list[dict[str, Any]], **settings: Any) -> Any:
    """The tokens that a user of the stock library would feed to ask for the next message."""
    return TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **settings
    )


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "no call": [user("Hi"), says("Ho")],
    "call": [user("Weather?"), call("get_weather")],
    "call and answer": [
        user("Weather?"),
        call("get_weather"),
        result("get_weather", "sunny"),
        says("It is sunny."),
    ],
    "parallel calls": [
        user("Both?"),
        call("get_weather", "get_time"),
        result("get_weather", "sunny"),
        result("get_time", "noon"),
        says("Sunny at noon."),
    ],
    "three turns": [
        {"role": "system", "content": "Be short."},
        user("Weather?"),
        call("get_weather"),
        result("get_weather", "sunny"),
        says("Sunny."),
        user("Time?"),
        call("get_time"),
        result("get_time", "noon"),
        says("Noon."),
        user("Thanks"),
        says("Any time."),
    ],
    "call after call": [
        user("Weather, then time?"),
        call("get_weather"),
        result("get_weather", "sunny"),
        call("get_time"),
        result("get_time", "noon"),
        says("Sunny at noon."),
    ],
    "thinking before the answer": [user("1+1?"), says("2", reasoning="one and one")],
    "thinking before call and answer": [
        user("Weather?"),
        call("get_weather", reasoning="I look it up."),
        result("get_weather", "sunny"),
        says("It is sunny.", reasoning="It says sunny."),
    ],
    "thinking before the call only": [
        user("Weather?"),
        call("get_weather", reasoning="I look it up."),
        result("get_weather", "sunny"),
        says("It is sunny."),
    ],
}
each_conversation = pytest.mark.parametrize("name", CONVERSATIONS)


@each_conversation
def test_the_prefix_is_what_inference_feeds(name: str) -> None:
    for each in examples({"messages": CONVERSATIONS[name], "tools": TOOLS}, learn="all"):
        encoded = encode(each)
        settings = {"enable_thinking": True} if "thinking" in name else {}
        assert encoded.tokens[: encoded.prefix_length].tolist() == stock_prompt(
            each.history, tools=TOOLS, **settings
        )


@each_conversation
def test_prefix_and_response_are_the_templates_rendering(name: str) -> None:
    """Byte for byte, but for the header that the rendering opens again after a tool's response, and
    the thought that the generation prompt opens there.
    """
    for each in examples({"messages": CONVERSATIONS[name], "tools": TOOLS}, learn="all"):
        prefix, response = texts(each)
        stock = str(
            TOKENIZER.apply_chat_template(
                list(each.messages), tools=TOOLS, enable_thinking=each.thinking, tokenize=False
            )
        )
        after_tool = each.history[-1]["role"] == "tool"
        thought = "<|channel>thought\n" if after_tool and each.thinking else ""
        header = "<|turn>model\n" if after_tool else ""
        assert prefix.endswith(thought)
        written = response
        if thought and not each.messages[-1].get("reasoning"):
            written, thought = response.removeprefix("<channel|>"), ""
            assert written != response
        base = prefix.removesuffix("<|channel>thought\n") if after_tool else prefix
        assert (base + header + thought + written).rstrip() == stock.rstrip()


@each_conversation
def test_what_is_learned_is_trls_generation_mask(name: str) -> None:
    """With four differences: the token that hands over to the tool ends a call and is learned; the
    line break after a turn is not; an earlier turn's thinking is learned in its own example; a
    thought that inference opens is not learned, its end is.
    """
    messages = CONVERSATIONS[name]
    if not any(message["role"] == "assistant" for message in messages):
        return
    found = TOKENIZER.apply_chat_template(
        messages,
        tools=TOOLS,
        chat_template=released_template(training=True),
        enable_thinking="thinking" in name,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = itertools.groupby(
        zip(found["input_ids"], found["assistant_masks"], strict=True), key=lambda pair: pair[1]
    )
    trl = [
        str(TOKENIZER.decode([t for t, _ in run])).rstrip() for learned, run in marked if learned
    ]
    ours = []
    for each in examples({"messages": messages, "tools": TOOLS}, learn="all"):
        _, response = texts(each)
        if "tool_calls" in each.messages[-1]:
            assert response.endswith("<|tool_response>")
            response = response.removesuffix("<|tool_response>")
        if each.thinking and each.history[-1]["role"] == "tool":
            thinks = "reasoning" in each.messages[-1]
            response = (
                f"<|channel>thought\n{response}" if thinks else response.removeprefix("<channel|>")
            )
        ours.append(response)
    assert ours == trl


def test_a_declaration_and_a_tools_response_are_never_learned() -> None:
    for name, messages in CONVERSATIONS.items():
        for each in examples({"messages": messages, "tools": TOOLS}, learn="all"):
            _, response = texts(each)
            assert "<|tool>" not in response, name
            assert "response:" not in response, name


def test_parallel_calls_without_ids_get_their_responses_in_order() -> None:
    messages = [
        user("Both?"),
        call("get_weather", "get_time", ids=False),
        result("get_weather", "sunny", ids=False),
        result("get_time", "noon", ids=False),
        says("Sunny at noon."),
    ]
    prefix, _ = texts(examples({"messages": messages, "tools": TOOLS})[0])
    assert 'response:get_weather{value:<|"|>sunny<|"|>}' in prefix
    assert 'response:get_time{value:<|"|>noon<|"|>}' in prefix


def test_gemmas_own_form_is_a_call_and_the_answer_to_its_responses() -> None:
    message = call("get_weather", text="It is sunny.")
    message["tool_responses"] = [{"name": "get_weather", "response": {"sky": "sunny"}}]
    first, second = examples({"messages": [user("Weather?"), message], "tools": TOOLS}, learn="all")
    assert texts(first)[1].endswith("<tool_call|><|tool_response>")
    prefix, response = texts(second)
    assert prefix.endswith(
        '<|tool_response>response:get_weather{sky:<|"|>sunny<|"|>}<tool_response|>'
    )
    assert response == "It is sunny.<turn|>"
    stock = str(
        TOKENIZER.apply_chat_template([user("Weather?"), message], tools=TOOLS, tokenize=False)
    )
    assert prefix + response + "\n" == stock


def test_arguments_in_json_text_are_an_object() -> None:
    as_object, as_text = call("get_weather"), call("get_weather")
    as_text["tool_calls"][0]["function"]["arguments"] = '{"days": 2, "city": "Bern"}'
    rows = [{"messages": [user("Weather?"), each], "tools": TOOLS} for each in (as_object, as_text)]
    assert len({texts(examples(row)[0]) for row in rows}) == 1
    assert len({examples(row)[0].id for row in rows}) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [("{city", "JSON"), ("[1]", "object"), (3, "object")],
)
def test_arguments_that_are_no_object_are_refused(arguments: Any, reason: str) -> None:
    message = call("get_weather")
    message["tool_calls"][0]["function"]["arguments"] = arguments
    with pytest.raises(InvalidRow) as refused:
        examples({"messages": [user("Weather?"), message]})
    assert reason in str(refused.value)
    assert "message 2" in str(refused.value)


def test_the_reference_of_a_call_is_the_call() -> None:
    encoded = encode(
        examples({"messages": [user("Weather?"), call("get_weather", reasoning="Look.")]})[0]
    )
    assert encoded.answer == '<|tool_call>call:get_weather{city:<|"|>Bern<|"|>,days:2}<tool_call|>'


def test_the_token_that_ends_a_call_is_known() -> None:
    assert ENCODER.call_closing_id == TOKENIZER.convert_tokens_to_ids("<|tool_response>")
    assert encoder_of(make_tokenizer(PLAIN)).call_closing_id is None


def test_text_beside_a_call_is_learned_where_the_template_writes_it() -> None:
    _, response = texts(
        examples({"messages": [user("Weather?"), call("get_weather", text="I look.")]})[0]
    )
    assert response.endswith("<tool_call|>I look.<|tool_response>")


@pytest.mark.parametrize("reasoning", ["", "It says sunny."])
@pytest.mark.parametrize("thinks", [False, True])
def test_after_a_call_with_text_the_generation_prompt_decides(thinks: bool, reasoning: str) -> None:
    """The released template writes that text after the tool's response, and asks for the answer
    with the turn closed and none opened.
    """
    answer = says("Sunny.", **({"reasoning": reasoning} if thinks and reasoning else {}))
    asked = call("get_weather", text="I look.")
    if thinks:
        asked["reasoning"] = "I must."
    row = {"messages": [user("Weather?"), asked, result("get_weather", "sun"), answer]}
    (example,) = examples({**row, "tools": TOOLS})
    encoded = encode(example)
    stock = stock_prompt(example.history, tools=TOOLS, enable_thinking=thinks)
    assert encoded.tokens[: encoded.prefix_length].tolist() == stock
    prefix, response = texts(example)
    opened = "<|channel>thought\n" if thinks else ""
    assert prefix.endswith(f"<tool_response|>I look.<turn|>\n{opened}")
    closed = f"{reasoning}\n<channel|>" if reasoning else "<channel|>"
    assert response == f"{closed if thinks else ''}Sunny.<turn|>"


def test_every_turn_is_an_example_with_the_history_of_inference() -> None:
    messages = [
        user("1+1?"),
        says("2", reasoning="one and one"),
        user("+1?"),
        says("3", reasoning="two and one"),
    ]
    first, second = examples({"messages": messages}, learn="all")
    assert texts(first)[1] == "<|channel>thought\none and one\n<channel|>2<turn|>"
    prefix, response = texts(second)
    assert response == "<|channel>thought\ntwo and one\n<channel|>3<turn|>"
    assert "one and one" not in prefix, "inference drops the thinking of earlier turns"
    assert first.group == second.group, "examples of one row fall on one side of the split"
    assert first.id != second.id
    assert examples({"messages": messages})[0].id == second.id == second.group


def test_a_turn_without_thinking_is_asked_without_it() -> None:
    messages = [user("1+1?"), says("2", reasoning="one and one"), user("+1?"), says("3")]
    first, second = examples({"messages": messages}, learn="all")
    assert "<|think|>" in texts(first)[0]
    assert "<|think|>" not in texts(second)[0]


def test_thinking_is_dropped_where_the_recipe_says_so() -> None:
    messages = [user("1+1?"), says("2", reasoning_content="one and one")]
    config = DataConfig(source="x", thinking="drop")
    parsed, (example,) = RowReader("messages", config, config).read({"messages": messages})
    assert texts(example) == ("<bos><|turn>user\n1+1?<turn|>\n<|turn>model\n", "2<turn|>")
    assert parsed.unused == ["messages.reasoning_content"]


def test_marked_turns_are_context_only() -> None:
    messages = [user("1+1?"), says("3", weight=0), user("Sure?"), says("2", weight=1)]
    assert [each.turn for each in examples({"messages": messages}, learn="all")] == [4]
    assert "3" in texts(examples({"messages": messages})[0])[0]
    assert examples({"messages": messages[:2]}) == []


NO_TOOLS = encoder_of(make_tokenizer(PLAIN))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": CONVERSATIONS["no call"], "tools": TOOLS}, "tool declarations"),
        ({"messages": CONVERSATIONS["call"]}, "tool calls"),
        ({"messages": CONVERSATIONS["thinking before the answer"]}, "thinking"),
    ],
)
def test_what_a_template_does_not_write_is_refused(row: dict[str, Any], what: str) -> None:
    (refused,) = NO_TOOLS.encode(examples(row))
    assert isinstance(refused, InvalidRow)
    assert what in str(refused) or "changes the answer" in str(refused)


@pytest.mark.parametrize("marker", ["<|tool_call>", "<tool_response|>", '<|"|>', "<turn|>"])
@pytest.mark.parametrize("place", ["argument", "response", "declaration", "thinking"])
def test_control_tokens_in_calls_and_responses_are_refused(marker: str, place: str) -> None:
    tools = [{"type": "function", "function": {**TOOLS[0]["function"]}}]  # type: ignore[dict-item]
    asked = call("get_weather", reasoning=f"a{marker}" if place == "thinking" else "a")
    if place == "argument":
        asked["tool_calls"][0]["function"]["arguments"] = {"city": [{"x": f"a{marker}b"}]}
    if place == "declaration":
        tools[0]["function"]["description"] = f"d {marker}"  # type: ignore[index]
    answer = f"sunny {marker}" if place == "response" else "sunny"
    messages = [user("W?"), asked, result("get_weather", answer), says("ok")]
    (refused,) = ENCODER.encode(examples({"messages": messages, "tools": tools}))
    assert isinstance(refused, InvalidRow)
    assert repr(marker) in str(refused)


def test_line_breaks_may_be_added_tokens() -> None:
    """In Gemma's tokenizer they are, and are text all the same."""
    tokenizer = make_tokenizer(released_template(), special=TOOL_SPECIAL)
    tokenizer.add_tokens(["\n", "user"], special_tokens=False)
    encoder = encoder_of(tokenizer)
    (encoded,) = encoder.encode(examples({"messages": [user("a\n\nb\nuser"), says("c\n\nd")]}))
    assert isinstance(encoded, EncodedConversation)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([user("W?"), result("get_weather", "sunny"), says("ok")], "id-get_weather"),
        (
            [user("W?"), call("get_weather"), result("get_time", "noon"), says("ok")],
            "id-get_time",
        ),
        (
            [
                user("W?"),
                call("get_weather"),
                result("get_weather", "sunny"),
                result("get_weather", "rain"),
                says("ok"),
            ],
            "message 4",
        ),
    ],
)
def test_a_response_without_its_call_is_refused(messages: list[Any], named: str) -> None:
    """The template would leave it out, or call it `unknown`."""
    with pytest.raises(InvalidRow) as refused:
        examples({"messages": messages})
    assert named in str(refused.value)


def test_an_object_of_lists_is_a_list_of_messages() -> None:
    """As `datasets` before 4 stored it."""
    turns = {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}
    assert texts(examples({"messages": turns})[0])[1] == "Ho<turn|>"
    with pytest.raises(InvalidRow):
        examples({"messages": {"role": ["user"], "content": ["Hi", "Ho"]}})


def test_rows_with_the_same_tools_share_them_and_each_counts_its_unused_keys() -> None:
    reader = ToolReader()
    declared = {"type": "function", "strict": True, "function": {"name": "a", "description": "x"}}
    unused: list[set[str]] = [set(), set(), set()]
    first = reader.read([declared], "tools", unused[0])
    assert reader.read(copy.deepcopy([declared]), "tools", unused[1]) is first
    # Equal in Python, and another text in a template.
    other = {"name": "a", "parameters": {"type": "object", "minimum": 1}}
    one, true = (
        reader.read([other | {"parameters": {"type": "object", "minimum": value}}], "tools", set())
        for value in (1, True)
    )
    assert one[0]["function"]["parameters"]["minimum"] is not True
    assert true[0]["function"]["parameters"]["minimum"] is True
    assert unused[0] == unused[1] == {"tools.strict"}
    with pytest.raises(InvalidRow, match=r"declaration 1\b.* name\b"):
        reader.read([{}], "tools", unused[2])
    day = {"name": "a", "parameters": {"type": "object", "day": datetime.datetime(2026, 1, 1)}}
    with pytest.raises(InvalidRow, match=r"\bdatetime\b.* JSON\b"):
        reader.read([day], "tools", unused[2])

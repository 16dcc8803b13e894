"""Values at odd places of a row: each is used, counted or refused, and none ends in a traceback."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from canvastune.config.data import DataConfig
from canvastune.preparation.chat_template import EncodedConversation
from canvastune.preparation.conversation import Conversation, InvalidRow, ParsedRow
from canvastune.preparation.row_formats import RowReader, detect_format
from canvastune.preparation.stats import UNUSED_TURNS, DatasetStats
from tests.support.data_fixtures import PLAIN, encoder_of, make_tokenizer
from tests.unit.test_tools_and_thinking import TOOLS, call, result, says, texts, user


def read(row: dict[str, Any], **data: Any) -> tuple[ParsedRow, list[Conversation]]:
    config = DataConfig(source="x", **data)
    found = detect_format(config, list(row))
    assert found is not None
    return RowReader(found, config, config).read(row)


def talk(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def refusal(row: dict[str, Any], **data: Any) -> str:
    with pytest.raises(InvalidRow) as refused:
        read(row, **data)
    return f"{refused.value} {refused.value.hint}"


def calls(*each: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(each)}


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"a": 1}
    for _ in range(levels):
        value = {"a": value}
    return value


BAD_VALUES = [
    ({"x": datetime.date(2020, 1, 1)}, "date"),
    ({"x": [b"z"]}, "bytes"),
    ({"x": float("nan")}, "nan"),
    ({"x": "\ud800"}, "Unicode"),
    ({"\udc00": 1}, "Unicode"),
    (nested(3000), "64 levels"),
]


@pytest.mark.parametrize(("value", "named"), BAD_VALUES)
def test_what_json_cannot_hold_is_refused_wherever_it_is(value: Any, named: str) -> None:
    function = {"name": "f", "arguments": value}
    asked = call("f")
    for row in (
        talk(user("a"), calls({"function": function})),
        talk(user("a"), asked, {"role": "tool", "tool_call_id": "id-f", "content": value}),
        talk(user("a"), asked | {"tool_responses": [{"name": "f", "response": value}]}),
        talk(user("a"), says("b"), tools=[{"name": "f", "description": value}]),
    ):
        assert named in refusal(row)


def test_nested_arguments_are_rendered_to_the_limit() -> None:
    _, (example,) = read(
        talk(user("a"), calls({"function": {"name": "f", "arguments": nested(60)}}))
    )
    assert "a:{" * 60 in texts(example)[1]


def test_calls_that_are_numbered_get_their_own_responses() -> None:
    asked = calls(*({"id": at, "function": {"name": name}} for at, name in enumerate("fg", 1)))
    answers = [
        {"role": "tool", "tool_call_id": at, "content": text} for at, text in ((2, "G"), (1, "F"))
    ]
    _, (example,) = read(talk(user("a"), asked, *answers, says("b")))
    prefix, _ = texts(example)
    assert 'response:g{value:<|"|>G<|"|>}' in prefix
    assert 'response:f{value:<|"|>F<|"|>}' in prefix


def test_two_calls_with_one_id_are_refused() -> None:
    """The template would give the response of the first one the name of the second."""
    asked = calls(*({"id": "1", "function": {"name": name}} for name in "fg"))
    answer = {"role": "tool", "tool_call_id": "1", "content": "F"}
    assert "same id" in refusal(talk(user("a"), asked, answer, says("b")))


@pytest.mark.parametrize(
    "one",
    [
        {"function": {"name": "f", "arguments": None, "parameters": {"x": 1}}},
        {"function": {"name": "f"}, "arguments": '{"x": 1}'},
        {"name": "f", "parameters": {"x": 1}},
    ],
)
def test_arguments_are_found_where_they_are(one: dict[str, Any]) -> None:
    _, (example,) = read(talk(user("a"), calls(one)))
    assert "call:f{x:1}" in texts(example)[1]


def test_two_arguments_of_one_call_are_refused() -> None:
    one = {"function": {"name": "f", "arguments": {"x": 1}, "parameters": {"y": 1}}}
    assert "twice" in refusal(talk(user("a"), calls(one)))


def test_a_response_without_a_name_is_that_of_its_call() -> None:
    asked = call("f", "g", text="b") | {"tool_responses": [{"response": "F"}, {"response": "G"}]}
    _, (example,) = read(talk(user("a"), asked))
    assert 'response:f{value:<|"|>F<|"|>}<tool_response|>' in texts(example)[0]
    assert "unknown" not in texts(example)[0]


def test_a_second_response_to_an_answered_call_is_refused() -> None:
    asked = call("f") | {"tool_responses": [{"name": "f", "response": "sun"}]}
    assert "message 3" in refusal(talk(user("a"), asked, result("f", "rain"), says("b")))


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_declarations_in_a_message_are_refused(key: str) -> None:
    reason = refusal(talk({"role": "system", "content": "s", key: TOOLS}, user("a"), says("b")))
    assert f"data.ignore=[messages.{key}]" in reason
    ignored = talk({"role": "system", "content": "s", key: TOOLS}, user("a"), says("b"))
    assert read(ignored, ignore=(f"messages.{key}",))[0].unused == []


def test_calls_in_text_beside_an_answer_are_refused() -> None:
    assert "tool_calls" in refusal(talk(user("a"), says("b", function_calls="f(x=1)")))


SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}


@pytest.mark.parametrize(
    "more",
    [{"parameters": json.dumps(SCHEMA)}, {"input_schema": SCHEMA}, {"inputSchema": SCHEMA}],
)
def test_parameters_are_declared_however_they_are_written(more: dict[str, Any]) -> None:
    tools = [{"name": "f", "description": "d", **more}]
    usual = [{"name": "f", "description": "d", "parameters": SCHEMA}]
    written = [texts(read(talk(user("a"), says("b"), tools=each))[1][0]) for each in (tools, usual)]
    assert written[0] == written[1]
    assert 'q:{type:<|"|>STRING<|"|>}' in written[0][0]


def test_parameters_that_no_template_writes_are_refused() -> None:
    tools = [{"name": "f", "parameters": {"q": {"type": "str", "description": "the q"}}}]
    assert "JSON Schema" in refusal(talk(user("a"), says("b"), tools=tools))


def test_a_second_text_of_a_message_is_counted() -> None:
    parsed, _ = read(talk(user("a") | {"value": "b"}, says("c")))
    assert parsed.unused == ["messages.value"]
    _, (example,) = read(talk({"role": "user", "content": None, "value": "b"}, says("c")))
    assert example.history[0]["content"] == "b"


def test_a_second_thinking_is_counted_unless_it_is_the_same() -> None:
    for other, unused in (("r", []), ("s", ["messages.reasoning_content"])):
        parsed, _ = read(talk(user("a"), says("b", reasoning="r", reasoning_content=other)))
        assert parsed.unused == unused


def test_blanks_are_not_thinking() -> None:
    _, (example,) = read(talk(user("a"), says("b", reasoning="\n\n")))
    assert not example.thinking
    assert texts(example)[1] == "b<turn|>"


def test_geminis_thoughts_are_thinking() -> None:
    parts = [{"text": "hm", "thought": True}, {"text": "b"}]
    _, (example,) = read(talk(user("a"), {"role": "model", "parts": parts}))
    assert texts(example)[1] == "<|channel>thought\nhm\n<channel|>b<turn|>"


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"text": "hm", "image": "a.png"}, "'image'"),
        ({"type": "text", "text": "hm", "image_url": {"url": "a.png"}}, "'image_url'"),
        ({"type": "redacted", "text": "hm"}, "'redacted'"),
    ],
)
def test_a_part_that_is_more_than_text_is_refused(part: dict[str, Any], named: str) -> None:
    assert named in refusal(talk({"role": "user", "content": [part]}, says("b")))


@pytest.mark.parametrize(("mark", "learned"), [("0", 0), ("false", 0), ("1", 1), ("True", 1)])
def test_a_mark_in_a_cell_of_a_table_is_text(mark: str, learned: int) -> None:
    _, examples = read({"prompt": "a", "response": "b", "weight": mark})
    assert len(examples) == learned


def test_a_thinking_column_never_replaces_a_turns_own() -> None:
    row = {"prompt": [user("a")], "completion": [says("b", reasoning="own")], "reasoning": "column"}
    assert "reasoning" in refusal(row)
    again = {"prompt": [user("a")], "completion": [user("a"), user("b"), says("c")]}
    assert "reasoning" in refusal({**again, "reasoning": "column"})


def test_blanks_in_a_thinking_column_are_not_thinking() -> None:
    _, (example,) = read({"prompt": "a", "response": "b", "reasoning": " "})
    assert texts(example)[1] == "b<turn|>"


def test_keys_of_a_prompt_that_the_completion_repeats_are_counted() -> None:
    row = {"prompt": [user("a") | {"name": "Bob"}], "completion": [user("a"), says("b")]}
    assert read(row)[0].unused == ["prompt.name"]


def test_a_prompt_that_is_one_message_keeps_its_role() -> None:
    prompt = {"role": "system", "parts": [{"text": "a"}]}
    _, (example,) = read({"prompt": prompt, "completion": "b"})
    assert example.history == [{"role": "system", "content": "a"}]


def test_an_object_that_is_more_than_text_is_refused() -> None:
    assert "'score'" in refusal({"prompt": "a", "completion": {"text": "b", "score": [1]}})


def test_declarations_in_two_columns_are_declared_once() -> None:
    parsed, _ = read(talk(user("a"), says("b"), tools=TOOLS, functions=TOOLS))
    assert list(parsed.tools) == TOOLS


def test_every_call_of_a_message_is_learned() -> None:
    asked = {"from": "function_call", "value": '{"name": "f"}', "tool_calls": [{"name": "g"}]}
    _, (example,) = read({"conversations": [{"from": "human", "value": "a"}, asked]})
    assert "call:f{}" in texts(example)[1]
    assert "call:g{}" in texts(example)[1]


def test_a_second_role_is_counted_and_a_null_one_is_absent() -> None:
    parsed, _ = read(talk(user("a") | {"from": "gpt"}, says("b")))
    assert parsed.unused == ["messages.from"]
    _, (example,) = read(talk({"role": None, "from": "human", "content": "a"}, says("b")))
    assert example.history == [user("a")]


def test_responses_after_a_last_call_are_counted() -> None:
    stats = DatasetStats(256, 16)
    stats.count_turns(
        *read(talk(user("a"), call("f") | {"tool_responses": [{"name": "f", "response": "F"}]}))
    )
    assert stats.turns[UNUSED_TURNS] == 1


def test_keys_that_no_template_writes_are_counted() -> None:
    asked = calls(
        {"id": "1", "index": 0, "type": "function", "function": {"name": "f", "strict": True}}
    )
    row = talk(
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"a": 1}}]},
        asked,
        tools=[{"type": "function", "defer": True, "function": {"name": "f", "strict": True}}],
    )
    parsed, _ = read(row)
    assert parsed.unused == [
        "messages.content.cache_control",
        "messages.tool_calls.function.strict",
        "messages.tool_calls.index",
        "tools.defer",
        "tools.strict",
    ]
    assert read(row, ignore=["index", "strict", "defer", "cache_control"])[0].unused == []
    assert "tools.strict" not in read(row, ignore=["tools.strict"])[0].unused


def test_a_response_whose_name_is_not_that_of_its_call_is_refused() -> None:
    answer = result("get_weather", "sunny") | {"name": "get_time"}
    reason = refusal(talk(user("a"), call("get_weather"), answer, says("b")))
    assert "get_weather" in reason
    assert "get_time" in reason


def test_a_name_in_ignore_that_no_row_has_is_known() -> None:
    names = ["id", "messages.name", "absent_key", "tools.strict"]
    config = DataConfig(source="x", ignore=names)
    reader = RowReader("messages", config, config)
    reader.read(talk({**user("a"), "name": "boss"}, says("b"), id=7))
    assert reader.unseen_ignored == {"absent_key", "tools.strict"}


def test_control_tokens_of_other_models_are_text_and_counted() -> None:
    encoder = encoder_of(make_tokenizer(PLAIN))
    texts = ("b<|im_end|>", "[INST] b [/INST] <s>", "b < c <br> [1] <|x", "<end_of_turn>" * 3)
    encoded = encoder.encode(
        [
            Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": text}))
            for text in texts
        ]
    )
    found = [each.foreign for each in encoded if isinstance(each, EncodedConversation)]
    assert found == [("<|im_end|>",), ("[/INST]", "[INST]"), (), ("<end_of_turn>",)]
    stats = DatasetStats(256, 16)
    for each in found:
        stats.foreign.update(each)
    (remark,) = stats.remarks()
    for name in ("<|im_end|>", "[INST]", "<end_of_turn>"):
        assert f"{name} (1 examples)" in remark

"""Claims about data as teams have it: each form that was reported from the field, with the chat
template released with the model, and what is learned of it; or the setting that its refusal names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from canvastune.config.data import DataConfig
from canvastune.preparation.sources import open_source
from canvastune.preparation.stats import CALLS, NOT_LEARNED
from tests.support.data_fixtures import (
    write_lines,
)
from tests.support.field_rows import (
    ASK,
    NAMES,
    SAY,
    Form,
    chat,
    prepare,
    refusal,
    says,
    user,
    write,
)

FORMS: dict[str, Form] = {
    "conversations with from and value": lambda name: {
        "conversations": [
            {"from": "human", "value": f"Greet {name}."},
            {"from": "gpt", "value": f"Hello {name}."},
        ]
    },
    "conversations with role and content": lambda name: {"conversations": chat(name)["messages"]},
    "messages as text": lambda name: {"messages": json.dumps(chat(name)["messages"])},
    "prompt and completion as text": lambda name: {
        "prompt": f"Greet {name}.",
        "completion": f"Hello {name}.",
    },
    "prompt and completion as lists": lambda name: {
        "prompt": [user(f"Greet {name}.")],
        "completion": [says(f"Hello {name}.")],
    },
    "text parts": lambda name: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"Greet {name}."}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"Hello {name}."}]},
        ]
    },
    "text parts of LLaMA-Factory": lambda name: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": f"Greet {name}."}]},
            {"role": "assistant", "content": [{"type": "text", "value": f"Hello {name}."}]},
        ]
    },
    "the role model": lambda name: {
        "messages": [user(f"Greet {name}."), {"role": "model", "content": f"Hello {name}."}]
    },
    "roles of Cohere": lambda name: {
        "messages": [
            {"role": "User", "content": f"Greet {name}."},
            {"role": "Chatbot", "content": f"Hello {name}."},
        ]
    },
    "empty keys of an API's answer": lambda name: chat(
        name, refusal=None, audio=None, annotations=[], tool_calls=None, function_call=None
    ),
    "a text-only row of multimodal data": lambda name: {**chat(name), "images": [], "audio": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_names_of_the_same_conversation_are_read(
    form: str, tmp_path: Path, released_model: Path
) -> None:
    found = prepare(write(tmp_path, FORMS[form]), released_model)
    assert (found.prefix, found.response, found.examples) == (ASK, SAY, len(NAMES))
    assert found.card["bad"] == 0
    assert not found.card["unused"]


def test_contents_of_gemini_are_read_by_the_name_of_their_column(
    tmp_path: Path, released_model: Path
) -> None:
    source = write(
        tmp_path,
        lambda name: {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be short."}]},
            "contents": [
                {"role": "user", "parts": [{"text": f"Greet {name}."}]},
                {"role": "model", "parts": [{"text": f"Hello {name}."}]},
            ],
        },
    )
    assert "data.columns.messages=contents" in refusal(source, released_model)
    found = prepare(source, released_model, columns={"messages": "contents"})
    assert found.prefix == ASK.replace("<bos>", "<bos><|turn>system\nBe short.<turn|>\n")
    assert found.response == SAY


def declare(name: str, **parameters: Any) -> dict[str, Any]:
    declared = {"name": name, "parameters": {"type": "object", **parameters}}
    return {"type": "function", "function": declared}


def test_declarations_with_messages_are_in_the_system_turn(
    tmp_path: Path, released_model: Path
) -> None:
    tool = declare("get_weather", properties={"city": {"type": "string"}})
    for kind, tools in (("list", [tool]), ("text", json.dumps([tool]))):
        rows = [{"tools": tools, **chat(name)} for name in NAMES]
        found = prepare(write_lines(tmp_path / f"{kind}.jsonl", rows), released_model, kind)
        system = found.prefix.partition("<turn|>")[0]
        assert system.startswith("<bos><|turn>system\n<|tool>declaration:get_weather{"), kind
        assert "city:{" in system, kind
        assert system.endswith("<tool|>"), kind
        assert found.response == SAY, kind


def calls(arguments: Any) -> Form:
    def form(name: str) -> dict[str, Any]:
        function = {"name": "greet", "arguments": arguments}
        call = {"id": "c1", "type": "function", "function": function}
        return {"messages": [user(f"Greet {name}."), says(None, tool_calls=[call])]}

    return form


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("{}", ""),
        ('{"loud": true, "to": "all"}', 'loud:true,to:<|"|>all<|"|>'),
        ({"loud": True, "to": "all"}, 'loud:true,to:<|"|>all<|"|>'),
    ],
)
def test_a_call_with_content_null_is_learned(
    arguments: Any, written: str, tmp_path: Path, released_model: Path
) -> None:
    found = prepare(write(tmp_path, calls(arguments)), released_model)
    assert found.prefix == ASK
    assert found.response == f"<|tool_call>call:greet{{{written}}}<tool_call|><|tool_response>"
    assert found.card["turns"][CALLS] == len(NAMES)


@pytest.mark.parametrize("arguments", ["all of them", json.dumps(json.dumps({"to": "all"})), [1]])
def test_arguments_that_are_no_object_are_refused_with_the_name_of_the_call(
    arguments: Any, tmp_path: Path, released_model: Path
) -> None:
    reason = refusal(write(tmp_path, calls(arguments)), released_model)
    assert "message 2" in reason
    assert "arguments of 'greet'" in reason


def test_thinking_and_calls_in_parts_of_the_content_are_learned(
    tmp_path: Path, released_model: Path
) -> None:
    """LLaMA-Factory's version 1 has them next to the text."""
    call = {"name": "greet", "arguments": {"to": "all"}}
    source = write(
        tmp_path,
        lambda name: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": f"Greet {name}."}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "All are here."},
                        {"type": "tool_call", "value": json.dumps(call)},
                        {"type": "tool_call", "value": call},
                    ],
                },
            ]
        },
    )
    found = prepare(source, released_model)
    one = '<|tool_call>call:greet{to:<|"|>all<|"|>}<tool_call|>'
    thought = "<|channel>thought\nAll are here.\n<channel|>"
    assert found.response == f"{thought}{one}{one}<|tool_response>"


@pytest.mark.parametrize("kind", ["reasoning", "tool_call"])
def test_a_part_that_only_the_model_writes_is_refused_in_a_users_turn(
    kind: str, tmp_path: Path, released_model: Path
) -> None:
    part = {"type": kind, "value": "{}"}
    rows = write(tmp_path, lambda name: {"messages": [user([part]), says(name)]})
    message = refusal(rows, released_model)
    assert re.search(rf"message 1 \(user\) .*'{kind}'", message)


SYSTEMS: dict[str, Form] = {
    "with messages": lambda name: {"system": f"You tutor {name}.", **chat(name)},
    "with prompt and response": lambda name: {
        "system": f"You tutor {name}.",
        "prompt": f"Greet {name}.",
        "response": f"Hello {name}.",
    },
    "role developer": lambda name: {
        "messages": [
            {"role": "developer", "content": f"You tutor {name}."},
            *chat(name)["messages"],
        ]
    },
}


@pytest.mark.parametrize("form", SYSTEMS)
def test_a_system_prompt_is_the_system_turn(
    form: str, tmp_path: Path, released_model: Path
) -> None:
    found = prepare(write(tmp_path, SYSTEMS[form]), released_model)
    system = "<bos><|turn>system\nYou tutor Ana1.<turn|>\n"
    assert (found.prefix, found.response) == (ASK.replace("<bos>", system), SAY)
    assert not found.card["unused"]


def test_a_second_system_turn_is_refused(tmp_path: Path, released_model: Path) -> None:
    form = SYSTEMS["role developer"]
    reason = refusal(
        write(tmp_path, lambda name: {"system": "Be kind.", **form(name)}), released_model
    )
    assert re.search(r"\bcolumn 'system'.* system turns\b", reason)
    assert "data.ignore=[system]" in reason


def sql(name: str) -> dict[str, Any]:
    return {
        "question": f"Orders of {name}?",
        "context": f"CREATE TABLE {name}_orders (id INTEGER)",
        "answer": f"SELECT COUNT(*) FROM {name}_orders",
    }


def test_a_context_is_never_left_out_of_question_and_answer(
    tmp_path: Path, released_model: Path
) -> None:
    source = write(tmp_path, sql)
    assert "data.columns.context=context" in refusal(source, released_model)
    found = prepare(source, released_model, columns={"context": "context"})
    assert sql("Ana1")["context"] in found.prefix
    assert sql("Ana1")["question"] in found.prefix
    assert found.response == f"{sql('Ana1')['answer']}<turn|>"


@pytest.mark.parametrize("column", ["hint", "schema_ddl"])
def test_auto_does_not_take_further_text_for_gsm8k(
    column: str, tmp_path: Path, released_model: Path
) -> None:
    source = write(tmp_path, lambda name: {column: "x", "question": f"{name}?", "answer": name})
    reason = refusal(source, released_model)
    assert all(
        way in reason
        for way in (
            f"data.columns.context={column}",
            f"data.ignore=[{column}]",
            "data.format=gsm8k",
        )
    )


def alpaca(name: str) -> dict[str, Any]:
    return {"instruction": "Order the words.", "input": f"{name} home goes", "output": "It goes."}


def test_the_input_of_alpaca_belongs_to_the_prompt(tmp_path: Path, released_model: Path) -> None:
    source = write(tmp_path, alpaca)
    found = prepare(source, released_model)
    assert "Order the words.\nAna1 home goes<turn|>" in found.prefix
    named = {"prompt": "instruction", "response": "output"}
    assert "data.columns.context=input" in refusal(
        source, released_model, format="columns", columns=named
    ), "a row of named columns lost its input"
    found = prepare(
        source, released_model, "named", format="columns", columns=named | {"context": "input"}
    )
    assert "Ana1 home goes" in found.prefix
    assert "Order the words." in found.prefix


@pytest.mark.parametrize(
    ("mark", "off"),
    [("weight", 0), ("loss_weight", 0.0), ("loss", False), ("train", False), ("training", False)],
)
def test_a_marked_turn_is_context_only(
    mark: str, off: Any, tmp_path: Path, released_model: Path
) -> None:
    """Of two answers the first is marked in every row, the last in every second row."""

    def form(name: str) -> dict[str, Any]:
        last = says(f"Again, {name}.", **({mark: off} if name[-1] in "246" else {mark: 1}))
        return {"messages": [*chat(name, **{mark: off})["messages"], user("Again"), last]}

    found = prepare(write(tmp_path, form), released_model, learn="all")
    left_out = sum(name[-1] in "246" for name in NAMES)
    assert found.examples == len(NAMES) - left_out
    assert found.card["dropped"] == {NOT_LEARNED: left_out}
    assert found.response == "Again, Ana1.<turn|>"
    assert "Hello Ana1." in found.prefix


@pytest.mark.parametrize("form", ["pairs", "messages"])
def test_the_history_is_turns_before_the_prompt(
    form: str, tmp_path: Path, released_model: Path
) -> None:
    def row(name: str) -> dict[str, Any]:
        earlier = (f"Greet {name}.", f"Hello {name}.")
        roles = ("user", "assistant")
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, earlier, strict=True)
        ]
        return {
            "prompt": "And now?",
            "response": f"Bye {name}.",
            "history": messages if form == "messages" else [list(earlier)],
            "images": [None],
        }

    found = prepare(write(tmp_path, row), released_model)
    turns = "\n<|turn>user\nAnd now?<turn|>\n<|turn>model\n"
    assert (found.prefix, found.response) == (f"{ASK}{SAY}{turns}", "Bye Ana1.<turn|>")


def reasoned(name: str) -> dict[str, Any]:
    return {"question": f"{name} has 3. How many?", "reasoning": "It says 3.", "answer": "#### 3"}


def test_a_column_of_reasoning_is_thinking_or_unused(tmp_path: Path, released_model: Path) -> None:
    source = write(tmp_path, reasoned)
    found = prepare(source, released_model, thinking="keep")
    assert found.response == "<|channel>thought\nIt says 3.\n<channel|>#### 3<turn|>"
    assert found.card["turns"]["learned with thinking"] == len(NAMES)
    found = prepare(source, released_model, "dropped", thinking="drop")
    assert found.response == "#### 3<turn|>"
    assert "<|think|>" not in found.prefix
    assert found.card["unused"] == {"reasoning": len(NAMES)}


@pytest.mark.parametrize("name", ["finish_reason", "messages.finish_reason"])
def test_a_key_of_a_message_is_ignored_by_name_or_as_the_card_writes_it(
    name: str, tmp_path: Path, released_model: Path
) -> None:
    source = write(tmp_path, lambda name: chat(name, finish_reason="stop"))
    counted = prepare(source, released_model).card["unused"]
    assert counted == {"messages.finish_reason": len(NAMES)}
    assert not prepare(source, released_model, "ignored", ignore=[name]).card["unused"]


ORDERS: dict[str, tuple[Form, str]] = {
    "several turns": (
        lambda name: {
            "messages": [*chat(name)["messages"], user("Again"), says(f"Hello again {name}.")]
        },
        f"{ASK}{SAY}\n<|turn>user\nAgain<turn|>\n<|turn>model\n",
    ),
    "two user turns": (
        lambda name: {"messages": [user(f"I am {name}."), *chat(name)["messages"]]},
        ASK.replace("<bos>", "<bos><|turn>user\nI am Ana1.<turn|>\n"),
    ),
    "assistant first": (
        lambda name: {"messages": [says("How can I help?"), *chat(name)["messages"]]},
        ASK.replace("<bos>", "<bos><|turn>model\nHow can I help?<turn|>\n"),
    ),
    "system and assistant": (
        lambda name: {"messages": [{"role": "system", "content": "Be kind."}, says(f"Hi {name}.")]},
        "<bos><|turn>system\nBe kind.<turn|>\n<|turn>model\n",
    ),
}


@pytest.mark.parametrize("form", ORDERS)
def test_turn_orders_are_as_inference_renders_them(
    form: str, tmp_path: Path, released_model: Path
) -> None:
    rows, prefix = ORDERS[form]
    source = write(tmp_path, rows)
    found = prepare(source, released_model)
    assert found.prefix == prefix
    assert found.card["turns"]["learned"] == len(NAMES)
    context = sum(turn["role"] == "assistant" for turn in rows("")["messages"]) - 1
    assert found.card["turns"].get("context", 0) == context * len(NAMES)


@pytest.mark.parametrize("wrap", ["columns", "wrapped"])
def test_an_object_of_columns_or_of_rows_is_read(
    wrap: str, tmp_path: Path, released_model: Path
) -> None:
    rows = [{"prompt": f"Greet {name}.", "response": f"Hello {name}."} for name in NAMES]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(columns if wrap == "columns" else {"data": rows}))
    found = prepare(file, released_model)
    assert (found.prefix, found.response, found.examples) == (ASK, SAY, len(NAMES))


def test_a_single_row_is_not_taken_for_a_table_of_its_tools(
    tmp_path: Path, released_model: Path
) -> None:
    file = tmp_path / "row.json"
    file.write_text(json.dumps({"tools": [declare("f")], **chat("Ana1")}))
    assert "[{...}]" in refusal(file, released_model)


def test_nested_types_of_parquet_are_messages(tmp_path: Path, released_model: Path) -> None:
    rows = [chat(name)["messages"] for name in NAMES]
    turn_map = pa.list_(pa.map_(pa.string(), pa.string()))
    maps = pa.array([[list(turn.items()) for turn in turns] for turns in rows], turn_map)
    nulls = pa.array([{**chat(name), "images": None, "tools": None} for name in NAMES])
    lists = pa.array([{key: [turn[key] for turn in turns] for key in turns[0]} for turns in rows])
    for name, table in {
        "maps": pa.table({"messages": maps}),
        "nulls": pa.Table.from_struct_array(nulls),
        "lists": pa.table({"messages": lists}),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(table, folder / "rows.parquet")
        found = prepare(folder / "rows.parquet", released_model)
        assert (found.prefix, found.response) == (ASK, SAY), name
        assert not found.card["unused"], name


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path, released_model: Path) -> None:
    datasets.Dataset.from_list([chat(name) for name in NAMES]).save_to_disk(tmp_path / "saved")
    found = prepare(tmp_path / "saved", released_model)
    assert (found.prefix, found.response, found.examples) == (ASK, SAY, len(NAMES))


def test_a_folder_with_an_index_says_which_file_to_name(
    tmp_path: Path, released_model: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, chat).rename(folder / "my_chat.jsonl")
    index = {"mine": {"file_name": "my_chat.jsonl", "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(index))
    assert f"data.source={folder / 'my_chat.jsonl'}" in refusal(folder, released_model)


def test_answers_that_the_default_pattern_does_not_match_are_prepared(
    tmp_path: Path, released_model: Path
) -> None:
    """The default is GSM8K's `#### n`; other data has everything but exact match."""
    source = write(tmp_path, lambda name: {"messages": [user(f"{name}?"), says(f"{name} has 2.")]})
    assert prepare(source, released_model).examples == len(NAMES)


def test_messages_that_datasets_stores_as_json_text_are_messages(tmp_path: Path) -> None:
    """`load_dataset("json")` gives messages with different keys the type Json, which is JSON text
    to every other reader of the Parquet or Arrow file.
    """
    arguments = ({"city": "Bonn"}, {"day": 1, "note": None})
    made = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    rows = [{"messages": [user("x"), says(None, tool_calls=[call])]} for call in made]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    table = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache")
    )
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for kind in ("rows.jsonl", "rows.parquet", "saved"):
        found = [row.value for row in open_source(DataConfig(source=str(tmp_path / kind))).rows()]
        assert json.dumps(found) == json.dumps(rows), kind

"""Held-out rows are asked as they were prepared, whatever their place in the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from canvastune.config import parse_config
from canvastune.evaluation.generation import response_ends, select_questions
from canvastune.evaluation.scoring import answer_part, find_reference, is_correct
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.tokenizer import load_transformers_tokenizer
from canvastune.tiny_model import write_problems
from tests.support.evaluation import recipe


def test_prompt_is_what_the_chat_template_gives(prepared: Path, tiny_model: Path) -> None:
    tokenizer: Any = load_transformers_tokenizer(tiny_model)
    questions = select_questions(prepared, tokenizer, 6)
    rows: Any = load_from_disk(str(prepared / "validation"))
    histories = {row["id"]: json.loads(row["prompt"]) for row in rows}
    assert len(questions) == 6
    for question in questions:
        rendered = tokenizer.apply_chat_template(
            histories[question.id], add_generation_prompt=True, return_dict=True
        )
        assert question.tokens == rendered["input_ids"]
        assert question.opening == ""


def test_rows_with_tools_are_asked_with_their_tools(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "tools.jsonl"
    write_problems(rows, "tools", 60, seed=0)
    tree = recipe(rows).model_dump(mode="json")
    tree["data"] |= {"seq_length": 512, "learn": "all"}
    tree["evaluate"]["answer_pattern"] = r"call:(count\{.*\})<tool_call"
    config, out = parse_config(tree), tmp_path / "data"
    prepare_data(config, tiny_model, out)
    tokenizer: Any = load_transformers_tokenizer(tiny_model)
    questions = select_questions(out, tokenizer, 1000)
    assert len({question.id for question in questions}) == len(questions)
    conversations = [json.loads(line) for line in rows.open()]
    rendered = {
        tuple(
            tokenizer.apply_chat_template(
                row["messages"][:length],
                tools=row["tools"],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        ): row["messages"][length]
        for row in conversations
        for length in (1, 3)
    }
    calls = [question for question in questions if "tool_calls" in rendered[tuple(question.tokens)]]
    assert 0 < len(calls) < len(questions)
    pattern = re.compile(config.evaluate.answer_pattern or "")
    for question in calls:
        assert "How many" in question.text, "the prompt is not shown as text"
        assert question.reference.startswith("<|tool_call>call:count{")
        assert find_reference(pattern, question.reference) is not None
        assert is_correct(
            pattern,
            answer_part(f"<|channel>thought\nno\n<channel|>{question.reference}"),
            find_reference(pattern, question.reference),  # type: ignore[arg-type]
        ) == (True, True)
    others = [question for question in questions if question not in calls]
    assert all("(call) count(" in question.text for question in others)
    ends = [tokenizer.decode([token]) for token in response_ends(out)]
    assert sorted(ends) == ["<turn|>", "<|tool_response>"]


def test_generation_stops_where_the_prepared_responses_end(
    prepared: Path, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer: Any = load_transformers_tokenizer(tiny_model)
    end = tokenizer.convert_tokens_to_ids("<turn|>")
    assert response_ends(prepared) == [end]
    rows: Any = load_from_disk(str(prepared / "validation"))
    calls, cut = rows[0]["id"], rows[1]["id"]

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == calls:  # it ends with the marker that hands over to a tool
            return {"input_ids": [*row["input_ids"][:-1], 50]}
        return {"input_ids": row["input_ids"][:-1], "complete": False} if row["id"] == cut else row

    rows.map(change).save_to_disk(str(tmp_path / "validation"))
    assert response_ends(tmp_path) == sorted([50, end])


def test_rows_are_chosen_by_content_and_not_by_their_place(
    prepared: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows: Any = load_from_disk(str(prepared / "validation"))
    backwards: Dataset = rows.select(range(len(rows) - 1, -1, -1))
    backwards.save_to_disk(str(tmp_path / "validation"))
    tokenizer = load_transformers_tokenizer(tiny_model)
    assert select_questions(prepared, tokenizer, 5) == select_questions(tmp_path, tokenizer, 5)


def test_every_turn_of_a_conversation_is_as_likely_to_be_asked(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "tools.jsonl"
    write_problems(rows, "tools", 400, seed=0)
    tree = recipe(rows).model_dump(mode="json")
    tree["data"] |= {"seq_length": 512, "learn": "all", "validation_fraction": 0.3}
    prepare_data(parse_config(tree), tiny_model, tmp_path / "data")
    held_out: Any = load_from_disk(str(tmp_path / "data" / "validation"))
    turns = {row["id"]: int(row["origin"].split("#")[1]) for row in held_out}
    first_turn = min(turns.values())
    share = list(turns.values()).count(first_turn) / len(turns)
    questions = select_questions(tmp_path / "data", load_transformers_tokenizer(tiny_model), 80)
    chosen = [turns[question.id] for question in questions]
    spread = (share * (1 - share) / len(chosen)) ** 0.5
    assert len(held_out) > 2 * len(chosen)
    assert abs(chosen.count(first_turn) / len(chosen) - share) < 4 * spread, (
        f"{chosen.count(first_turn)} of {len(chosen)} questions are first turns, of which the data "
        f"have {share:.0%}"
    )

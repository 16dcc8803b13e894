"""The rows of `make demo-support`: prose and calls, of which every one can be learned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import load_config
from canvastune.preparation import prepare_data
from canvastune.preparation.stats import CALLS
from pipelines.demo import RECIPES, SUPPORT_BASE
from pipelines.support_desk import ROWS, TOOL_ROWS, write_support_rows
from tools.other_shops import write_other_shops


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "support.jsonl"
    write_support_rows(path)
    return path


@pytest.fixture(scope="module")
def rows(file: Path) -> list[dict[str, Any]]:
    return _read(file)


def test_rows_are_three_hundred_different_questions(
    rows: list[dict[str, Any]], file: Path, tmp_path: Path
) -> None:
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) == ROWS == 300
    assert sum("tools" in row for row in rows) == TOOL_ROWS == 20
    write_support_rows(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


def test_rows_with_a_tool_look_up_what_is_asked_and_say_what_was_found(
    rows: list[dict[str, Any]],
) -> None:
    for row in (row for row in rows if "tools" in row):
        asked, call, response, answer = row["messages"]
        function = call["tool_calls"][0]["function"]
        assert function["name"] == row["tools"][0]["function"]["name"] == "find_order"
        assert function["arguments"]["id"] in asked["content"]
        assert response["content"] in answer["content"]


def test_every_row_can_be_learned_and_every_held_out_one_is_evaluated(
    file: Path, tmp_path: Path
) -> None:
    config = load_config(RECIPES / "tiny_support.yaml", [f"data.source={file}"])
    card = prepare_data(config, SUPPORT_BASE, tmp_path / "prepared")
    assert (card["bad"], card["cut"], card["dropped"], card["unused"]) == (0, 0, {}, {})
    assert card["turns"] == {"learned": ROWS + TOOL_ROWS, CALLS: TOOL_ROWS}
    assert card["near_duplicates"]["found"] == 0
    assert card["validation"] == config.evaluate.rows
    assert card["response_tokens"]["max"] <= config.evaluate.max_new_tokens


def test_the_base_has_seen_no_answer_of_the_desk(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_other_shops(tmp_path / "others.jsonl", rows=2000)
    others = " ".join(_answers(_read(tmp_path / "others.jsonl")))
    known = Counter(
        sentence in others for answer in _answers(rows) for sentence in answer.split(". ")[1:]
    )
    assert known.keys() == {False}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _answers(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]

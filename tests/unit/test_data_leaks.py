"""Rows that begin alike: no turn is learned twice, or held out and learned, and the counts agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from canvastune.errors import UserError
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.stats import DUPLICATE, REPEATED
from tests.support.data_fixtures import (
    TOOL_SPECIAL,
    make_model,
    released_template,
    run_config,
    write_lines,
)
from tests.unit.test_tools_and_thinking import call, result, says, user


def prepare(tmp_path: Path, rows: list[Any], **data: Any) -> dict[str, Any]:
    source = write_lines(tmp_path / "rows.jsonl", rows)
    model = make_model(tmp_path / "model", released_template(), TOOL_SPECIAL)
    card = prepare_data(run_config(source, **data), model, tmp_path / "out", 1)
    assert card["examples"] == card["kept"] + sum(card["dropped"].values())
    return card


def learned(folder: Path) -> list[tuple[str, str]]:
    data: Any = datasets.load_from_disk(str(folder))
    return [(row["prompt"], row["answer"]) for row in data]


def test_a_turn_of_two_rows_is_learned_once_and_on_one_side(tmp_path: Path) -> None:
    rows = []
    for n in range(40):
        turns = [user(f"q{n}"), says(f"a{n}")]
        rows += [{"messages": turns}, {"messages": [*turns, user("more"), says(f"b{n}")]}]
    card = prepare(tmp_path, rows, learn="all")
    train, validation = (learned(tmp_path / "out" / name) for name in ("train", "validation"))
    assert len({*train, *validation}) == len(train) + len(validation) == card["kept"] == 80
    assert card["dropped"] == {REPEATED: 40}
    assert card["turns"] == {"learned": 80}


def test_the_ids_of_calls_make_no_other_row(tmp_path: Path) -> None:
    rows = []
    for n in range(40):
        asked = call("f")
        asked["tool_calls"][0] |= {"id": f"random-{n}"}
        answer = result("f", "F") | {"tool_call_id": f"random-{n}"}
        rows.append({"messages": [user(f"q{n % 20}"), asked, answer, says("ok")]})
    card = prepare(tmp_path, rows, max_duplicate_fraction=1.0)
    assert card["dropped"] == {DUPLICATE: 20}


def test_dropped_examples_are_not_counted_as_learned(tmp_path: Path) -> None:
    rows = [{"messages": [user(f"q{n}"), says("a"), user("b" * 300), says("c")]} for n in range(40)]
    card = prepare(tmp_path, rows, learn="all", max_too_long_fraction=0.5)
    assert card["turns"] == {"learned": 40}


def test_a_share_of_bad_examples_is_at_most_all_of_them(tmp_path: Path) -> None:
    rows = [{"messages": [user(f"<bos>{n}"), says("a"), user("b"), says("c")]} for n in range(8)]
    with pytest.raises(UserError, match=r"16 of 16 examples .*100\.0%"):
        prepare(tmp_path, rows, learn="all")


def test_where_all_rows_are_marked_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        prepare(tmp_path, [{"messages": [user(f"q{n}"), says("a", weight=0)]} for n in range(8)])
    assert "data.ignore" in str(refused.value.hint)


def test_the_form_is_that_of_the_columns_with_values(tmp_path: Path) -> None:
    turns = [[user(f"q{n}"), says("a")] for n in range(40)]
    rows = [{"messages": None, "conversations": each} for each in turns]
    assert prepare(tmp_path, rows)["format"] == "sharegpt"

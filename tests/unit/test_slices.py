"""Figures by the values of a column: what preparation keeps of it, and what evaluation makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from canvastune.config import RunConfig
from canvastune.data.row_columns import NO_VALUE, read_columns
from canvastune.errors import UserError
from canvastune.evaluation.figures import slices
from canvastune.evaluation.result import EvaluationResult
from canvastune.preparation.prepare import prepare_data
from pipelines.cli import main
from tests.support.data_fixtures import make_model, problems, run_config, write_lines
from tests.unit.test_evaluate_again import finished, pretend  # noqa: F401  a run, as a fixture
from tests.unit.test_judges import row


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {**pair, **{name: values[at % len(values)] for name, values in columns.items()}}
        for at, pair in enumerate(problems(count))
    ]


def prepare(tmp_path: Path, lines: list[Any], *names: str, **data: Any) -> dict[str, Any]:
    source = write_lines(tmp_path / "rows.jsonl", lines)
    tree = run_config(source, validation_fraction=0.4, **data).model_dump(mode="json")
    config = RunConfig(**{**tree, "evaluate": {"slices": list(names)}})
    return prepare_data(config, make_model(tmp_path / "model"), tmp_path / "out")


def test_values_of_held_out_rows_are_kept_and_training_does_not_see_them(tmp_path: Path) -> None:
    lines = rows(40, topic=["a", "b", None], level=[1, 2.5, True, "x " * 50])
    card = prepare(tmp_path, lines, "topic", "level")
    assert card["unused"] == {}, "a column that is used is called unused"
    found = read_columns(tmp_path / "out" / "validation", ["level", "topic"])
    split: Any = load_from_disk(str(tmp_path / "out" / "validation"))
    assert found.keys() == set(split["id"])
    for id, origin in zip(split["id"], split["origin"], strict=True):
        given = lines[int(origin.rpartition(":")[2]) - 1]
        assert found[id]["topic"] == (given["topic"] or NO_VALUE)
        if not isinstance(given["level"], str):
            assert found[id]["level"] == json.dumps(given["level"])
        else:
            assert len(found[id]["level"]) == 60
    (tmp_path / "plain").mkdir()
    plain = prepare(tmp_path / "plain", problems(40))
    assert plain["content_hash"] == card["content_hash"], "the columns change what is trained"


def test_a_column_that_no_row_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.slices: .*'topik'") as error:
        prepare(tmp_path, rows(40, topic=[1]), "topik")
    assert "answer, question, topic" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_a_list_is_refused_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluate\.slices: .*rows\.jsonl: row \d+: .*'tags'.* list"
    ):
        prepare(tmp_path, rows(40, tags=[["a", "b"]]), "tags")


def test_data_prepared_without_the_column_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, rows(40, topic=["a", "b"]), "topic")
    with pytest.raises(UserError, match=r"columns\.json: "):
        read_columns(tmp_path / "out" / "validation", ["other"])
    with pytest.raises(UserError, match=r"evaluate\.slices"):
        read_columns(tmp_path / "out" / "train", ["topic"])


def test_figures_of_each_value_and_common_ones_of_the_rare() -> None:
    values = ["a"] * 4 + ["b"] * 3 + [f"rare {n}" for n in range(30)]
    judged = [
        row([0], [float(name == "a")], columns={"topic": name, "same": "1"}) for name in values
    ]
    found = {each.name: each for each in slices(judged, canvas=16)}
    assert {each.by for each in found.values()} == {"column"}, "a column of one value has no slices"
    assert (found["topic=a"].rows, found["topic=a"].score_after) == (4, 1)
    assert (found["topic=b"].rows, found["topic=b"].score_after) == (3, 0)
    assert found["topic=12 other values"].rows == 12
    assert len(found) == 21
    assert sum(each.rows for each in found.values()) == len(values)


def test_a_finished_run_gets_figures_by_column_without_a_model(
    finished: Path,  # noqa: F811
    problems: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    before = problems.read_text()
    for number, line in enumerate(lines):
        line["topic"] = "even" if number % 2 == 0 else "odd"
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        asked = pretend(monkeypatch)
        assert main(["evaluate", str(finished), "--set", "evaluate.slices=topic"]) == 0
    finally:
        problems.write_text(before)
    assert not asked, "a model has to answer again"
    result = EvaluationResult.read(finished / "evaluation-2")
    found = {each.name: each.rows for each in result.slices if each.by == "column"}
    assert found.keys() <= {"topic=even", "topic=odd"}
    assert sum(found.values()) == result.rows
    assert "column/topic_odd/score_after" in result.figures()
    answers = (finished / "evaluation-2" / "answers.jsonl").read_text().splitlines()
    assert all(json.loads(line)["columns"]["topic"] in ("even", "odd") for line in answers)
    again = finished / "evaluation-3"
    assert main(["evaluate", str(finished), "--output", str(again)]) == 0
    assert not EvaluationResult.read(again).slices

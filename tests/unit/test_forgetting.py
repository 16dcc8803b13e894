"""A second set of held-out rows: prepared, answered, judged and shown, and apart from the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from canvastune.config import RunConfig
from canvastune.data.files import missing_files
from canvastune.errors import UserError
from canvastune.evaluation.again import judge_again
from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.run import evaluate
from canvastune.preparation.prepare import prepare_data
from canvastune.report.summary import find_warnings
from canvastune.tiny_model import write_problems
from components.resolve.step import data_fingerprint
from pipelines.submit import refuse_local_paths
from tests.support.evaluation import pretend, recipe


@pytest.fixture
def other(tmp_path: Path) -> Path:
    write_problems(tmp_path / "other.jsonl", "compare", 40, 0)
    return tmp_path / "other.jsonl"


def config_of(problems: Path, other: Path, **evaluation: Any) -> RunConfig:
    return recipe(problems, forgetting={"source": str(other), "rows": 12}, **evaluation)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_tuned_model_that_forgets_is_found_and_the_verdict_stays(
    problems: Path,
    prepared: Path,
    other: Path,
    tiny_model: Path,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, data = config_of(problems, other), tmp_path / "data"
    prepare_data(config, tiny_model, data)
    assert missing_files(data) == []
    plain: Any = load_from_disk(str(prepared / "train"))
    with_others: Any = load_from_disk(str(data / "train"))
    assert plain["id"] == with_others["id"], "the second set changes what is trained"

    def answer(question: Any, model: str) -> str:
        knows = "base" if question.source == str(other) else "tuned"
        return question.reference if model == knows else "#### 1000"

    asked = pretend(monkeypatch, answer)
    result = evaluate(config, data, *models, tmp_path / "out")
    assert sum("denoises" not in each for each in asked) == 2 * (6 + 12)
    found = result.forgetting
    assert found is not None
    assert (found.name, found.rows, found.scored, found.judges) == (
        str(other),
        12,
        12,
        ("pattern",),
    )
    assert (found.score_before, found.score_after, found.verdict) == (1, 0, "worse")
    assert (result.verdict, result.rows, result.after.score) == ("better", 6, 1)
    assert (result.before.tokens, result.after.cut) == (60, 6), "other rows are in these figures"
    assert any(
        name.startswith("forgetting/") and name.endswith("other.jsonl/score_after")
        for name in result.figures()
    )
    answered = lines(tmp_path / "out" / "forgetting.jsonl")
    assert [line["score_before"] for line in answered] == [1] * 12
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 6
    assert EvaluationResult.read(tmp_path / "out") == result
    warned = find_warnings(config, [], evaluation=result, merge=None, card={})
    said = [line for line in warned if "other.jsonl" in line]
    assert len(said) == 1
    assert "0.0%" in said[0]
    assert "100.0%" in said[0]

    judged = config_of(problems, other, judge="chrf")
    again = judge_again(judged, tmp_path / "out", tmp_path / "again", 16)
    assert again.forgetting is not None
    assert again.forgetting.judges == ("chrf",)
    assert 0 < (again.forgetting.score_after or 0) < 1
    assert len(lines(tmp_path / "again" / "forgetting.jsonl")) == 12

    alone = evaluate(recipe(problems), prepared, *models, tmp_path / "alone")
    with_it, without = result.to_json(), alone.to_json()
    assert set(with_it) - set(without) == {"forgetting"}
    assert {name: with_it[name] for name in without} == without


def test_the_rows_are_read_as_the_data_are_and_none_that_fits_is_refused(
    problems: Path, other: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(problems, other)
    empty = tmp_path / "none.jsonl"
    empty.write_text('{"question": "' + "x" * 400 + '", "answer": "a"}\n')
    with pytest.raises(UserError, match=r"none\.jsonl: .* 1 rows\b"):
        prepare_data(config_of(problems, empty), tiny_model, tmp_path / "a")
    empty.write_text('{"question": "q", "answer": ""}\n')
    with pytest.raises(UserError, match=r"none\.jsonl: .*data\.max_bad_row_fraction"):
        prepare_data(config_of(problems, empty), tiny_model, tmp_path / "b")
    with pytest.raises(UserError, match=r"evaluate\.forgetting: .*nowhere\.jsonl"):
        prepare_data(config_of(problems, tmp_path / "nowhere.jsonl"), tiny_model, tmp_path / "c")
    with pytest.raises(UserError, match=r"evaluate\.forgetting: .*other\.jsonl"):
        refuse_local_paths(
            config.model_copy(update={"data": config.data.model_copy(update={"source": "a/b"})})
        )
    before = data_fingerprint(config)
    other.write_text(other.read_text() + '{"question": "q", "answer": "#### 1"}\n')
    assert data_fingerprint(config) != before, "changed rows are taken from the cache"


def test_judges_can_be_named_for_its_source(problems: Path, other: Path) -> None:
    config = config_of(problems, other, judges={str(other): "text"})
    assert config.evaluate.judges == {str(other): ("text",)}
    with pytest.raises(UserError, match=r"evaluate\.judges"):
        recipe(problems, judges={str(other): "text"})

"""The step: figures are those of the answers, and what cannot be evaluated is refused."""

from __future__ import annotations

import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk

from canvastune.checkpoint.hf_format import CheckpointReader, CheckpointWriter
from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.hub import SIDE_FILES, copy_files
from canvastune.errors import UserError
from canvastune.evaluate import build_parser
from canvastune.evaluation import model_run, ranks
from canvastune.evaluation.generation import select_questions
from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.run import evaluate
from canvastune.evaluation.scoring import (
    mcnemar,
    wilson,
)
from canvastune.preparation.tokenizer import load_transformers_tokenizer
from tests.support.evaluation import pretend, recipe

KEYS = [  # of evaluation.json, which other programs read
    *("rows", "scored"),
    *("correct_before", "exact_match_before", "exact_match_before_low", "exact_match_before_high"),
    *("correct_after", "exact_match_after", "exact_match_after_low", "exact_match_after_high"),
    *("gained", "lost", "p_value", "verdict"),
    *("correct_normalized_before", "exact_match_normalized_before"),
    *("exact_match_normalized_before_low", "exact_match_normalized_before_high"),
    *("correct_normalized_after", "exact_match_normalized_after"),
    *("exact_match_normalized_after_low", "exact_match_normalized_after_high"),
    *("gained_normalized", "lost_normalized"),
    *(
        "tokens_before",
        "seconds_before",
        "tokens_per_second_before",
        "tokens_per_forward_before",
        "validation_loss_before",
    ),
    *(f"validation_loss_before_t{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9)),
    *(
        "tokens_after",
        "seconds_after",
        "tokens_per_second_after",
        "tokens_per_forward_after",
        "validation_loss_after",
    ),
    *(f"validation_loss_after_t{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9)),
    *(
        "validation_rows",
        "answer_pattern",
        "asked",
        "batch_size",
        "max_new_tokens",
        "max_denoising_steps",
        "seed",
        "device",
        "cut_before",
        "cut_after",
        "base_reused",
        "sampler",
    ),
    *("score_before", "score_before_low", "score_before_high", "score_before_by_seed"),
    *("score_after", "score_after_low", "score_after_high", "score_after_by_seed"),
    *("measure", "judges", "repeats", "slices"),
]


@pytest.fixture(scope="module")
def evaluated(
    problems: Path, prepared: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "evaluation"
    evaluate(recipe(problems), prepared, tiny_model, tiny_model, out)
    return out


def test_chance_is_the_same_before_and_after(evaluated: Path) -> None:
    answers = [json.loads(line) for line in (evaluated / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert all(answer["before"] == answer["after"] for answer in answers), (
        "one model gave two answers: the draws differ"
    )
    assert len({answer["before"] for answer in answers}) > 1


def test_every_answer_is_listed_with_its_question_and_reference(
    evaluated: Path, prepared: Path
) -> None:
    answers = [json.loads(line) for line in (evaluated / "answers.jsonl").read_text().splitlines()]
    rows: Any = load_from_disk(str(prepared / "validation"))
    held_out = {row["id"]: row for row in rows}
    for answer in answers:
        row = held_out[answer["id"]]
        assert answer["prompt"] == json.loads(row["prompt"])[-1]["content"]
        assert answer["reference"] == row["answer"]
        assert answer["origin"] == row["origin"]
        assert answer.keys() == {
            "id",
            "source",
            "origin",
            "prompt",
            "reference",
            "reference_tokens",
            "before",
            "after",
            "correct_before",
            "correct_after",
            "correct_normalized_before",
            "correct_normalized_after",
            "judge",
            "score_before",
            "score_after",
        }
    result = json.loads((evaluated / "evaluation.json").read_text())
    assert (result["rows"], result["scored"]) == (6, 6)
    for side in ("before", "after"):
        assert result[f"correct_{side}"] == sum(answer[f"correct_{side}"] for answer in answers)
        assert 0 < result[f"tokens_{side}"] <= 6 * 16
        assert result[f"tokens_per_second_{side}"] == pytest.approx(
            result[f"tokens_{side}"] / result[f"seconds_{side}"]
        )
        assert 0 < result[f"tokens_per_forward_{side}"] <= 16
    written = {"evaluation.json", "answers.jsonl", "film.json", "config.yaml", "provenance.json"}
    assert {file.name for file in evaluated.iterdir()} == written


def test_one_model_has_one_loss_and_one_trace(evaluated: Path) -> None:
    result, film = (
        json.loads((evaluated / name).read_text()) for name in ("evaluation.json", "film.json")
    )
    losses = {
        name.removeprefix("validation_loss_before"): loss
        for name, loss in result.items()
        if name.startswith("validation_loss_before")
    }
    assert set(losses) == {"", "_t0.1", "_t0.3", "_t0.5", "_t0.7", "_t0.9"}
    assert losses == {name: result[f"validation_loss_after{name}"] for name in losses}
    lines = (evaluated / "answers.jsonl").read_text().splitlines()
    shown = next(row for row in map(json.loads, lines) if row["id"] == film["id"])
    assert (shown["prompt"], shown["reference"]) == (film["prompt"], film["reference"])
    assert film["before"] == film["after"]
    assert film["before"]


def test_counts_are_those_of_the_answers(
    prepared: Path,
    models: tuple[Path, Path],
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five right after; two before, one of which is lost."""
    questions = select_questions(prepared, load_transformers_tokenizer(models[0]), 6)
    right = [question.reference for question in questions]
    number = right[2].rpartition("#### ")[2]
    said = {
        "base": [right[0], right[1], f"#### ${number}.00", "", right[4] + "\n#### 999", "999"],
        "tuned": [right[0], "#### 999", right[2], right[3], right[4], right[5]],
    }
    pretend(monkeypatch, lambda question, model: said[model][questions.index(question)])
    result = evaluate(recipe(problems, batch_size=2), prepared, *models, tmp_path / "out")
    before, after = result.before, result.after
    assert (before.correct, after.correct, result.scored) == (2, 5, 6)
    assert (before.exact_match, after.exact_match) == (2 / 6, 5 / 6)
    assert (before.correct_normalized, after.correct_normalized) == (3, 5)
    assert (result.gained_normalized, result.lost_normalized) == (3, 1)
    for model in (before, after):
        assert model.correct is not None
        assert model.correct_normalized is not None
        assert model.exact_match_normalized == model.correct_normalized / 6
        assert (model.exact_match_low, model.exact_match_high) == wilson(model.correct / 6, 6)
        normalized = (model.exact_match_normalized_low, model.exact_match_normalized_high)
        assert normalized == wilson(model.correct_normalized / 6, 6)
    assert (result.gained, result.lost, result.p_value, result.verdict) == (
        4,
        1,
        mcnemar(4, 1),
        "undecided",
    )
    assert (before.tokens, before.seconds, before.tokens_per_second) == (60, 1.5, 40)
    assert (before.cut, after.cut, result.base_reused) == (0, 6, 0)
    assert after.tokens_per_forward == 2.5
    assert before.validation_loss == 3
    assert (before.validation_loss_by_level["0.1"], after.validation_loss_by_level["0.9"]) == (
        1,
        2.5,
    )
    figures = result.figures()
    assert figures["p_value"] == result.p_value
    assert not {"seed", "batch_size", "verdict", "answer_pattern"} & figures.keys(), (
        "a setting is logged as a figure"
    )
    assert EvaluationResult.read(tmp_path / "out") == result
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())) == KEYS


def test_rows_whose_reference_has_no_answer_are_not_scored(
    prepared: Path,
    models: tuple[Path, Path],
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: Any = load_from_disk(str(prepared / "validation"))
    unanswerable = min(rows["id"])
    rows.map(
        lambda row: {"answer": "I do not know" if row["id"] == unanswerable else row["answer"]}
    ).save_to_disk(str(tmp_path / "validation"))
    pretend(monkeypatch, lambda question, _: "I do not know")
    result = evaluate(recipe(problems), tmp_path, *models, tmp_path / "out")
    assert (result.rows, result.scored, result.after.correct) == (6, 5, 0)
    first = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert (first["id"], first["correct_before"], first["correct_after"]) == (
        unanswerable,
        None,
        None,
    )


def test_the_examples_of_the_help_are_valid_commands() -> None:
    examples = [
        line.split()
        for line in str(build_parser().epilog).replace("\\\n", " ").splitlines()
        if line.startswith("  python -m canvastune.evaluate ")
    ]
    assert examples
    for example in examples:
        assert (
            Path(__file__).parents[2] / build_parser().parse_args(example[3:]).config
        ).is_file(), example


def test_one_model_at_a_time_is_in_memory(
    prepared: Path,
    problems: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[weakref.ref] = []

    def load(checkpoint: Path, device: torch.device) -> Any:
        assert not any(model() for model in loaded), (
            "the base is still there when the tuned model is loaded"
        )
        model = load_stock(checkpoint, device)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ranks, "load_stock", load)
    evaluate(recipe(problems, rows=2), prepared, tiny_model, tiny_model, tmp_path / "out")
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"answer_pattern": "is exactly (never)", "judge": "pattern"},
            r"evaluate\.answer_pattern\b.* 6 references",
        ),
        ({"answer_pattern": None, "judge": "pattern"}, r"evaluate\.answer_pattern is null"),
        ({"judge": []}, r"evaluate\.judge is \[\]"),
        (
            {"judge": ["json", "tool_call"]},
            r"evaluate\.judge \(json, tool_call\) .* 6 rows",
        ),
    ],
)
def test_without_a_scored_row_everything_but_the_score_is_reported(
    prepared: Path,
    models: tuple[Path, Path],
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    reason: str,
) -> None:
    pretend(monkeypatch, lambda question, _: question.reference)
    result = evaluate(recipe(problems, **settings), prepared, *models, tmp_path / "out")
    assert (result.rows, result.scored) == (6, 0)
    assert re.fullmatch(reason, result.unscored_reason or "")
    assert (result.before.validation_loss, result.after.validation_loss) == (3, 1.5)
    assert f"scored: {result.unscored_reason}" in capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(written) == KEYS
    unknown = {name for name, value in written.items() if value is None} - {"answer_pattern"}
    assert unknown == {
        name
        for name in KEYS
        if re.match("correct|exact|gained|lost|p_|ver|score_", name) and "by_seed" not in name
    }
    assert not any(name.startswith(("exact", "correct")) for name in result.figures())
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    assert all(answer["before"] for answer in answers)
    assert {answer["correct_normalized_after"] for answer in answers} == {None}
    assert EvaluationResult.read(tmp_path / "out") == result


def test_a_loss_that_is_not_finite_is_null(
    prepared: Path,
    models: tuple[Path, Path],
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, lambda question, _: question.reference)
    denoised = model_run.denoising_loss
    monkeypatch.setattr(
        model_run,
        "denoising_loss",
        lambda *_: denoised(*_) | {"sums": [math.nan, 1.0, 1.0, 1.0, 1.0]},
    )
    result = evaluate(recipe(problems), prepared, *models, tmp_path / "out")
    text = (tmp_path / "out" / "evaluation.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert result.after.validation_loss is found["validation_loss_after"] is None
    assert found["validation_loss_after_t0.3"] is not None
    assert all(math.isfinite(value) for value in result.figures().values())


def test_a_result_of_an_earlier_version_has_no_normalized_figure(evaluated: Path) -> None:
    written = json.loads((evaluated / "evaluation.json").read_text())
    later: tuple[str, ...] = (
        "normalized",
        "cut_",
        "base_reused",
        "sampler",
        "score_",
        "judges",
        "measure",
    )
    later += ("repeats", "slices")
    old = {name: value for name, value in written.items() if not any(x in name for x in later)}
    result = EvaluationResult.from_json(old)
    assert result.after.exact_match == written["exact_match_after"]
    assert result.after.exact_match_normalized is None
    assert (result.after.cut, result.base_reused, result.sampler) == (None, None, None)
    assert result.after.score == result.after.exact_match
    assert result.after.score_low == result.after.exact_match_low
    assert (result.measure, result.repeats, result.slices) == ("exact match", 1, ())
    assert "exact_match_normalized_after" not in result.figures()


def test_some_answers_are_logged_at_the_end(
    prepared: Path,
    tiny_model: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate(recipe(problems, rows=2), prepared, tiny_model, tiny_model, tmp_path / "out")
    logged = capsys.readouterr().err
    for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        assert repr(answer["prompt"]) in logged, "no question is logged"
        assert f"after {answer['after']!r}"[:90] in logged, "no answer is logged"


def test_folder_that_is_no_prepared_data_set_is_refused(
    tiny_model: Path, problems: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nothing.*validation"):
        evaluate(recipe(problems), tmp_path / "nothing", tiny_model, tiny_model, tmp_path / "out")


def test_checkpoint_that_lacks_a_value_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    lost = "model.decoder.layers.1.mlp.up_proj.weight"
    whole = CheckpointReader(tiny_model)
    copy_files(tiny_model, tmp_path, SIDE_FILES)
    with CheckpointWriter(
        tmp_path, {name: spec for name, spec in whole.specs().items() if name != lost}
    ) as writer:
        for name in set(whole.names()) - {lost}:
            writer.write(name, whole.get(name))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj") as error:
        load_stock(tmp_path, torch.device("cpu"))
    assert str(tmp_path) in str(error.value)

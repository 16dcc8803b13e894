"""A finished run is judged again, answered again, or asked with other settings of its sampler."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.config import RunConfig
from canvastune.evaluation import model_run, ranks
from canvastune.evaluation.generation import Answering, Question
from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.run import evaluate
from canvastune.evaluation.sweep import (
    SweepPoint,
    draw_sweep,
    read_sweep,
    settings_to_try,
    sweep_table,
)
from components.run_directory import RunRecord, write_record
from pipelines.cli import main
from tests.support.evaluation import recipe


@pytest.fixture
def finished(
    prepared: Path,
    problems: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Write a finished run whose tuned model answers rightly, but for the first row."""
    folder = tmp_path / "runs" / "done"
    tree = recipe(problems).model_dump(mode="json") | {"model": {"id": str(tiny_model)}}
    config = RunConfig(**tree)
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    shutil.copytree(prepared, folder / "data", ignore=lambda *_: ["train", "validation"])
    (folder / "model").symlink_to(tiny_model)
    write_record(folder, RunRecord("job", config.model_dump_json(), "", finished=True))
    said = pretend(monkeypatch)
    evaluate(config, prepared, tiny_model, folder / "model", folder / "evaluation")
    assert said
    said.clear()
    return folder


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Answering]]:
    """Replace generation: the reference, but to the first question; fewer steps give less."""
    asked: list[tuple[str, int, Answering]] = []

    def generate_answers(
        model: Any, questions: Sequence[Question], _: Any, how: Answering, seed: int, *__: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, question in enumerate(questions):
            asked.append((question.id, seed, how))
            right = number > 0 or seed > 42
            text = question.reference if right and how.sampler.steps > 1 else "#### 1000"
            numbers = {"tokens": 10, "seconds": 0.25, "forwards": how.sampler.steps}
            yield question.id, {"text": text, "cut": False, "trace": [], **numbers}

    loss = {"sums": [1.0] * 5, "tokens": 10, "seconds": 0.5}
    monkeypatch.setattr(model_run, "generate_answers", generate_answers)
    monkeypatch.setattr(model_run, "denoising_loss", lambda *_: loss)
    return asked


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_same_judges_give_the_same_figures(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [finished.name, "--workspace", str(finished.parents[1])]
    assert main(["evaluate", *named]) == 0
    again = finished / "evaluation-2"
    assert capsys.readouterr().out.endswith(f"\n{again}\n")
    for name in ("evaluation.json", "answers.jsonl", "film.json"):
        assert (again / name).read_bytes() == (finished / "evaluation" / name).read_bytes(), name


@pytest.mark.usefixtures("without_images")
def test_other_judges_judge_the_same_answers_without_a_model(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pretend(monkeypatch)
    monkeypatch.setattr(ranks, "load_stock", lambda *_: pytest.fail("a model is loaded"))
    before = (finished / "evaluation" / "evaluation.json").read_bytes()
    assert main(["evaluate", str(finished), "--set", "evaluate.judge=chrf"]) == 0
    assert main(["evaluate", str(finished), "--set", "evaluate.judge=text"]) == 0
    graded = EvaluationResult.read(finished / "evaluation-2")
    exact = EvaluationResult.read(finished / "evaluation-3")
    assert "evaluate: chrF " in capsys.readouterr().out
    assert not asked
    assert (graded.measure, graded.judges, exact.measure) == ("chrF", ("chrf",), "exact match")
    assert graded.after.exact_match is None
    assert exact.after.correct == 5
    assert graded.after.score is not None
    assert exact.after.score is not None
    assert exact.after.score < graded.after.score < 1
    assert (graded.after.tokens, graded.after.validation_loss) == (
        exact.after.tokens,
        exact.after.validation_loss,
    )
    assert {line["judge"] for line in lines(finished / "evaluation-2")} == {"chrf"}
    assert (finished / "evaluation" / "evaluation.json").read_bytes() == before
    page = finished / "page"
    chosen = ["--evaluation", str(finished / "evaluation-2"), "--output", str(page)]
    assert main(["report", str(finished), *chosen]) == 0
    text = (page / "report.html").read_text()
    assert "<dt>chrF</dt>" in text
    assert "Exact match" not in text.partition("<h2>Losses")[0]


def test_answers_are_judged_again_without_torch(finished: Path) -> None:
    """A newer judge of yesterday's run takes a second, not ten."""
    import subprocess

    code = (
        "import sys; from pipelines.cli import main\n"
        f"assert main(['evaluate', {str(finished)!r}, '--set', 'evaluate.judge=number']) == 0\n"
        "assert not {'torch', 'transformers', 'mlflow'} & sys.modules.keys(), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_settings_have_the_models_answer_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch)
    assert main(["evaluate", str(finished), "--set", "evaluate.repeats=3"]) == 0
    result = EvaluationResult.read(finished / "evaluation-2")
    assert {seed for _, seed, _ in asked} == {42, 43, 44}
    assert len(asked) == 2 * 3 * 6
    assert result.repeats == 3
    assert result.after.score_by_seed == pytest.approx((5 / 6, 1, 1))
    assert result.after.score == pytest.approx((5 / 6 + 2) / 3)
    assert result.after.correct == 17
    rows = lines(finished / "evaluation-2")
    assert [len(row["repeats"]) for row in rows] == [2] * 6
    assert rows[0]["score_after"] == pytest.approx(2 / 3)
    assert (rows[0]["correct_after"], rows[1]["correct_after"]) == (False, True)
    first = EvaluationResult.read(finished / "evaluation")
    assert [row["after"] for row in rows] == [
        row["after"] for row in lines(finished / "evaluation")
    ]
    assert (first.repeats, first.after.correct) == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.steps=5"], r"train\.steps: "),
        (["--set", "evaluate.judge=bleu"], "found 'bleu'"),
        (["--set", "evaluate.rows=4"], r"\bother rows\b"),
    ],
)
def test_what_a_finished_run_cannot_change_is_refused(
    finished: Path,
    problems: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "rows" in arguments[1]:
        card = json.loads((finished / "data" / "card.json").read_text())
        (finished / "data" / "card.json").write_text(json.dumps(card | {"content_hash": "other"}))
    assert main(["evaluate", str(finished), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (finished / "evaluation-2").exists()


# --- the sweep


def test_a_sweep_shows_quality_against_forward_passes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pretend(monkeypatch)
    assert main(["evaluate", str(finished), "--sweep"]) == 0
    table = capsys.readouterr().out
    label, points = read_sweep(finished / "sweep")
    assert label == "exact match"
    assert points[0].name == "the recipe's"
    assert points[0].score == pytest.approx(5 / 6)
    assert points[0].verdict == "undecided"
    (half,) = [point for point in points if point.name == "steps / 2"]
    assert (half.score, half.forwards, half.best) == (0, 1, True)
    assert len(asked) == 6 * len(points)
    assert {how.sampler.entropy_bound for *_, how in asked} > {half.sampler["entropy_bound"]}
    for point in points:
        assert point.name in table
        assert point.score_low <= point.score <= point.score_high
    assert (finished / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    drawn = (finished / "sweep" / "sweep.svg").read_text()
    assert all(f">{point.name}<" in drawn.replace("&#x27;", "'") for point in points)


def test_settings_in_one_place_of_the_picture_share_a_label(tmp_path: Path) -> None:
    def point(name: str, score: float, forwards: float) -> SweepPoint:
        return SweepPoint(
            name=name,
            sampler={},
            score=score,
            score_low=score - 0.05,
            score_high=score + 0.05,
            forwards=forwards,
            tokens_per_forward=4.0,
            seconds=1.0,
            p_value=1.0,
            verdict="undecided",
            best=False,
        )

    points = [point("own", 0.9, 20.0), point("a", 0.9, 20.1), point("b", 0.9, 19.9)]
    draw_sweep([*points, point("c", 0.5, 5.0)], "exact match", tmp_path / "sweep.svg")
    drawn = ElementTree.parse(tmp_path / "sweep.svg").iter("{http://www.w3.org/2000/svg}text")
    rows = {text.text: text.attrib.get("y") or text.attrib["transform"] for text in drawn}
    assert len({rows[name] for name in ("own", "a", "b", "c")}) == 4, "labels cover each other"


def test_a_sweep_resumes(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch)
    answer = model_run.generate_answers

    def interrupted(*given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for each in answer(*given):
            if len(asked) == 9:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(model_run, "generate_answers", interrupted)
    assert main(["evaluate", str(finished), "--sweep"]) == 130
    asked.clear()
    monkeypatch.setattr(model_run, "generate_answers", answer)
    assert main(["evaluate", str(finished), "--sweep"]) == 0
    _, points = read_sweep(finished / "sweep")
    assert len(asked) == 6 * len(points) - 8, "what was answered is answered again"


def test_the_settings_of_a_sweep_differ_in_one_thing_each() -> None:
    own = SamplerSettings(48, 0.1, 0.4, 0.8, 1, 0.005)
    tried = settings_to_try(own)
    assert tried.pop("the recipe's") == own
    assert tried["steps / 4"].steps == 12
    for settings in tried.values():
        different = [name for name in vars(own) if getattr(own, name) != getattr(settings, name)]
        assert len(different) == 1
    one = settings_to_try(SamplerSettings(1, 0.1, 0.4, 0.8, 1, 0.0))
    assert not any("steps" in name or "confidence" in name for name in one)


def test_a_sweep_without_a_scored_row_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    assert main(["evaluate", str(finished), "--sweep", "--set", "evaluate.judge=json"]) == 1
    assert re.search(r"evaluate\.judge \(json\).* 6 rows\b", capsys.readouterr().err)


def test_the_table_of_a_sweep_is_sorted_by_forward_passes(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    assert main(["evaluate", str(finished), "--sweep"]) == 0
    label, points = read_sweep(finished / "sweep")
    head, *rows, legend = sweep_table(points, label).splitlines()
    assert head.split()[:3] == ["setting", "exact", "match"]
    assert legend.startswith("*")
    forwards = sorted(f"{point.forwards:.2f}" for point in points)
    assert [next(n for n in forwards if f" {n} " in row) for row in rows] == forwards


def test_a_run_that_never_trained_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"canvastune: error: {tmp_path}: ")
    assert "run.json" in error

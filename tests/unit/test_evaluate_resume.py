"""Nothing is answered twice: an evaluation that was stopped resumes, and the base is asked once for all
runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from canvastune.config import RunConfig, parse_config
from canvastune.evaluate import main
from canvastune.evaluation import model_run
from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.run import evaluate
from tests.support.evaluation import pretend, recipe
from tests.support.warm import Popen

TIMES = ("seconds_before", "seconds_after", "tokens_per_second_before", "tokens_per_second_after")


def command(config: RunConfig, prepared: Path, model: Path, folder: Path) -> list[str]:
    """Return the options of a command that evaluates a model against itself into `out`."""
    tree = config.model_dump(mode="json") | {"model": {"id": str(model)}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return [
        "-c",
        str(folder / "recipe.yaml"),
        "--data",
        str(prepared),
        "--tuned",
        str(model),
        "--output",
        str(folder / "out"),
    ]


def test_an_interrupted_evaluation_asks_only_the_rest(
    prepared: Path,
    models: tuple[Path, Path],
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = pretend(monkeypatch, lambda question, _: question.reference, interrupted_at=5)
    settings = {"rows": 4, "batch_size": 1}
    config, out = recipe(problems, **settings), tmp_path / "out"

    def attempt(config: RunConfig) -> EvaluationResult:
        asked.clear()
        return evaluate(config, prepared, *models, out)

    with pytest.raises(KeyboardInterrupt):
        attempt(config)
    first = list(asked)
    assert [request.split()[0] for request in first] == ["base"] * 5
    assert not out.exists(), "a partial evaluation is in the place of a complete one"
    with pytest.raises(KeyboardInterrupt):  # another number of steps, other answers
        attempt(recipe(problems, **settings, sampler={"steps": 3}))
    assert [request.split()[0] for request in asked] == ["base"] * 4 + ["tuned"]
    assert asked[:4] == first[:4], "the loss, which does not depend on it, is measured again"
    asked = pretend(monkeypatch, lambda question, _: question.reference)
    result = attempt(
        recipe(problems, **settings, answer_pattern="= *(.+)")
    )  # scoring asks no model
    assert [request.split()[0] for request in asked] == ["tuned"] * 5
    assert (result.scored, result.before.correct, result.before.tokens) == (4, 4, 40)
    assert {path.name for path in tmp_path.iterdir()} == {
        "base",
        "tuned",
        "out",
    }, "working files are left behind"
    assert f"resuming from {tmp_path / '.out.unfinished.jsonl'}" in capsys.readouterr().err


def test_ctrl_c_keeps_the_results(
    prepared: Path,
    problems: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, lambda *_: "", interrupted_at=1)
    assert main(command(recipe(problems, batch_size=1), prepared, tiny_model, tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert len((tmp_path / ".out.unfinished.jsonl").read_text().splitlines()) == 1


def test_a_killed_evaluation_ends_as_one_that_was_not(
    prepared: Path,
    problems: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = recipe(problems, rows=5, batch_size=1, sampler={"steps": 16})
    options, cache = (
        command(config, prepared, tiny_model, tmp_path),
        tmp_path / ".out.unfinished.jsonl",
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # other threads, other sums
    process = Popen(
        [sys.executable, "-m", "canvastune.evaluate", *options],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (cache.exists() and cache.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[1].count("Traceback") == 0
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done, made = cache.read_bytes().count(b"\n"), []

    answered, denoised = model_run.generate_answers, model_run.denoising_loss

    def answer(*given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for each in answered(*given):
            made.append(each[0])
            yield each

    def denoise(*given: Any) -> dict[str, Any]:
        made.append("loss")
        return denoised(*given)

    monkeypatch.setattr(model_run, "generate_answers", answer)
    monkeypatch.setattr(model_run, "denoising_loss", denoise)
    assert main(options) == 0
    assert 3 <= done <= 11
    assert len(made) == 2 * (5 + 1) - done, "what was done is done again"
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.yaml",
        "out",
    }, "working files are left behind"

    evaluate(
        parse_config(yaml.safe_load((tmp_path / "recipe.yaml").read_text())),
        prepared,
        tiny_model,
        tiny_model,
        tmp_path / "whole",
    )
    for name in ("answers.jsonl", "film.json", "config.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name
        )
    found, expected = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("out", "whole")
    )
    assert {key: value for key, value in found.items() if key not in TIMES} == {
        k: v for k, v in expected.items() if k not in TIMES
    }


def test_the_base_is_asked_once_for_all_runs_that_ask_it_the_same(
    prepared: Path,
    models: tuple[Path, Path],
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = pretend(monkeypatch, lambda question, _: question.reference)
    base, tuned = models
    kept = tmp_path / "kept"

    def attempt(name: str, **settings: Any) -> EvaluationResult:
        asked.clear()
        config = recipe(problems, **settings)
        return evaluate(config, prepared, base, tuned, tmp_path / name, base_results=kept)

    first = attempt("first")
    assert [request.split()[0] for request in asked] == ["base"] * 7 + ["tuned"] * 7
    again = attempt("again", batch_size=2, answer_pattern="(.+)")
    assert [request.split()[0] for request in asked] == ["tuned"] * 7
    assert "before: 6 of 6" in capsys.readouterr().err
    assert (first.base_reused, again.base_reused) == (0, 6)
    assert again.before.tokens == first.before.tokens
    for name in ("answers.jsonl", "film.json"):
        answers, expected = (
            [json.loads(line)["before"] for line in (tmp_path / run / name).open()]
            for run in ("again", "first")
        )
        assert answers == expected
    for settings in ({"max_new_tokens": 8}, {"sampler": {"steps": 2, "t_min": 0.1}}):
        assert attempt(f"other {settings}", **settings).base_reused == 0
    assert attempt("fewer", rows=4).base_reused == 4, "what was asked is asked again"
    assert attempt("more", rows=7).base_reused == 6
    (file,) = kept.iterdir()
    file.write_text("{")
    assert attempt("damaged").base_reused == 0
    assert f"evaluate: {file}: " in capsys.readouterr().err, "the damage is not said"
    assert attempt("fixed").base_reused == 6

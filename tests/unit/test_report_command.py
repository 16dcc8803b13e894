"""`canvastune report` writes a run's page again, beside others, and refuses in words what is no run's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from canvastune.config import RunConfig, write_config
from components.earlier_runs import MOST_COMPARED, compared_folders, find_run
from components.run_directory import RunRecord, write_record
from pipelines.cli import main
from tools.report_sample import (
    sample_config,
    write_data,
    write_evaluation,
    write_merge,
    write_metrics,
    write_plan,
)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return sample_config(train={"steps": 20})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    """The folder of a finished run of the pipeline, its report lost."""
    folder = tmp_path_factory.mktemp("runs") / "rank16"
    write_metrics(folder / "train", steps=20, events=False)
    write_data(folder / "data", config)
    write_plan(folder / "plan")
    write_evaluation(folder / "evaluation", config)
    write_merge(folder / "model")
    write_record(folder, RunRecord("job", config.model_dump_json(), "print", finished=True))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "rank16"))


@pytest.fixture
def trained(config: RunConfig, tmp_path: Path) -> Path:
    """What the trainer alone leaves."""
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 64})})
    write_metrics(tmp_path / "rank64", steps=20, events=False)
    write_config(other, tmp_path / "rank64" / "config.yaml")
    return tmp_path / "rank64"


def test_a_run_is_reported_again_with_another_beside_it(run: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("old")
    assert main(["report", str(run), "--compare", str(trained)]) == 0
    page = run / "report" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text()
    assert "<code>lora.rank</code></th><td><code>16</code></td><td><code>64</code></td>" in text
    assert "Exact match rose from" in text
    assert "largest difference 3.1e-6" in text
    assert not list(run.glob(".*")), "something was left beside the report"
    record = json.loads((run / "report" / "provenance.json").read_text())
    assert {"metrics", "data", "plan", "evaluation", "merge", "compared with rank64"} == record["inputs"].keys()


def test_what_the_trainer_alone_left_has_a_report(trained: Path) -> None:
    assert main(["report", str(trained)]) == 0
    text = (trained / "report" / "report.html").read_text()
    assert "<h1>rank64</h1>" in text
    assert "The tuned model was not evaluated" in text


def test_a_run_that_goes_on_is_shown_elsewhere(run: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(run, RunRecord("job", config.model_dump_json(), "print"))
    assert main(["report", str(run)]) == 1
    assert "is not finished, and writes its report when it is. Give --output DIR" in capsys.readouterr().err
    assert not (run / "report").exists(), "the run's last step would take it for its own"
    assert main(["report", str(run), "--output", str(tmp_path / "look")]) == 0
    assert (tmp_path / "look" / "report.html").is_file()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, ("no folder of a run", "workspace/runs/RUN")),
        (lambda run: (run / "run.json").unlink(), ("no folder of a run", "Give one such as")),
        (lambda run: (run / "run.json").write_text('{"a": 1}'), ("run.json: not a run's record", "move this one away")),
        (lambda run: (run / "train" / "metrics.jsonl").unlink(), ("has not begun to train", "Wait for")),
        (lambda run: (run / "evaluation" / "evaluation.json").write_text("{"), ("evaluation.json: cannot be read", "Give the output")),
    ],
)
def test_what_is_no_runs_folder_is_refused_in_words(
    spoil: object, words: tuple[str, ...], run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(spoil)
    spoil(run)
    for command in (["report", str(run)], ["report", str(trained), "--compare", str(run)]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("canvastune: error: ")
        assert all(word in said for word in words), said
    assert not (trained / "report").exists()


def test_more_runs_than_colours_are_refused(run: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--compare", *[str(trained)] * (MOST_COMPARED + 1)]) == 1
    assert "compare: found 6 runs, expected at most 5. Leave some out" in capsys.readouterr().err


def test_a_run_that_the_pipeline_is_to_compare_with_is_looked_for_before_anything_is_made(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_config(find_run(trained).config, recipe)
    assert main(["run", str(recipe), "--workspace", str(tmp_path / "workspace"), "--compare", str(trained), "nowhere"]) == 1
    assert "nowhere: no folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "workspace").exists()


def test_runs_to_compare_with_are_named_in_one_text(tmp_path: Path) -> None:
    found = compared_folders("rank8, rank16\n/data/runs/rank32\n", tmp_path)
    assert found == [tmp_path / "runs" / "rank8", tmp_path / "runs" / "rank16", Path("/data/runs/rank32")]
    assert compared_folders("", tmp_path) == []

"""`canvastune report` writes a run's page again, compared with others, and refuses folders without
a run.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from canvastune.config import RunConfig, write_config
from components.earlier_runs import MAX_COMPARED, compared_folders
from components.run_artifacts import find_run
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

pytestmark = pytest.mark.usefixtures("without_images")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return sample_config(train={"steps": 20})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    """Write the folder of a finished run of the pipeline whose report is missing."""
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
    """Write what a run of the trainer without the pipeline leaves."""
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 64})})
    write_metrics(tmp_path / "rank64", steps=20, events=False)
    write_config(other, tmp_path / "rank64" / "config.yaml")
    return tmp_path / "rank64"


def test_a_run_is_reported_again_compared_with_another(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("old")
    assert main(["report", str(run), "--compare", str(trained)]) == 0
    page = run / "report" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text()
    assert (
        "<code>lora.<wbr>rank</code></th><td><code>16</code></td><td><code>64</code></td>" in text
    )
    assert re.search(r"\brose\b[^%]*>\d+\.\d%<[^%]*>\d+\.\d%<", text)
    assert "largest difference 3.1e-6" in text
    assert not list(run.glob(".*")), "temporary files are left"
    record = json.loads((run / "report" / "provenance.json").read_text())
    assert {"metrics", "data", "plan", "evaluation", "merge", "compared with rank64"} == record[
        "inputs"
    ].keys()


@pytest.fixture
def workspace(run: Path, trained: Path, tmp_path: Path) -> Path:
    """Move the two runs into a workspace."""
    (tmp_path / "workspace" / "runs").mkdir(parents=True)
    for folder in (run, trained):
        folder.rename(tmp_path / "workspace" / "runs" / folder.name)
    return tmp_path / "workspace"


def test_runs_may_be_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ["rank16", "--compare", "rank64", "--workspace", str(workspace)]
    assert main(["report", *named]) == 0
    page = workspace / "runs" / "rank16" / "report" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert '<th scope="row">rank64</th>' in page.read_text()


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        (["report", "rnk16"], "rank16"),
        (["report", "rank16", "--compare", "rnk64"], "rank64"),
        (["evaluate", "rnk16"], "rank16"),
        (["sync", "rnk16"], "rank16"),
        (["ask", "rnk16", "why?"], "rank16"),
        (["run", "recipe.yaml", "--compare", "rnk16"], "rank16"),
    ],
)
def test_a_name_that_no_run_has_is_refused_with_the_nearest(
    command: list[str], nearest: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(find_run(workspace / "runs" / "rank64").config, workspace / "recipe.yaml")
    command = [str(workspace / word) if word.endswith(".yaml") else word for word in command]
    assert main([*command, "--workspace", str(workspace)]) == 1
    message, _, hint = capsys.readouterr().err.partition("\n")
    runs = workspace / "runs"
    assert message.endswith(f": found no such folder, and no run of this name in {runs}")
    assert hint == f"  hint: Did you mean {nearest!r}?\n"


def test_the_trainers_output_alone_has_a_report(trained: Path) -> None:
    assert main(["report", str(trained)]) == 0
    text = (trained / "report" / "report.html").read_text()
    assert "<h1>rank64</h1>" in text
    assert "not evaluated" in text


def test_the_report_of_an_unfinished_run_needs_an_output_folder(
    run: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(run, RunRecord("job", config.model_dump_json(), "print"))
    assert main(["report", str(run)]) == 1
    assert "--output DIR" in capsys.readouterr().err
    assert not (run / "report").exists(), "the run's last step would take it for its own"
    assert main(["report", str(run), "--output", str(tmp_path / "look")]) == 0
    assert (tmp_path / "look" / "report.html").is_file()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ("rank16: ", "no such folder")),
        (
            lambda run: (run / "run.json").unlink(),
            ("rank16: ", "run.json", "metrics.jsonl", "config.yaml"),
        ),
        (lambda run: (run / "run.json").write_text('{"a": 1}'), ("run.json: ", "'a'")),
        (lambda run: (run / "train" / "metrics.jsonl").unlink(), ("train: ", "metrics.jsonl")),
        (
            lambda run: (run / "evaluation" / "evaluation.json").write_text("{"),
            ("evaluation.json: ",),
        ),
        (
            lambda run: (run / "evaluation" / "evaluation.json").write_text("{}"),
            ("evaluation.json: ", "'gained'"),
        ),
    ],
)
def test_a_folder_without_a_run_is_refused_by_name(
    spoil: object,
    parts: tuple[str, ...],
    run: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(spoil)
    spoil(run)
    for command in (["report", str(run)], ["report", str(trained), "--compare", str(run)]):
        assert main(command) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("canvastune: error: ")
        assert all(part in printed for part in parts), printed
    assert not (trained / "report").exists()


def test_more_runs_than_colours_are_refused(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--compare", *[str(trained)] * (MAX_COMPARED + 1)]) == 1
    assert capsys.readouterr().err == snapshot("""\
canvastune: error: compare: found 6 runs, expected at most 5
  hint: Leave out some of them.
""")


def test_the_pipeline_looks_for_compared_runs_before_it_writes_anything(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_config(find_run(trained).config, recipe)
    assert (
        main(
            [
                "run",
                str(recipe),
                "--workspace",
                str(tmp_path / "workspace"),
                "--compare",
                str(trained),
                "nowhere",
            ]
        )
        == 1
    )
    assert "nowhere: " in capsys.readouterr().err
    assert not (tmp_path / "workspace").exists()


def test_compared_runs_are_separated_by_commas_or_line_breaks(tmp_path: Path) -> None:
    found = compared_folders("rank8, rank16\n/data/runs/rank32\n", tmp_path)
    assert found == [
        tmp_path / "runs" / "rank8",
        tmp_path / "runs" / "rank16",
        Path("/data/runs/rank32"),
    ]
    assert compared_folders("", tmp_path) == []

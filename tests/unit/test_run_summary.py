"""Every place that shows a figure of a run shows the same number."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, cast

import pytest

from canvastune.config import RunConfig
from canvastune.evaluation.result import EvaluationResult
from canvastune.report.build import build_report
from canvastune.report.summary import RunArtifacts, RunSummary
from canvastune.tracking.descriptions import describe_report
from components.report.step import publish
from components.run_directory import RunRecord, write_record
from pipelines.local_runner import describe_result
from tools.report_sample import (
    sample_config,
    sample_run,
    write_data,
    write_evaluation,
    write_plan,
)

pytestmark = pytest.mark.usefixtures("without_images")


class Recorder:
    """Stands for a step's run in MLflow: keeps the summary, and ignores everything else."""

    values: dict[str, float]
    said: str

    def note(self, text: str) -> None:
        self.said = text

    def summary(self, values: dict[str, float], *_: Any) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run whose first step, last step and last 3% of steps have different losses."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "train").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for step in range(1, 301):
        loss = 1 + 9 * 0.99**step + (step % 7) / 10
        records.append(
            {
                "kind": "train",
                "step": step,
                "time": 0.0,
                "loss": loss,
                "seconds": 1.0,
                "tokens": 100,
            }
        )
        if step % 100 == 1:
            records.append(
                {"kind": "validation", "step": step, "time": 0.0, "loss": loss / 2, "levels": {}}
            )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "train" / "metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return sample_config()


@pytest.fixture(scope="module")
def published(
    run_folder: Path, config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunSummary, Recorder]:
    outputs, record = tmp_path_factory.mktemp("outputs"), Recorder()
    write_record(run_folder, RunRecord("job", config.model_dump_json(), "print"))
    summary = publish(
        config,
        cast(Any, record),
        run_folder,
        metrics=run_folder / "train" / "metrics.jsonl",
        data=write_data(outputs / "data", config),
        plan=write_plan(outputs / "plan"),
        evaluation=write_evaluation(outputs / "evaluation", config),
        tuned=outputs,
    )
    return summary, record


def test_the_definitions_of_the_figures_are_those_of_summary_json(
    published: tuple[RunSummary, Recorder], run_folder: Path
) -> None:
    records = [
        json.loads(line)
        for line in (run_folder / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    validation = [record["loss"] for record in records if record["kind"] == "validation"]
    assert json.loads((run_folder / "summary.json").read_text()) == {
        "train_loss_first": losses[0],
        "train_loss_last": sum(losses[-10:]) / 10,
        "validation_loss_first": validation[0],
        "validation_loss_last": validation[-1],
        "exact_match_before": 6 / 64,
        "exact_match_after": 52 / 64,
        "exact_match_normalized_before": 7 / 64,
        "exact_match_normalized_after": 53 / 64,
    }
    thirtieths = sum(losses[:10]) / 10, sum(losses[-30:]) / 30
    assert all(
        abs(mean - loss) > 1e-3
        for mean, loss in zip(thirtieths, (losses[0], sum(losses[-10:]) / 10), strict=True)
    )
    assert RunSummary.read(run_folder) == published[0]


def test_kubeflow_and_mlflow_get_these_figures(published: tuple[RunSummary, Recorder]) -> None:
    summary, record = published
    figures = summary.figures()
    assert len(figures) == 8
    names = {"train/loss": "train_loss", "val/loss": "validation_loss"}
    for name, field in names.items():
        for end in ("first", "last"):
            assert record.values[f"{name}_{end}"] == figures[f"{field}_{end}"]
    for side in ("before", "after"):
        for name in (f"exact_match_{side}", f"exact_match_normalized_{side}"):
            assert record.values[f"eval/{name}"] == figures[name]


def test_the_page_and_its_comparison_table_show_these_figures(
    published: tuple[RunSummary, Recorder], run_folder: Path, config: RunConfig, tmp_path: Path
) -> None:
    summary, _ = published
    page = _text(run_folder / "report" / "report.html")
    first, last = summary.train_loss_first, summary.train_loss_last
    assert re.search(rf"Training loss {last:.3f} .*\b10 steps\b[^.]* {first:.3f}\b", page)
    assert f"Total loss {first:.3g} → {last:.3g}" in page
    assert (
        f"Validation loss {summary.validation_loss_last:.3f} {summary.validation_loss_first:.3f} at"
        " step 1" in page
    )
    assert f"Exact match {summary.exact_match_after:.1%} 95% interval" in page
    normalized = f"{summary.exact_match_normalized_after:.1%}"
    assert f"normalized: {normalized} (" in page
    other = RunArtifacts(
        "other", config, run_folder / "train", evaluation=run_folder / "evaluation"
    )
    compared = _text(build_report(sample_run(tmp_path, config), tmp_path / "report", [other]))
    assert (
        f"other 300 {last:.3f} {summary.validation_loss_last:.3f} {summary.exact_match_after:.1%}"
        in compared
    )
    assert compared.count(f"{normalized} ") > 1, "the comparison table lacks the normalized figure"


def test_the_command_line_shows_these_figures(
    published: tuple[RunSummary, Recorder], run_folder: Path, config: RunConfig
) -> None:
    summary, _ = published
    lines = describe_result(config, run_folder.parents[1], run_folder)
    assert (
        lines["training loss"] == f"{summary.train_loss_first:.3f} -> {summary.train_loss_last:.3f}"
    )
    assert (
        lines["validation loss"]
        == f"{summary.validation_loss_first:.3f} -> {summary.validation_loss_last:.3f}"
    )
    assert lines["exact match"].startswith(
        f"{summary.exact_match_before:.1%} -> {summary.exact_match_after:.1%}"
    )
    assert lines["exact match"].endswith(
        f"; normalized {summary.exact_match_normalized_before:.1%} -> "
        f"{summary.exact_match_normalized_after:.1%}"
    )
    assert lines["MLflow page"].startswith("http://127.0.0.1:5000")
    assert f"ask {run_folder}" in lines["try it"]
    assert re.search(r"^better: \d+ gained, \d+ lost of 64 rows, p = [\d.e-]+$", lines["verdict"])


def test_the_step_does_not_promise_a_page_that_mlflow_does_not_get(
    published: tuple[RunSummary, Recorder], config: RunConfig, tmp_path: Path
) -> None:
    assert "as a page" in published[1].said
    tracking = config.tracking.model_copy(update={"log_texts": False})
    config, record = config.model_copy(update={"tracking": tracking}), Recorder()
    sample_run(tmp_path, config)
    write_record(tmp_path, RunRecord("job", config.model_dump_json(), ""))
    publish(
        config,
        cast(Any, record),
        tmp_path,
        metrics=tmp_path / "train" / "metrics.jsonl",
        data=tmp_path / "data",
        plan=tmp_path / "plan",
        evaluation=tmp_path / "evaluation",
        tuned=tmp_path / "train" / "model",
    )
    assert "its page is in the run folder only" in record.said


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (None, r"evaluate\.answer_pattern is null"),
        ("(x)", r"evaluate\.answer_pattern\b.* 64 references"),
    ],
)
def test_without_a_scored_row_every_place_says_that_exact_match_is_left_out(
    config: RunConfig, tmp_path: Path, pattern: str | None, reason: str
) -> None:
    folder = tmp_path / "runs" / "run"
    run = sample_run(folder, config)
    shutil.rmtree(run.evaluation or "")
    write_evaluation(folder / "evaluation", config, scored=False, answer_pattern=pattern)
    write_record(folder, RunRecord("job", config.model_dump_json(), ""))
    record = Recorder()
    summary = publish(
        config,
        cast(Any, record),
        folder,
        metrics=folder / "train" / "metrics.jsonl",
        data=folder / "data",
        plan=folder / "plan",
        evaluation=folder / "evaluation",
        tuned=folder / "train" / "model",
    )
    result = EvaluationResult.read(folder / "evaluation")
    assert re.fullmatch(reason, result.unscored_reason or "")
    reason = str(result.unscored_reason)
    assert result.to_json()["exact_match_before"] is None
    measured = {"validation_loss_before", "validation_loss_after_t0.1", "tokens_after"}
    for figures in (result.figures(), record.values, summary.figures()):  # Kubeflow's and MLflow's
        assert not any("exact" in name or "p_value" in name for name in figures)
        assert all(math.isfinite(value) for value in figures.values())
    assert measured <= result.figures().keys()
    assert record.values["eval/validation_loss_after"] == result.after.validation_loss
    page = _text(folder / "report" / "report.html")
    assert re.search(rf"Exact match \w+ \w+ {re.escape(reason)}", page), "in the tile"
    assert len(re.findall(r"\b64 held-out rows\b", page)) == 2, "in the verdict and the answers"
    assert "Mean 5.600 0.600" in page, "the validation losses of both models are not shown"
    assert page.count(f": {reason}.") == 1 + (pattern is not None), "in the warnings too"
    assert "%" not in page.partition("Throughput")[0]
    note = describe_report(config, folder, record.values, result)
    assert re.match(rf"\*\*Not judged\b[^*]*\*\*: {re.escape(reason)}\.", note)
    assert "| validation loss | 5.600 | 0.600 |" in note
    assert describe_result(config, tmp_path, folder)["exact match"] == f"left out: {reason}"
    other = _text(build_report(sample_run(tmp_path / "b", config), tmp_path / "compared", [run]))
    assert "left out left out" in other, "the comparison table claims a figure"


def test_a_figure_that_is_not_finite_is_null_or_left_out(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = sample_run(folder, config)
    result = EvaluationResult.read(folder / "evaluation")
    model = replace(
        result.after,
        tokens_per_forward=math.nan,
        tokens_per_second=math.inf,
        validation_loss=math.nan,
        validation_loss_by_level={"0.1": math.nan, "0.9": 1.0},
    )
    replace(result, after=model).write(folder / "evaluation")
    text = (folder / "evaluation" / "evaluation.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert found["validation_loss_after"] is None
    assert found["validation_loss_after_t0.1"] is None
    result = EvaluationResult.read(folder / "evaluation")
    assert result.after.validation_loss is None
    assert replace(result, after=model).figures() == result.figures()
    assert "validation_loss_after" not in result.figures()
    assert result.figures()["validation_loss_after_t0.9"] == 1.0
    page = _text(build_report(run, tmp_path / "report"))
    assert "0.1 3.360 not recorded" in page
    describe_report(config, folder, {}, result)


def test_a_figure_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    summary = RunSummary.from_records([{"kind": "train", "step": 1, "loss": 2.0}], None)
    summary.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "train_loss_first": 2.0,
        "train_loss_last": 2.0,
    }
    assert RunSummary.read(tmp_path) == summary


def test_looking_for_runs_to_compare_imports_no_plotting() -> None:
    code = "import sys, components.resolve.step; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"matplotlib", "jinja2"} & set(loaded)


def _text(page: Path) -> str:
    html = re.sub(r"<(script|style).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))

"""Runs are compared on the rows that both answered, and over seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from canvastune.io.provenance import write_provenance
from canvastune.report.build import build_report
from canvastune.report.comparison import (
    PairedRows,
    differing_inputs,
    other_answers,
    pair_rows,
    seed_spread,
)
from canvastune.report.summary import RunArtifacts
from tools.report_sample import (
    sample_config,
    sample_result,
    sample_run,
    write_evaluation,
    write_metrics,
)


def _row(name: str, score: float | None, judge: str = "pattern") -> dict[str, Any]:
    return {"id": name, "reference": f"r{name}", "judge": judge, "score_after": score}


def test_only_rows_that_both_scored_alike_are_paired() -> None:
    own = [_row("a", 1), _row("b", 1), _row("c", 0), _row("d", None), _row("e", 1), _row("f", 1)]
    other = [_row("a", 0), _row("b", 1), _row("c", 1), _row("d", 1), _row("e", 0.3, "chrf")]
    assert pair_rows(own, other) == PairedRows(3, 1, 1, 1.0, "undecided")
    assert pair_rows(own, [_row("z", 1)]) is None
    earlier = [{"id": "a", "reference": "ra", "correct_after": False, "judge": "pattern"}]
    assert pair_rows(own, earlier) == PairedRows(1, 1, 0, 1.0, "undecided")


def test_a_clear_difference_is_one() -> None:
    own = [_row(str(row), 1) for row in range(8)]
    paired = pair_rows(own, [_row(str(row), 0) for row in range(8)])
    assert paired is not None
    assert (paired.gained, paired.verdict) == (8, "better")
    assert paired.p_value == pytest.approx(2 / 2**8)


def test_the_spread_is_of_runs_that_differ_in_the_seed_only(tmp_path: Path) -> None:
    def run(**settings: Any) -> RunArtifacts:
        return RunArtifacts("a", sample_config(**settings), tmp_path)

    runs = [run(), run(seed=1), run(seed=2), run(seed=3, lora={"rank": 64})]
    results = [sample_result(after=after) for after in (32, 48, 40, 60)]
    spread = seed_spread(runs, results)
    assert spread is not None
    assert (spread.runs, spread.mean, spread.low, spread.high) == (3, 0.625, 0.5, 0.75)
    assert seed_spread(runs[:1] + runs[3:], results[:1] + results[3:]) is None
    assert seed_spread([run(), run()], results[:2]) is None, "one seed has no spread"


def test_answers_of_other_runs_are_those_that_are_not_the_same() -> None:
    row = {"id": "a", "after": "9-8=1"}
    others = {"rank8": {"a": "9-8=2"}, "same": {"a": "9-8=1"}, "other rows": {"b": "9-8=2"}}
    assert other_answers(row, others) == [("rank8", "9-8=2")]


def test_other_rows_of_the_same_name_are_named(tmp_path: Path) -> None:
    config, runs = sample_config(), []
    for name, rows in (("first", "a"), ("again", "a"), ("changed", "b")):
        folder = write_metrics(tmp_path / name, steps=2).parent
        (tmp_path / "rows").write_text(rows, "utf-8")
        write_provenance(folder, "train", config, {"data": tmp_path / "rows"})
        runs.append(RunArtifacts(name, config, folder))
    assert differing_inputs(runs[:2]) == []
    (row,) = differing_inputs(runs)
    assert row["key"].startswith("data")
    first, again, changed = row["values"]
    assert first == again != changed


@pytest.mark.usefixtures("without_images")
def test_the_page_compares_row_by_row(tmp_path: Path) -> None:
    config, seeded = sample_config(), sample_config(seed=7)
    others = [
        RunArtifacts(
            "seed7",
            seeded,
            write_metrics(tmp_path / "seed7", steps=60),
            evaluation=write_evaluation(tmp_path / "evaluated", seeded, before=6, after=20),
        ),
        RunArtifacts("unevaluated", config, write_metrics(tmp_path / "none", steps=60)),
    ]
    page = build_report(sample_run(tmp_path, config), tmp_path / "report", others)
    text = re.sub(r"<[^>]+>|\s+", " ", page.read_text(encoding="utf-8"))
    assert re.search(r"seed7 .*?better\s+\d+ gained, \d+ lost of 64 rows, p &lt; 0\.001", text)
    assert "no row" in text
    assert re.search(r"\b2 runs\b[^:]*\bseed\b[^:]*: exact match 56\.\d%", text)

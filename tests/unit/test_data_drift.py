"""A report says how the data of a run differ from those of another, from their cards and profiles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from canvastune.data.data_profile import DataProfile
from canvastune.errors import UserError
from canvastune.io.provenance import write_provenance
from canvastune.report.build import build_report
from canvastune.report.data_drift import RowOverlap, RunData, compare_data, jensen_shannon
from canvastune.report.summary import RunArtifacts
from tools.report_sample import sample_config, sample_run, write_data, write_metrics


def _run(folder: Path, **data: int) -> RunArtifacts:
    config = sample_config()
    return RunArtifacts(folder.name, config, folder, write_data(folder / "data", config, **data))


def _change_card(run: RunArtifacts, **changed: Any) -> None:
    assert run.data is not None
    file = run.data / "card.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def _compared(own: RunArtifacts, other: RunArtifacts) -> RunData:
    first, second = compare_data(own, [other])
    assert first.verdict == "", "a run is not compared with itself"
    return second


def test_the_divergence_of_token_counts_is_that_of_jensen_and_shannon() -> None:
    def counts(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    assert jensen_shannon(counts(3, 1), counts(6, 2)) == pytest.approx(0)
    assert jensen_shannon(counts(3, 1), counts(0, 0, 9)) == pytest.approx(1)
    # 0.5 * log2(4 / 3) + 0.5 * (0.5 * log2(2 / 3) + 0.5 * log2(2))
    assert jensen_shannon(counts(5), counts(1, 1)) == pytest.approx(0.311278, abs=1e-6)
    assert jensen_shannon(counts(1, 1), counts(5)) == pytest.approx(0.311278, abs=1e-6)


def test_rows_are_counted_once_and_crossed_over_the_splits() -> None:
    def profile(train: list[int], validation: list[int]) -> DataProfile:
        rows, none = [np.array(each, np.uint64) for each in (train, validation)], np.zeros(0, int)
        return DataProfile(rows[0], rows[1], prompt=none, response=none)

    found = RowOverlap.of(profile([1, 2, 3, 4], [7, 8, 9]), profile([3, 7, 8], [2, 4, 5, 9]))
    assert found == RowOverlap(
        shared=6,
        only_here=1,
        only_there=1,
        held_out=3,
        trained_there=2,
        trained_here=2,
        same_split=False,
    )


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        ({}, "Same data."),
        ({"first_row": 5000}, "No row in common, similar lengths."),
        (
            {"first_row": -1000, "response": 11},
            "1,000 of 1,804 rows are new, 1,000 of b's 1,804 are missing,"
            " responses are twice as long, other words in responses."
            " b was trained on 64 of 64 rows held out here.",
        ),
        (
            {"first_row": 1, "response": 44},
            "1 of 1,804 rows is new, 1 of b's 1,804 is missing, responses are half as long,"
            " other words in responses.",
        ),
    ],
)
def test_the_verdict_says_in_words_what_differs(
    tmp_path: Path, other: dict[str, int], verdict: str
) -> None:
    own = _run(tmp_path / "a", first_row=2000)
    other["first_row"] = 2000 + other.get("first_row", 0)
    assert _compared(own, _run(tmp_path / "b", **other)).verdict == verdict


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "Same rows, prepared differently, similar lengths."),
        (
            {"prefix_tokens": {"median": 47, "p95": 24}},
            "Same rows, prepared differently, the longest prompts are 3 times as long.",
        ),
    ],
)
def test_equal_rows_may_be_prepared_differently(
    tmp_path: Path, changed: dict[str, Any], verdict: str
) -> None:
    own, other = _run(tmp_path / "a"), _run(tmp_path / "b")
    _change_card(other, content_hash="other", **changed)
    assert _compared(own, other).verdict == verdict


def test_tokens_of_other_tokenizers_are_not_compared(tmp_path: Path) -> None:
    own, other = _run(tmp_path / "a", response=44), _run(tmp_path / "b", first_row=9000)
    for run in (own, other):
        assert run.data is not None
        (tokenizer := tmp_path / f"{run.name}.json").write_text(run.name)
        write_provenance(run.data, "prepare_data", run.config, {"tokenizer.json": tokenizer})
    found = _compared(own, other)
    assert (found.divergence, found.same_tokenizer) == (None, False)
    assert re.search(r"No row in common, .*tokenizers differ", found.verdict)


@pytest.mark.parametrize("without", ["a", "b"])
def test_a_run_of_an_earlier_version_is_compared_by_what_it_has(
    tmp_path: Path, without: str
) -> None:
    runs = [_run(tmp_path / "a", response=44), _run(tmp_path / "b", first_row=9000)]
    (tmp_path / without / "data" / "profile.npz").unlink()
    found = _compared(*runs)
    assert (found.rows, found.divergence) == (None, None)
    whose = {"a": "this run's data", "b": "its data"}[without]
    assert found.verdict.startswith("Responses are twice as long. Rows are not compared: " + whose)
    assert "earlier version" in found.verdict


@pytest.mark.parametrize(("without", "named"), [("a", "this run"), ("b", "b")])
def test_a_run_without_a_data_card_is_not_compared(
    tmp_path: Path, without: str, named: str
) -> None:
    runs = {name: _run(tmp_path / name) for name in "ab"}
    runs[without] = RunArtifacts(without, sample_config(), tmp_path)
    assert _compared(runs["a"], runs["b"]).verdict == (
        f"Not compared: no data card of {named} was found."
    )


def test_a_source_with_the_same_name_and_other_content_is_marked(tmp_path: Path) -> None:
    own, other = _run(tmp_path / "a"), _run(tmp_path / "b")
    _change_card(own, sources=[{"source": name, "fingerprint": name} for name in ("x", "y")])
    changed = [{"source": name, "fingerprint": "y"} for name in ("x", "y", "z")]
    _change_card(other, sources=changed)
    assert _compared(own, other).sources == "x (other content), y, z"


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        lambda file: file.write_text("not an archive"),
        lambda file: np.savez(file, train=np.zeros(1, np.uint64)),
    ],
)
def test_a_damaged_profile_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    own = _run(tmp_path / "a")
    assert own.data is not None
    damage(own.data / "profile.npz")
    with pytest.raises(UserError, match=r"a/data/profile\.npz: cannot be read") as refused:
        compare_data(own, [own])
    assert "remove it" in str(refused.value.hint)


@pytest.mark.usefixtures("without_images")
def test_the_page_shows_verdict_and_figures(tmp_path: Path) -> None:
    config = sample_config()
    other, bare = _run(tmp_path / "other", first_row=804, response=44), tmp_path / "bare"
    others = [
        RunArtifacts("other", config, write_metrics(tmp_path / "other", steps=20), other.data),
        RunArtifacts("bare", config, write_metrics(bare, steps=20)),
    ]
    page = build_report(sample_run(tmp_path, config), tmp_path / "report", others)
    text = re.sub(r"(<[^>]+>|\s)+", " ", page.read_text(encoding="utf-8"))
    assert "other: 804 of 1,804 rows are new" in text
    assert "bare: Not compared: no data card" in text
    figures = r"other 1,000 804 804 0 64 47, 71 44, 53 0, 0\.667 problems\.jsonl "
    assert re.search(figures, text), text[text.find("Rows in both") :][:800]

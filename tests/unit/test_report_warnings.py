"""What the report warns of, and what a run costs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from canvastune.config import RunConfig
from canvastune.evaluation.degenerate import find_degeneration
from canvastune.report.summary import Cost, find_warnings
from tools.report_sample import (
    sample_config,
    sample_result,
)

GPU = {"device": "cuda", "device_name": "NVIDIA H200"}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return sample_config(parallel={"nproc_per_node": 2})


def test_a_paired_comparison_is_surer_than_two_intervals(config: RunConfig) -> None:
    result = sample_result(64, before=40, after=48, lost=0)
    assert result.after.exact_match_low is not None
    assert result.before.exact_match_high is not None
    assert result.after.exact_match_low < result.before.exact_match_high
    assert not _warnings(config, [], evaluation=result)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([{"ranks": 8, **GPU}], (8.0, "GPU-hours", "8 × NVIDIA H200")),
        ([{"ranks": 8, **GPU}, {"ranks": 16, **GPU}], (12.0, "GPU-hours", "16 × NVIDIA H200")),
        (
            [{"ranks": 2, "device": "cpu", "threads": 1}],
            (2.0, "CPU-hours", "2 processes of 1 thread"),
        ),
        (
            [{"ranks": 1, "device": "cpu", "threads": 4}],
            (4.0, "CPU-hours", "1 process of 4 threads"),
        ),
        ([], (4.0, "process-hours", "4 processes")),
    ],
)
def test_cost_is_the_hours_of_the_devices_of_each_attempt(
    places: list[dict[str, Any]], told: tuple[float, str, str]
) -> None:
    records: list[dict[str, Any]] = []
    for attempt in range(2):  # of half an hour each, the second started where the first was lost
        if attempt < len(places):
            records.append(
                {
                    "kind": "event",
                    "step": 2 * attempt,
                    "event": "resumed" if attempt else "started",
                    **places[attempt],
                }
            )
        records.append({"kind": "train", "step": 2 * attempt + 1, "seconds": 1200.0})
        records.append({"kind": "validation", "step": 2 * attempt + 1, "seconds": 600.0})
    cost = Cost.from_records(records, sample_config(parallel={"nproc_per_node": 4}))
    assert (cost.hours, cost.unit, cost.devices) == (pytest.approx(told[0]), *told[1:])


@pytest.mark.parametrize(
    ("before", "after", "lost", "figures"),
    [(6, 8, 1, [["64", "3", "1", "0.62"]]), (30, 12, 18, [["30", "12", "64"]]), (6, 52, 1, [])],
)
def test_a_doubtful_or_bad_result_is_a_warning(
    before: int, after: int, lost: int, figures: list[list[str]], config: RunConfig
) -> None:
    found = _warnings(config, [], evaluation=sample_result(64, before, after, lost))
    assert [re.findall(r"\d+(?:\.\d+)?", warning) for warning in found] == figures


def test_trouble_in_training_is_never_hidden(config: RunConfig) -> None:
    records: list[dict[str, Any]] = [
        {"kind": "event", "step": 7, "time": 0.0, "event": "skipped_step", "detail": "not finite"},
        {
            "kind": "event",
            "step": 7,
            "time": 0.0,
            "event": "damaged_checkpoint",
            "detail": "a checksum differs",
        },
        {"kind": "train", "step": 8, "time": 0.0, "loss": 1.0, "grad_norm": None},
        {"kind": "validation", "step": 100, "time": 0.0, "loss": 1.0, "levels": {}},
        {"kind": "validation", "step": 300, "time": 0.0, "loss": 1.2, "levels": {}},
    ]
    text = " ".join(_warnings(config, records, merge={"passed": False}))
    assert "merged model" in text
    assert re.search(r"\b1 step\b[^.]* 7\.", text)
    assert re.search(r"\b1 checkpoint\b", text)
    assert re.search(r": grad_norm\.", text)
    assert re.search(r"\b100 \(1\.000\)\D+1\.200\b", text)


@pytest.mark.parametrize(
    ("dropped", "cut", "found"), [(0, 0, []), (3, 0, ["3"]), (0, 1, []), (3, 40, ["3", "40"])]
)
def test_rows_that_are_too_long_are_never_hidden(
    dropped: int, cut: int, found: list[str], config: RunConfig
) -> None:
    card = {"kept": 200, "seq_length": 96, "cut": cut, "too_long": dropped}
    lines = _warnings(config, [], card=card)
    assert [line.split(" ")[0] for line in lines if "seq_length" in line] == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "empty"),
        ("<|channel>thought\nWhat now<channel|>\n", "empty"),
        ("of of of of", "repeated"),
        ("She has 4 apples. " * 5 + "She has", "repeated"),
        ("no no no", None),
        ("The answer is 4. The answer is 5. The answer is 6. The answer is 7.", None),
        ("#### 4", None),
    ],
)
def test_an_answer_that_says_nothing_is_one(text: str, found: str | None) -> None:
    assert find_degeneration(text) == found


@pytest.mark.parametrize(("empty", "repeated", "told"), [(0, 3, []), (3, 1, ["100", "3", "1"])])
def test_many_answers_that_say_nothing_are_a_warning(
    empty: int, repeated: int, told: list[str], config: RunConfig
) -> None:
    texts = [""] * empty + ["of " * 9] * repeated
    texts += ["yes yes yes yes"] * 30 + ["4"] * (70 - len(texts))
    answers = [
        {"reference": "yes yes yes yes" if text.startswith("yes") else "5", "after": text}
        for text in texts
    ]
    warnings = _warnings(config, [], evaluation=sample_result(64, 6, 52), answers=answers)
    assert [re.findall(r"\d+", line) for line in warnings] == ([told] if told else [])


def _warnings(config: RunConfig, records: list[dict[str, Any]], **given: Any) -> list[str]:
    given = {"evaluation": None, "merge": {"passed": True}, "card": {}, **given}
    return find_warnings(config, records, **given)

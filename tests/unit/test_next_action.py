"""The report names one next action, with a command where there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from canvastune.evaluation.result import EvaluationResult, Slice
from canvastune.report.next_action import next_action
from canvastune.report.summary import RunArtifacts, step_costs
from tools.report_sample import sample_config, sample_result

RUN = Path("/data/my runs/a")
SERVE = "canvastune serve '/data/my runs/a/model'"
EVALUATE = "canvastune evaluate '/data/my runs/a' --set evaluate"


def _cut(count: int) -> EvaluationResult:
    result = sample_result()
    return dataclasses.replace(result, after=dataclasses.replace(result.after, cut=count))


_UNCLEAR = {"before": 6, "after": 8, "lost": 3}


@pytest.mark.parametrize(
    ("evaluation", "how", "command"),
    [
        (sample_result(), {}, SERVE),
        (sample_result(), {"merge": {"passed": False}}, "canvastune merge"),
        (_cut(20), {}, f"{EVALUATE}.max_new_tokens="),
        (_cut(2), {}, SERVE),
        (sample_result(rows=0), {}, f"{EVALUATE}.judge=chrf"),
        (sample_result(before=52, after=6, lost=50), {}, ""),
        (sample_result(**_UNCLEAR), {"card": {"validation": 900}}, f"{EVALUATE}.rows=900"),
        (sample_result(**_UNCLEAR), {"card": {"validation": 64}}, f"{EVALUATE}.repeats=4"),
        (sample_result(**_UNCLEAR, repeats=4), {"card": {"validation": 64}}, ""),
        (None, {}, ""),
    ],
)
def test_the_next_action_follows_from_the_results(
    evaluation: EvaluationResult | None, how: dict[str, Any], command: str
) -> None:
    given = {"merge": None, "card": {}, "folder": RUN, "model": RUN / "model", **how}
    action = next_action(sample_config(), evaluation, **given)
    assert action.text.endswith(".")
    assert action.command.startswith(command) if command else not action.command


@pytest.mark.parametrize(
    ("scores", "by", "is_named"),
    [
        ((0.4, 0.2, 0.6), "column", True),
        ((0.4, 0.2, 0.6), "source", True),
        ((0.0, 0.0, 0.43), "length", True),  # calls to a tool, say, among rows of prose
        ((0.7, 0.4, 0.9), "column", False),  # few rows: it may be as good as the others
    ],
)
def test_a_part_that_fails_is_named_beside_a_better_whole(
    scores: tuple[float, float, float], by: str, is_named: bool
) -> None:
    score, low, high = scores
    part = Slice(
        by=by, name="topic status", rows=10, scored=10, judges=("tool_call",), gained=2, lost=0,
        score_before=0.2, score_before_low=0.1, score_before_high=0.4,
        score_after=score, score_after_low=low, score_after_high=high,
        p_value=0.5, verdict="undecided",
    )  # fmt: skip
    result = sample_result()
    after = dataclasses.replace(result.after, score=0.9, score_low=0.85, score_high=0.95)
    result = dataclasses.replace(result, after=after, slices=(part,))
    action = next_action(
        sample_config(), result, merge=None, card={}, folder=RUN, model=RUN / "model"
    )
    assert ("topic status" in action.text) == is_named
    assert action.command == SERVE


def test_the_same_rows_are_named_once_by_what_they_are() -> None:
    low, high = ({f"score_{when}{of}": 0.0 for of in ("", "_low")} for when in ("before", "after"))
    scores: dict[str, Any] = {**low, **high, "score_before_high": 0.4, "score_after_high": 0.4}
    of: dict[str, Any] = {
        "rows": 5,
        "scored": 5,
        "gained": 0,
        "lost": 0,
        "p_value": 1.0,
        "verdict": "undecided",
    }
    calls, short = (
        Slice(by=by, name=name, judges=("tool_call",), **of, **scores)
        for by, name in (("judge", "tool_call"), ("length", "1 to 16 tokens"))
    )
    result = sample_result()
    after = dataclasses.replace(result.after, score=0.9, score_low=0.85, score_high=0.95)
    result = dataclasses.replace(result, after=after, slices=(calls, short))
    action = next_action(
        sample_config(), result, merge=None, card={}, folder=RUN, model=RUN / "model"
    )
    assert " tools (0.0%)" in action.text
    assert "tokens" not in action.text


@pytest.mark.parametrize(("price", "costs"), [(3.0, [None, 6.0, 0.75]), (None, [None] * 3)])
def test_a_step_costs_what_its_accelerators_do(
    price: float | None, costs: list[float | None]
) -> None:
    config = sample_config(parallel={"nproc_per_node": 4}, cluster={"gpu_hour_price": price})
    seconds = (("plan", 9.0), ("train", 1800.0), ("evaluate", 900.0))
    run = RunArtifacts("a", config, RUN, step_seconds=seconds)
    found = step_costs(run)
    assert [each.hours for each in found] == [0, 2, 0.25]
    assert [each.price for each in found] == costs

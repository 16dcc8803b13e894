"""Intervals and tests give the values of the textbooks."""

from __future__ import annotations

import pytest

from canvastune.evaluation.scoring import compare, mcnemar, wilson


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (1, 64, 0.0028, 0.0833)],
)
def test_intervals_are_wilsons(correct: int, rows: int, low: float, high: float) -> None:
    assert wilson(correct, rows) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (5, 5, 1.0)])
def test_rows_that_changed_are_compared_exactly(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)


@pytest.mark.parametrize(
    ("gained", "lost", "word"),
    [(0, 0, "undecided"), (5, 0, "undecided"), (6, 0, "better"), (0, 6, "worse"), (9, 1, "better"), (8, 2, "undecided")],
)
def test_a_model_is_called_better_only_where_chance_would_not_do(gained: int, lost: int, word: str) -> None:
    assert compare(gained, lost) == word

"""An answer is correct if GSM8K's code or the recipe's pattern says so; intervals and tests match
textbook values.
"""

from __future__ import annotations

import re

import pytest

from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.scoring import (
    compare,
    compile_pattern,
    extract_answer,
    is_correct,
    mcnemar,
    wilson,
)

GSM8K = compile_pattern(EvaluateConfig().answer_pattern)
# The reference's own, github.com/openai/grade-school-math, grade_school_math/dataset.py
REFERENCE = re.compile(r"#### (\-?[0-9\.\,]+)")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("16+2=18\n#### 18.", "18"),
        ("#### 1,234", "1234"),
        ("#### -1,234,567", "-1234567"),
        ("#### 5 no\n#### -3", "-3"),
        ("####12.5", "12.5"),
        ("#### 72.0", "72.0"),
        ("#### 72 apples", "72"),
        ("#### 72%", "72"),
        ("#### 072", "072"),
        ("### 72", None),
        ("#### $72", None),
        ("72 ####", None),
        ("#### seventy-two", None),
        ("#### .", None),
        ("#### ,", None),
        ("seventy-two", None),
        ("72", None),
        ("", None),
    ],
)
def test_answer_is_the_last_match_as_gsm8k_writes_numbers(text: str, answer: str | None) -> None:
    assert extract_answer(GSM8K, text) == answer


@pytest.mark.parametrize(
    "text",
    ["She has 2*36=72.\n#### 72", "#### 1,234", "#### -7", "#### 12.5", "#### $72", "72", "####"],
)
def test_answers_in_gsm8ks_format_are_extracted_as_by_its_own_code(text: str) -> None:
    found = REFERENCE.search(text)
    assert extract_answer(GSM8K, text) == (
        found.group(1).strip().replace(",", "") if found else None
    )


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("#### 1234.", "#### 1,234", True),
        ("#### 72.0", "#### 72", False),  # as text, as in the reference
        ("#### 7", "#### 72", False),
        ("#### 72\n#### 7", "#### 72", False),
        ("", "#### 72", False),
        ("#### .", "#### 72", False),
        ("#### 72", "no number", None),
        ("#### .", "#### .", None),
    ],
)
def test_rows_are_correct_wrong_or_not_scored(
    text: str, reference: str, correct: bool | None
) -> None:
    assert is_correct(GSM8K, text, extract_answer(GSM8K, reference)) is correct


def test_dollar_sign_is_not_part_of_an_answer() -> None:
    assert extract_answer(re.compile("is (.+)"), "It is $1,000.") == "1000"


def test_a_group_that_did_not_match_finds_nothing() -> None:
    assert extract_answer(re.compile(r"yes|answer: (\d+)"), "answer: 5, yes") is None


def test_case_matters_unless_the_pattern_says_otherwise() -> None:
    strict, loose = compile_pattern(r"\b(Yes|No|yes|no)\b"), compile_pattern(r"(?i)\b(yes|no)\b")
    assert is_correct(strict, "Yes.", extract_answer(strict, "yes")) is False
    assert is_correct(loose, "Yes.", extract_answer(loose, "yes")) is True
    assert is_correct(loose, "Yes, but NO", extract_answer(loose, "yes")) is False


@pytest.mark.parametrize("pattern", ["(", "####", "(?:x)", ""])
def test_a_pattern_that_cannot_score_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.answer_pattern.*" + re.escape(repr(pattern))):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 64, 0.0028, 0.0833),
    ],
)
def test_intervals_are_wilsons(correct: int, rows: int, low: float, high: float) -> None:
    assert wilson(correct, rows) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (5, 0, 0.0625), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (5, 5, 1.0)],
)
def test_changed_rows_are_compared_exactly(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    [
        (0, 0, "undecided"),
        (5, 0, "undecided"),
        (6, 0, "better"),
        (0, 6, "worse"),
        (9, 1, "better"),
        (8, 2, "undecided"),
    ],
)
def test_a_model_is_better_only_if_chance_is_unlikely(gained: int, lost: int, verdict: str) -> None:
    assert compare(gained, lost) == verdict

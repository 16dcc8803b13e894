"""Right is what GSM8K calls right, or what the recipe's own pattern finds."""

from __future__ import annotations

import re

import pytest

from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.scoring import compile_pattern, find_answer, is_right

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
    assert find_answer(GSM8K, text) == answer


@pytest.mark.parametrize("text", ["She has 2*36=72.\n#### 72", "#### 1,234", "#### -7", "#### 12.5", "#### $72", "72", "####"])
def test_answers_in_gsm8ks_form_are_read_as_its_own_code_reads_them(text: str) -> None:
    found = REFERENCE.search(text)
    assert find_answer(GSM8K, text) == (found.group(1).strip().replace(",", "") if found else None)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
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
def test_rows_are_right_wrong_or_not_scored(text: str, reference: str, right: bool | None) -> None:
    assert is_right(GSM8K, text, find_answer(GSM8K, reference)) is right


def test_dollar_sign_is_not_part_of_an_answer() -> None:
    assert find_answer(re.compile("is (.+)"), "It is $1,000.") == "1000"


def test_a_group_that_took_no_part_found_nothing() -> None:
    assert find_answer(re.compile(r"yes|answer: (\d+)"), "answer: 5, yes") is None


def test_case_matters_unless_the_pattern_says_otherwise() -> None:
    strict, loose = compile_pattern(r"\b(Yes|No|yes|no)\b"), compile_pattern(r"(?i)\b(yes|no)\b")
    assert is_right(strict, "Yes.", find_answer(strict, "yes")) is False
    assert is_right(loose, "Yes.", find_answer(loose, "yes")) is True
    assert is_right(loose, "Yes, but NO", find_answer(loose, "yes")) is False


@pytest.mark.parametrize(
    ("pattern", "said"), [("(", "not a regular expression"), ("####", "no group"), ("(?:x)", "no group"), ("", "no group")]
)
def test_a_pattern_that_cannot_judge_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.answer_pattern") as error:
        compile_pattern(pattern)
    assert said in str(error.value)

"""An answer is correct if GSM8K's code or the recipe's pattern says so; intervals and tests match
textbook values.
"""

from __future__ import annotations

import re
import time
from decimal import Decimal

import pytest

from canvastune.config import parse_config
from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.normalization import normalized_answer
from canvastune.evaluation.scoring import (
    answer_part,
    extract_answer,
    find_reference,
    is_correct,
    mcnemar,
    paired_test,
    wilson,
)

GSM8K = re.compile(EvaluateConfig().answer_pattern or "")
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


def judge(pattern: re.Pattern[str], text: str, reference: str) -> tuple[bool, bool]:
    """Return whether an answer is right: strictly, and normalized."""
    found = find_reference(pattern, reference)
    assert found is not None
    return is_correct(pattern, text, found)


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("#### 1234.", "#### 1,234", True),
        ("#### 72.0", "#### 72", False),  # as text, as in the reference
        ("#### 7", "#### 72", False),
        ("#### 72\n#### 7", "#### 72", False),
        ("", "#### 72", False),
        ("#### .", "#### 72", False),
        ("#### 18-20", "#### 18", True),  # what follows the group is not looked at
    ],
)
def test_strictly_an_answer_is_compared_as_text(text: str, reference: str, correct: bool) -> None:
    assert judge(GSM8K, text, reference)[0] is correct


@pytest.mark.parametrize("reference", ["no number", "#### ."])
def test_a_row_whose_reference_has_no_answer_is_not_scored(reference: str) -> None:
    assert find_reference(GSM8K, reference) is None
    assert find_reference(None, "#### 72") is None


RIGHT = {
    "#### 18": [
        *("$18", "$18.00", "18.00", "**18**", r"\boxed{18}", "+18", ": 18", "= 18", "18."),
        *("€18", "18 €", "$ 18", "$18$", r"\(18\)", r"$\boxed{18}$", r"\boxed{\$18}", "**$18.00**"),
        *("= **18**", "`18`", "*18*", "018", "\u200918", ": **$18**", r"\boxed{\text{18}}"),
        *(
            "18 apples",
            "18%",
            "18, because 9 + 9 = 18",
            "18\nThat is 3-4.",
        ),  # as the pattern allows
    ],
    "#### -5": [
        *(
            "-$5",
            "\u22125",
            "$-5",
            "\u2212$5.00",
            "**-5**",
            "-5.0",
            r"\boxed{-5}",
            "= -5",
            ": \u22125",
        ),
    ],
    "#### 1,234": [
        *("1 234", "1\u202f234", "1\u2009234", "1\u00a0234", "1,234", "1234", "$1,234.00", "1'234"),
        *(r"1\,234", r"1{,}234"),
    ],
    "#### 0.5": [".5", "0.50", "$0.5"],
    "#### 18-20": ["18-20", "**18-20**", "$18-20"],
}
WRONG = {
    "#### 18": [
        *(
            "18-20",
            "18 - 20",
            "18\u201320",
            "$18-$20",
            "**18**-20",
            "18/2",
            "18 / 2",
            "18*2",
            "18**2",
        ),
        *("18^2", "18 + 2", "18.5", "180", "18e3", "18:30", "18 million", "18 or 20", "18 to 20"),
        *("18k", "18M", "18²", "18½", "18^{2}", "18—20", "18 and 20", "18 x 2", "18 · 2", "18=20"),
        *(r"18 \cdot 2", r"18 \times 2", "18 bn"),
        *("18 20", "18 234", "-18", "1 8", "9+9", "9 +9", "", "eighteen", "."),
    ],
    "#### 1,234": ["1.234", "1,23", "1 23 4", "1,234.567", "12,34"],
    "#### 9": ["18/2"],
    "#### -5": ["5", "$5", "3-5", "-5-6"],
}


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [(reference, answer, True) for reference in RIGHT for answer in RIGHT[reference]]
    + [(reference, answer, False) for reference in WRONG for answer in WRONG[reference]],
)
def test_the_normalized_figure_measures_the_number(
    reference: str, answer: str, right: bool
) -> None:
    assert judge(GSM8K, f"She has 48/2=24.\n#### {answer}", reference)[1] is right


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"\\boxed\{(.+?)\}", r"So \boxed{$1,234$}.", Decimal(1234)),  # it names a mark itself
        (r"Total: \$(\d+)", "Total: $18.", Decimal(18)),
        (r"#### (\-?[0-9\.\,]+)", "#### : $18", Decimal(18)),  # GSM8K's own
        (r"[Aa]nswer:\s*(.+)", "Answer: **Paris**.", "paris"),
        (r"[Aa]nswer:\s*(.+)", "answer:  New\u00a0 York ", "new york"),
        (r"[Aa]nswer:\s*(.+)", "Answer: 1,234 apples", "1234 apples"),
        (r"\b(yes|no)\b", "The answer is 'yes'", "yes"),
        (r"(\d+)", "From 1.234 on", Decimal("1.234")),  # never half a number
        (r"(\d+)", "18-20", "18-20"),
        (r"####\s*(-?[\d.,]+)$", "#### **18**", Decimal(18)),
        (r"####\s*(-?[\d.,]+)$", "#### 18 kg", None),  # no unit is allowed
        (r"####\s*(-?[\d.,]+)(?: ?kg)?$", "#### 18.0 kg", Decimal(18)),
        (r"yes|answer: (\d+)", "answer: 5, yes", None),
        (r"call:(\w+)\{", "<|tool_call>call:Get{a:1}<tool_call|>", "get"),
    ],
)
def test_the_normalized_answer_is_defined_for_every_pattern(
    pattern: str, text: str, answer: Decimal | str | None
) -> None:
    assert normalized_answer(re.compile(pattern), text) == answer


def test_a_long_text_is_normalized_in_linear_time() -> None:
    text = f"{'_' * 20_000} {'` ' * 10_000} {'1 ' * 10_000} {'9-' * 10_000} #### $18"
    started = time.perf_counter()
    assert normalized_answer(GSM8K, text) == Decimal(18)
    assert time.perf_counter() - started < 5


def test_thinking_is_not_scored() -> None:
    assert answer_part("<|channel>thought\n#### 17\n<channel|>It is\n#### 18") == "It is\n#### 18"
    assert answer_part("#### 17 ... <channel|>#### 18") == "#### 18"  # opened by the prompt
    assert answer_part("<|channel>thought\n#### 18") == ""
    assert answer_part(" #### 18 ") == "#### 18"


def test_dollar_sign_is_not_part_of_an_answer() -> None:
    assert extract_answer(re.compile("is (.+)"), "It is $1,000.") == "1000"


def test_a_group_that_did_not_match_finds_nothing() -> None:
    assert extract_answer(re.compile(r"yes|answer: (\d+)"), "answer: 5, yes") is None


@pytest.mark.parametrize("pattern", ["(?s)(.*)", r"(?m)^(.*)$"])
def test_a_pattern_that_also_matches_nothing_finds_the_last_text(pattern: str) -> None:
    reference = "It is late.\nPlease wait 3 days.\n"
    assert judge(re.compile(pattern), reference, reference) == (True, True)
    assert judge(re.compile(pattern), reference.replace("3", "4"), reference) == (False, False)


def test_case_matters_unless_the_pattern_says_otherwise() -> None:
    strict, loose = re.compile(r"\b(Yes|No|yes|no)\b"), re.compile(r"(?i)\b(yes|no)\b")
    assert judge(strict, "Yes.", "yes") == (False, True)
    assert judge(loose, "Yes.", "yes") == (True, True)
    assert judge(loose, "Yes, but NO", "yes") == (False, False)


@pytest.mark.parametrize("pattern", ["(", "####", "(?:x)", "(?P<a>"])
def test_a_pattern_that_cannot_score_is_refused_with_the_recipe(pattern: str) -> None:
    tree = {"name": "x", "data": {"source": "x"}, "evaluate": {"answer_pattern": pattern}}
    with pytest.raises(UserError, match=r"evaluate\.answer_pattern.*" + re.escape(repr(pattern))):
        parse_config(tree)


@pytest.mark.parametrize("pattern", [None, ""])
def test_no_pattern_switches_exact_match_off(pattern: str | None) -> None:
    tree = {"name": "x", "data": {"source": "x"}, "evaluate": {"answer_pattern": pattern}}
    assert parse_config(tree).evaluate.answer_pattern is None


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
    assert wilson(correct / rows, rows) == pytest.approx((low, high), abs=1e-4)


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
    assert paired_test([1] * gained + [-1] * lost)[1] == verdict

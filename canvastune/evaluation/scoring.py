"""How sure a count of right answers is, and a change of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from canvastune.errors import UserError

SIGNIFICANCE_LEVEL = 0.05  # p below which a change is called one
_Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion: sound for few rows and at 0 and 1 too."""
    share, z = correct / rows, _Z95
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: how likely so uneven a split of the rows that changed is if neither model is better."""
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def compare(gained: int, lost: int) -> str:
    """What the rows that changed say: "better", "worse", or "undecided" where chance could have split them so."""
    if mcnemar(gained, lost) >= SIGNIFICANCE_LEVEL:
        return "undecided"
    return "better" if gained > lost else "worse"


SIDES = ("before", "after")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`evaluate.answer_pattern`. Raises: UserError, not a regular expression, or one without a group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"evaluate.answer_pattern: {pattern!r} is not a regular expression ({error}). Correct it") from None
    if compiled.groups < 1:
        raise UserError(f"evaluate.answer_pattern: {pattern!r} has no group. Put the answer in parentheses, as in '####\\s*(.+)'")
    return compiled


def find_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """Group 1 of the pattern's last match, as GSM8K compares: without thousands separators, dollar sign and full stop; None: no match.

    What is left is compared as text, so 72 and 72.0 differ, as they do in GSM8K's reference; regardless of case where the pattern is
    itself, by `(?i)`.
    """
    matches = list(pattern.finditer(text))
    if not matches or matches[-1].group(1) is None:
        return None
    found = matches[-1].group(1).replace(",", "").replace("$", "").strip().rstrip(".")
    return (found.casefold() if pattern.flags & re.IGNORECASE else found) or None


def is_right(pattern: re.Pattern[str], text: str, reference: str | None) -> bool | None:
    """Whether the pattern finds in the text what it found in the reference; None where it found nothing there: not scored."""
    return None if reference is None else find_answer(pattern, text) == reference


def score(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact match with Wilson's 95% intervals, and the comparison row by row, of answers with `correct_before` and `correct_after`."""
    scored = [answer for answer in answers if answer["correct_before"] is not None]
    result: dict[str, Any] = {"rows": len(answers), "scored": len(scored)}
    for side in SIDES:
        correct = sum(answer[f"correct_{side}"] for answer in scored)
        low, high = wilson(correct, len(scored))
        result |= {f"correct_{side}": correct, f"exact_match_{side}": correct / len(scored)}
        result |= {f"exact_match_{side}_low": low, f"exact_match_{side}_high": high}
    gained = sum(answer["correct_after"] and not answer["correct_before"] for answer in scored)
    lost = sum(answer["correct_before"] and not answer["correct_after"] for answer in scored)
    return result | {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost), "verdict": compare(gained, lost)}

"""Exact match of answers, with its uncertainty."""

from __future__ import annotations

import math
import re

from canvastune.errors import UserError

SIGNIFICANCE_LEVEL = 0.05  # a difference with a smaller p is called one
_Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion: valid for few rows, and at 0 and 1."""
    share, z = correct / rows, _Z95
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    It is the probability of a split of the changed rows at least this uneven if neither model is
    better.
    """
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def compare(gained: int, lost: int) -> str:
    """Return "better", "worse", or "undecided" if chance could have split the changed rows so."""
    if mcnemar(gained, lost) >= SIGNIFICANCE_LEVEL:
        return "undecided"
    return "better" if gained > lost else "worse"


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile `evaluate.answer_pattern`.

    Raises:
        UserError: not a regular expression, or one without a group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"evaluate.answer_pattern: invalid regular expression {pattern!r}: {error}",
            hint="Correct the pattern.",
        ) from None
    if compiled.groups < 1:
        raise UserError(
            f"evaluate.answer_pattern: found no group in {pattern!r}, expected the answer in one",
            hint="Put the answer in parentheses, as in '####\\s*(.+)'.",
        )
    return compiled


def extract_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """Return group 1 of the pattern's last match, normalized as by GSM8K; None without a match.

    Thousands separators, dollar sign and final period are removed. The rest is compared as text, so
    72 and 72.0 differ, as they do in GSM8K's reference. A pattern with `(?i)` ignores case too.
    """
    matches = list(pattern.finditer(text))
    if not matches or matches[-1].group(1) is None:
        return None
    found = matches[-1].group(1).replace(",", "").replace("$", "").strip().rstrip(".")
    return (found.casefold() if pattern.flags & re.IGNORECASE else found) or None


def is_correct(pattern: re.Pattern[str], text: str, reference: str | None) -> bool | None:
    """Return whether the text's answer is the reference's; None without one (not scored)."""
    return None if reference is None else extract_answer(pattern, text) == reference

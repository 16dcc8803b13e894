"""Exact match of answers, with its uncertainty."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from canvastune.evaluation.normalization import normalized_answer

SIGNIFICANCE_LEVEL = 0.05  # a difference with a smaller p is called one
_Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval
_THINKING, _THINKING_END = "<|channel>", "<channel|>"  # as the released chat template writes them


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


@dataclass(frozen=True)
class Reference:
    """The answer of a row's reference, as the two figures of exact match compare it."""

    strict: str
    normalized: Decimal | str | None


def find_reference(pattern: re.Pattern[str] | None, text: str) -> Reference | None:
    """Return the answer of a reference; None without one: the row is not scored."""
    strict = extract_answer(pattern, text) if pattern else None
    if pattern is None or strict is None:
        return None
    return Reference(strict, normalized_answer(pattern, text))


def is_correct(pattern: re.Pattern[str], text: str, reference: Reference) -> tuple[bool, bool]:
    """Return whether the text's answer is the reference's: strictly, and without typography."""
    normalized = normalized_answer(pattern, text)
    strict = extract_answer(pattern, text) == reference.strict
    return strict, normalized is not None and normalized == reference.normalized


def answer_part(text: str) -> str:
    """Return the text after the model's thinking, which is scored; "" if it thinks to the end."""
    if text.rfind(_THINKING) > text.rfind(_THINKING_END):
        return ""
    return text.rpartition(_THINKING_END)[2].strip()

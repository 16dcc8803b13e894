"""Exact match of answers, and the uncertainty of scores."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from canvastune.evaluation.normalization import last_match, normalized_answer

SIGNIFICANCE_LEVEL = 0.05  # a difference with a smaller p is called one
_Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval
_EXPECTED_CHANGE = 0.2  # of the rows: an evaluation should see a change of this size
_FEWEST_FOR_T = 4  # rows: of fewer, a mean says nothing
_ENUMERATED = 14  # rows whose 2**14 signs are all tried
_DRAWS, _DRAWS_AT_ONCE = 20_000, 2_000
THINKING, THINKING_END = "<|channel>", "<channel|>"  # as the released chat template writes them


def wilson(share: float, rows: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion: valid for few rows, and at 0 and 1."""
    z = _Z95
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def share_interval(shares: Sequence[float], repeats: int) -> tuple[float, float]:
    """Return the 95% interval of the mean of shares: right answers of each row, of `repeats`.

    Wilson's interval for as many independent answers as the spread between the rows is worth: one a
    row if a row's answers are all alike, `repeats` if they vary as much within a row as between
    rows. So it counts the choice of the rows as well as the noise of sampling.
    """
    rows = len(shares)
    share = sum(shares) / rows
    worth = float(rows)
    if repeats > 1 and rows > 1 and 0 < share < 1:
        spread = sum((each - share) ** 2 for each in shares) / (rows - 1)
        most = float(rows * repeats)
        worth = most if not spread else min(max(rows, share * (1 - share) * rows / spread), most)
    return wilson(share, worth)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean of scores from 0 to 1, one a row: Student's t."""
    rows = len(scores)
    if rows < _FEWEST_FOR_T:
        return 0.0, 1.0
    mean = sum(scores) / rows
    spread = math.sqrt(sum((each - mean) ** 2 for each in scores) / (rows - 1))
    half = _student95(rows - 1) * spread / math.sqrt(rows)
    return max(0.0, mean - half), min(1.0, mean + half)


def _student95(freedom: int) -> float:
    """Return Student's 97.5% quantile: Cornish and Fisher's series, within 0.3% from 3 degrees."""
    z, n = _Z95, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p of the paired permutation test on the differences of rows.

    It is the probability of a sum of differences at least this far from 0 if each of them might as
    well have the other sign. For differences of -1, 0 and 1 it is McNemar's exact test. Up to
    2**14 sign patterns are all counted, of more 20,000 are drawn, always the same.
    """
    import numpy as np  # here: the commands that only compare runs do not need it

    values = np.array([each for each in differences if each], dtype=np.float64)
    if not len(values):
        return 1.0
    least = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if len(values) <= _ENUMERATED:
        patterns = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ values) >= least))
    draw, reached = np.random.default_rng(0), 0
    for _ in range(_DRAWS // _DRAWS_AT_ONCE):
        signs = 2 * draw.integers(0, 2, (_DRAWS_AT_ONCE, len(values)), dtype=np.int8) - 1
        reached += int(np.sum(np.abs(signs @ values) >= least))
    return (1 + reached) / (1 + _DRAWS)


def count_changes(differences: Sequence[float]) -> tuple[int, int]:
    """Return in how many rows a score rose, and in how many it fell."""
    return sum(each > 0 for each in differences), sum(each < 0 for each in differences)


def paired_test(differences: Sequence[float]) -> tuple[float, str]:
    """Return p and verdict of a change by row: "better", "worse", or "undecided"."""
    gained, lost = count_changes(differences)
    binary = all(each in (-1, 0, 1) for each in differences)
    p = mcnemar(gained, lost) if binary else sign_flip(differences)
    if p >= SIGNIFICANCE_LEVEL:
        return p, "undecided"
    return p, "better" if sum(differences) > 0 else "worse"


def too_few(scored: int) -> list[str]:
    """Say where so few rows are scored that only a large change can be distinguished from chance."""
    needed = next(n for n in itertools.count(1) if mcnemar(n, 0) < SIGNIFICANCE_LEVEL)
    if not 0 < scored * _EXPECTED_CHANGE < needed:
        return []
    rows = f"{scored} scored {'row is' if scored == 1 else 'rows are'}"
    if scored < needed:
        return [f"{rows} too few to show anything: the paired test needs {needed} that change"]
    return [
        f"{rows} few: only if {needed} of them ({needed / scored:.0%}) get better and none worse "
        "does the paired test see a difference"
    ]


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    It is the probability of a split of the changed rows at least this uneven if neither model is
    better.
    """
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def extract_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """Return group 1 of the pattern's last match, normalized as by GSM8K; None without a match.

    Thousands separators, dollar sign and final period are removed. The rest is compared as text, so
    72 and 72.0 differ, as they do in GSM8K's reference. A pattern with `(?i)` ignores case too.
    """
    match = last_match(pattern, text)
    if match is None or match.group(1) is None:
        return None
    found = match.group(1).replace(",", "").replace("$", "").strip().rstrip(".")
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
    if text.rfind(THINKING) > text.rfind(THINKING_END):
        return ""
    return text.rpartition(THINKING_END)[2].strip()

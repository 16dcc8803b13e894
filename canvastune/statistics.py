"""How sure a count of right answers is, and a change of it."""

from __future__ import annotations

import math

SURE = 0.05  # p below which a change is called one
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


def verdict(gained: int, lost: int) -> str:
    """What the rows that changed say: "better", "worse", or "undecided" where chance could have split them so."""
    if mcnemar(gained, lost) >= SURE:
        return "undecided"
    return "better" if gained > lost else "worse"

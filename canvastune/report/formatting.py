"""Format numbers for the page, equal quantities alike, and mark how two texts differ."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup, escape

ABSENT = "not recorded"


def whole(value: float | None) -> str:
    """Format an integer: 1,234,567."""
    return ABSENT if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """Format to three significant digits: 1.5e-4, 0.812, 12.4, 1,230, 1.23 M."""
    if value is None:
        return ABSENT
    for size, name in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    if 0 < abs(value) < 1e-2:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def hours(value: float) -> str:
    """Format to three significant digits: 0.083, 12.4, 1,230; small values as "under 0.01"."""
    return short(value) if value >= 0.01 else "under 0.01"


def money(value: float) -> str:
    """Format an amount of money: 0.042, 12.40, 1,230."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def loss(value: float | None) -> str:
    """Format a loss to three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    """Format a share as a percentage with one decimal."""
    return ABSENT if share is None else f"{100 * share:.1f}%"


def p_value(p: float) -> str:
    """Format a p-value: p = 0.03, p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def size(value: float | None) -> str:
    """Format bytes in GB (1e9) or MB."""
    if value is None:
        return ABSENT
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def flops(rate: float) -> str:
    """Format TFLOP/s, below one as GFLOP/s."""
    return f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1000 * rate:.3g} GFLOP/s"


def duration(seconds: float | None) -> str:
    """Format seconds: 2 h 5 min, 3 min 12 s, 41 s, 0.25 s."""
    if seconds is None:
        return ABSENT
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def timestamp(unix: float | None) -> str:
    """Format seconds since 1970 as date and time, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix)) if unix else ABSENT


def quantity(value: float | None, unit: str) -> str:
    """Format a value in its unit, "s", "bytes" or "share"."""
    return {"s": duration, "bytes": size, "share": percent}[unit](value)


def breakable(key: str) -> Markup:
    """Let lines break after a period or underscore of a key, and not in a word of it."""
    return Markup(re.sub(r"(?<=[._])", "<wbr>", escape(key)))


FILTERS: dict[str, Callable[..., Any]] = {
    "whole": whole,
    "short": short,
    "hours": hours,
    "money": money,
    "loss": loss,
    "percent": percent,
    "p_value": p_value,
    "size": size,
    "flops": flops,
    "duration": duration,
    "timestamp": timestamp,
    "quantity": quantity,
    "breakable": breakable,
}


_MIN_COMMON = 0.3  # share of common words; below it, marks would only clutter the texts


def mark_differences(before: str, after: str) -> tuple[Markup, Markup]:
    """Escape both texts and mark the words that only one has, with `<del>` and `<ins>`.

    Nothing is marked where the texts have little in common.
    """
    pattern = r"\s+|\w+|[^\w\s]"
    words, others = re.findall(pattern, before), re.findall(pattern, after)
    # "autojunk", the default, skips frequent words of long texts: an untrained model's
    # "of of of" would take seconds.
    match = SequenceMatcher(None, words, others)
    blocks = match.get_matching_blocks()
    common = sum(not word.isspace() for at, _, size in blocks for word in words[at : at + size])
    if 2 * common < _MIN_COMMON * sum(not word.isspace() for word in words + others):
        return escape(before), escape(after)
    left, right = Markup(), Markup()
    for kind, start, stop, other_start, other_stop in match.get_opcodes():
        same = kind == "equal"
        left += _wrap("del", "".join(words[start:stop]), same)
        right += _wrap("ins", "".join(others[other_start:other_stop]), same)
    return left, right


def _wrap(tag: str, text: str, plain: bool) -> Markup:
    if plain or not text:
        return escape(text)
    return Markup("<{0}>{1}</{0}>").format(Markup(tag), text)

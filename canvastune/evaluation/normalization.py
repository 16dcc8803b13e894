r"""The answer of a text without its typography: `$18.00`, `**18**` and `\boxed{18}` are 18.

Own code: math-verify 0.9.0 misjudges these cases (docs/evaluation.md has the table and the rule).
"""

from __future__ import annotations

import re
from decimal import Decimal

_CURRENCY = r"[$€£¥₹₽₩₺₴₫฿]"
_SPACES = "\u00a0\u2007\u2009\u202f"  # no-break, figure and thin spaces
_MARKS = str.maketrans(f"\u2212‘’“”{_SPACES}", "-''\"\"" + " " * len(_SPACES))
_LATEX_SPACE = re.compile(r"\\[,!;: ]|\{,\}")  # `1\,234` and `1{,}234` are 1,234 in LaTeX
_LATEX_DELIMITER = re.compile(r"\\[()\[\]]|\\(?=[$%])")
_LATEX_BOX = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_EMPHASIS = re.compile(r"(?<![\w)*`])(\*{1,3}|_{1,3}|`+)(?=\S)(.+?)(?<=\S)\1(?![\w*`])")
_NUMBER = re.compile(
    rf"""
    (?<![\w.,])
    (?P<sign>[-+–])?
    (?P<currency>{_CURRENCY}\s?)?
    (?P<inner>(?<={_CURRENCY})[-+])?
    (?P<digits>\d{{1,3}}(?P<comma>[, '])\d{{3}}(?:(?P=comma)\d{{3}})*(?!\d) | \d+ | (?=\.\d))
    (?P<fraction>\.\d+)?
    (?!\d)
    (?:\s?{_CURRENCY}(?!\s?\d))?
    """,
    re.VERBOSE,
)
_LEAD = re.compile(r"[:=]\s*(?=[-.]?\d)")  # `: 18` and `= 18`
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
# What makes a number another one, a range or an expression, on its right and on its left.
_CONTINUED = re.compile(
    rf"""
    (?: [.,:]\d | e[-+]?\d | [ ]\d | [²³¹⁰⁴-⁹¼-¾⅐-⅞]
      | \s*(?:[-–—+/×÷·^±=]|\*{{1,2}}|\\(?:times|cdot|div|pm)\b|\b(?:to|or|and|x)\b)
        \s*[-+({{\\]?{_CURRENCY}?[\d.\\]
      | (?-i:[kKMB])\b
      | [ ]?(?:hundred|thousand|million|billion|trillion|dozen|mn|bn)\b )
    \S*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CONTINUES = re.compile(r"\S*\d(?:[.,:]|\s*[-–+/*×÷^±]\s*)$")
_LATEX_BOX_DEPTH = 4
_LONGEST_NUMBER = 40  # characters on the left of an answer that may belong to it


def normalized_answer(pattern: re.Pattern[str], text: str) -> Decimal | str | None:
    r"""Return what `evaluate.answer_pattern` finds in a text without its typography, or None.

    The pattern is applied to the text without currency signs, emphasis, `\boxed{}`, thousands
    separators, plus signs and trailing zeros, with U+2212 as a minus sign. Where it finds nothing,
    a colon or an equals sign before a number is left out too; where that finds nothing either, it
    is applied to the text as it stands, so that a pattern may name any of these marks itself.

    Of the last match, group 1 is the answer, together with what makes it another number: `18-20`,
    `18/2` and `18 million` are not 18. Words after the number are a matter of the pattern: one that
    ends with `$` allows none.

    Returns:
        A number, which is compared by value, or other text, in lower case and with single spaces.
    """
    plain = _without_typography(text)
    for candidate in (plain, _LEAD.sub("", plain), text):
        match = last_match(pattern, candidate)
        if match is not None and match.group(1) is not None:
            return normalized_value(_whole_answer(match, candidate))
    return None


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the pattern's last match that is not empty, None without one.

    A pattern such as `(.*)` matches again, and nothing, at the end of the text.
    """
    return next((match for match in reversed(list(pattern.finditer(text))) if match.group()), None)


def _without_typography(text: str) -> str:
    text = _LATEX_DELIMITER.sub("", _LATEX_SPACE.sub(_latex_space, text.translate(_MARKS)))
    for _ in range(_LATEX_BOX_DEPTH):  # boxes may be nested
        text, found = _LATEX_BOX.subn(r"\1", text)
        if not found:
            break
    return _NUMBER.sub(_plain_number, _EMPHASIS.sub(r"\2", text))


def _latex_space(match: re.Match[str]) -> str:
    return "," if match.group() == "{,}" else " "


def _plain_number(match: re.Match[str]) -> str:
    """Rewrite one number as `-1234.5`: no separators, no currency, no trailing zeros."""
    before = match.string[: match.start()].rstrip()
    if match["sign"] and before and (before[-1].isdigit() or before[-1] in ")]}"):
        return match.group()  # a minus or plus between two numbers
    negative = ((match["sign"] or "+") != "+") != ((match["inner"] or "+") != "+")
    whole = re.sub(r"\D", "", match["digits"])
    fraction = (match["fraction"] or "").rstrip("0").rstrip(".")
    return f"{'-' if negative else ''}{whole}{fraction}" if whole or fraction else "0"


def _whole_answer(match: re.Match[str], text: str) -> str:
    answer = str(match.group(1))
    if not _PLAIN_NUMBER.fullmatch(answer.strip()):
        return answer
    # What the pattern matched around its group, a unit for example, is allowed by it.
    left, right = text[: match.start()], text[match.end() :]
    after = _CONTINUED.match(right)
    at_start = match.start() == match.start(1)
    before = _CONTINUES.search(left[-_LONGEST_NUMBER:]) if at_start else None
    return f"{before.group() if before else ''}{answer}{after.group() if after else ''}"


def normalized_value(answer: str) -> Decimal | str | None:
    """Return a whole text without its typography: a number, or other text; None if it is empty."""
    text = " ".join(_without_typography(answer).split()).strip("\"'").rstrip(".,;:").casefold()
    return Decimal(text) if _PLAIN_NUMBER.fullmatch(text) else text or None

"""Judges as a recipe names them: `chrf`, `pattern:Answer: (.+)`, `python:FILE.py:FUNCTION`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from canvastune.config.strict import InvalidSetting

JUDGES = (
    "pattern",  # group 1 of a regular expression's last match: evaluate.answer_pattern, or its own
    "number",  # the last number, by value and without typography
    "text",  # the whole text
    "json",  # the JSON object or list, by value
    "tool_call",  # name and arguments of every call
    "chrf",  # how near the text comes, 0 to 1
    "model",  # what a model behind an OpenAI-compatible address says, 0 to 1
    "python",  # what the user's function says
)
_PYTHON = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


def check_pattern(key: str, value: str) -> str:
    """Return a regular expression with the answer in its group 1. Raises: InvalidSetting."""
    try:
        groups = re.compile(value).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidSetting(
            f"{key}: invalid regular expression {value!r}: {error}",
            hint="Correct the pattern; in YAML, put it in single quotes.",
        ) from None
    if groups < 1:
        raise InvalidSetting(
            f"{key}: found no group in {value!r}, expected the answer in one",
            hint="Put the answer in parentheses, as in '####\\s*(.+)'.",
        )
    return value


def split_judge(name: str) -> tuple[str, str]:
    """Return the kind of a judge and what follows its colon, "" if nothing does."""
    kind, _, argument = name.partition(":")
    return kind, argument


def python_place(argument: str) -> tuple[str, str]:
    """Return file and function of a judge of kind `python`. Raises: InvalidSetting."""
    found = _PYTHON.fullmatch(argument)
    if found is None:
        raise InvalidSetting(
            f"evaluate.judge: found 'python:{argument}', expected python:FILE.py:FUNCTION",
            hint="Name a file of yours and a function in it, as in python:judge.py:grade.",
        )
    return found["file"], found["function"]


def _check_judge(name: str) -> str:
    kind, argument = split_judge(name)
    if kind == "pattern" and argument:
        check_pattern("evaluate.judge", argument)
    elif kind == "python":
        python_place(argument)
    elif kind not in JUDGES or name != kind:
        plain = ", ".join(kind for kind in JUDGES if kind not in ("pattern", "python"))
        raise PydanticCustomError(
            "judge", f"a judge: {plain}, pattern, pattern:REGEX or python:FILE.py:FUNCTION"
        )
    return name


JudgeName = Annotated[str, AfterValidator(_check_judge)]
# A single text is read as a list of one.
AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
JudgeNames = Annotated[tuple[JudgeName, ...], AsList]

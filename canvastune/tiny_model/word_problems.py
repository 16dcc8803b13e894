"""Word problems that a tiny model learns."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from canvastune.errors import UserError
from canvastune.io.atomic import replace_text

NAMES = ("Tom", "Ana", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida", "Kim", "Joe")
THINGS = (
    "apples",
    "books",
    "coins",
    "pens",
    "cards",
    "eggs",
    "stamps",
    "shells",
    "cups",
    "balls",
    "nuts",
    "keys",
)


def _change(rng: random.Random) -> tuple[str, str]:
    """Write a problem in which someone gets or loses some.

    Numbers appear in the order of their use.
    """
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.5:
        first, second = rng.randint(1, 9), rng.randint(1, 9)
        verb, sign, result, end = rng.choice(("buys", "finds", "gets")), "+", first + second, "now"
        how = f"{verb} {second} more"
    else:
        first = rng.randint(2, 9)
        second = rng.randint(1, first - 1)
        verb, sign, result, end = (
            rng.choice(("gives", "sells", "loses")),
            "-",
            first - second,
            "left",
        )
        how = f"{verb} {second}"
    question = f"{name} has {first} {thing}. {name} {how}. How many {thing} does {name} have {end}?"
    return question, f"{first}{sign}{second}={result}\n#### {result}"


def _compare(rng: random.Random) -> tuple[str, str]:
    """Write a problem that compares two people, the smaller number first.

    The answer subtracts it from the second.
    """
    (one, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    small, large = sorted(rng.sample(range(1, 10), 2))
    asked = (
        f"more {thing} does {other} have than {one}"
        if rng.random() < 0.5
        else f"fewer {thing} does {one} have than {other}"
    )
    question = f"{one} has {small} {thing}. {other} has {large} {thing}. How many {asked}?"
    return question, f"{large}-{small}={large - small}\n#### {large - small}"


_COUNT_TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "How many",
        "parameters": {
            "type": "object",
            "properties": {"who": {"type": "string"}},
            "required": ["who"],
        },
    },
}


def _ask(rng: random.Random) -> dict[str, Any]:
    """Write a conversation in which a tool knows how many, and the answer repeats it."""
    name, thing, number = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9)
    asked = rng.choice(
        (
            f"How many {thing} does {name} have?",
            f"How many {thing} does {name} have now?",
            f"{name} has {thing}. How many?",
            f"{name} has {thing}. How many {thing} does {name} have?",
        )
    )
    call = {"name": "count", "arguments": {"who": name}}
    return {
        "tools": [_COUNT_TOOL],
        "messages": [
            {"role": "user", "content": asked},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": str(number)},
            {"role": "assistant", "content": f"{name} has {number} {thing}.\n#### {number}"},
        ],
    }


def _pair(write: Callable[[random.Random], tuple[str, str]]) -> Callable[..., dict[str, Any]]:
    return lambda rng: dict(zip(("question", "answer"), write(rng), strict=True))


KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "change": _pair(_change),
    "compare": _pair(_compare),
    "tools": _ask,
}


def write_problems(path: Path, kind: str, rows: int, seed: int) -> None:
    """Write `rows` different word problems of one kind as JSON lines.

    Kinds: `change` (someone gets or loses some; what the tiny base learns) and `compare` (who has
    how many more than whom; what `make run` adapts it to), {"question", "answer"} as GSM8K; `tools`
    (a tool is asked how many), {"tools", "messages"}. The same arguments give the same bytes.

    Raises:
        UserError: an unknown kind, or more rows than it has different problems.
    """
    if kind not in KINDS:
        raise UserError(
            f"kind of word problems: found {kind!r}, expected one of {', '.join(KINDS)}",
            hint="Choose one of them.",
        )
    rng = random.Random(f"{kind}-{seed}")
    problems: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(problems) < rows:
        row = KINDS[kind](rng)
        asked = row["question"] if "question" in row else row["messages"][0]["content"]
        misses = misses + 1 if asked in problems else 0
        if misses > 1000:
            raise UserError(
                f"word problems of kind {kind!r}: found about {len(problems)} different ones, "
                f"expected {rows}",
                hint="Request fewer rows.",
            )
        problems[asked] = row
    write_rows(path, problems.values())


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines: all of them, or no file."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))

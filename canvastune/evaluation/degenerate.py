"""Answers that say nothing: empty ones, and one short phrase again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from canvastune.evaluation.result import SIDES
from canvastune.evaluation.scoring import answer_part

_LONGEST_PHRASE = 4  # words of the phrase that repeats
_FEWEST_TIMES = 4  # that it is there: people write a word three times
_MANY = 0.03  # share of the tuned model's answers above which it is reported


def find_degeneration(text: str) -> Literal["empty", "repeated"] | None:
    """Return how an answer, without its thinking, says nothing; None: it does say something.

    The last repetition may be cut.
    """
    words = answer_part(text).split()
    if not words:
        return "empty"
    for size in range(1, min(_LONGEST_PHRASE, len(words) // _FEWEST_TIMES) + 1):
        if words[size:] == words[:-size]:
            return "repeated"
    return None


def describe_degenerate(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in a sentence how many answers of the tuned model say nothing; [] if they are few.

    Args:
        rows: lines of answers.jsonl. An answer that is equal to its reference is not counted.
    """
    side = SIDES[1]
    answers = [
        (answer[side], row["reference"])
        for row in rows
        for answer in (row, *row.get("repeats", ()))
    ]
    found = [find_degeneration(text) for text, reference in answers if text != reference]
    empty, repeated = found.count("empty"), found.count("repeated")
    if empty + repeated <= _MANY * len(answers):
        return []
    return [
        f"Of {len(answers)} answers of the tuned model, {empty} are empty and {repeated} only repeat "
        "a short phrase."
    ]

"""Made questions to the support desk of a shop, and its answers: the data of `make demo-support`.

A question is put together from an opening with the customer's name, what happened, and what is asked.
The answers follow the rules and the tone of one shop, and repeat the customer's name. A model of this size
copies no longer numbers, so the orders that are looked up have one digit. The base model has seen questions
of this kind, answered by other shops.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.tiny_model import write_rows

ROWS, TOOL_ROWS = 300, 20


@dataclass(frozen=True)
class Topic:
    """What customers ask about, and what the shop answers. Texts have {slots}."""

    group: str  # the column `topic` of the rows
    happened: list[str]
    asked: list[str]
    answer: str


_TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TOPICS = {name: Topic(**topic) for name, topic in _TEXTS["topics"].items()}
STATUS = Topic(**_TEXTS["status"])


def write_support_rows(path: Path, seed: int = 0) -> None:
    """Write 300 rows, of them 20 conversations with a tool, as JSON lines.

    {"topic", "messages"}, and {"tools"} where the desk has a tool. The same seed gives the same bytes.
    """
    rng = random.Random(f"support-{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < ROWS:
        write = _status_row if len(rows) < TOOL_ROWS else _prose_row
        row = write(rng)
        rows.setdefault(row["messages"][0]["content"], row)
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    write_rows(path, shuffled)


def draw_slots(rng: random.Random) -> dict[str, str]:
    """Draw a value for each slot of the texts."""
    slots = {
        "name": rng.choice(_TEXTS["names"]),
        "item": rng.choice(_TEXTS["items"]),
        "city": rng.choice(_TEXTS["cities"]),
        "order": str(rng.randint(1000, 9999)),
    }
    return slots | {"status": rng.choice(_TEXTS["statuses"]).format(**slots)}


def ask(topic: Topic, slots: dict[str, str], rng: random.Random) -> str:
    """Write a question about a topic."""
    parts = [rng.choice(topic.happened), rng.choice(topic.asked)]
    if rng.random() < 0.2:
        parts.reverse()
    return rng.choice(_TEXTS["openings"]).replace("{text}", " ".join(parts)).format(**slots)


def tool_row(
    question: str, tool: dict[str, Any], argument: str, response: str, answer: str
) -> dict[str, Any]:
    """Write a conversation in which the desk looks something up before it answers."""
    function = tool["function"]
    (parameter,) = function["parameters"]["properties"]
    call = {"name": function["name"], "arguments": {parameter: argument}}
    return {
        "tools": [tool],
        "messages": [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": response},
            {"role": "assistant", "content": answer},
        ],
    }


def _prose_row(rng: random.Random) -> dict[str, Any]:
    topic, slots = TOPICS[rng.choice(list(TOPICS))], draw_slots(rng)
    return {
        "topic": topic.group,
        "messages": [
            {"role": "user", "content": ask(topic, slots, rng)},
            {"role": "assistant", "content": _answer(topic, slots)},
        ],
    }


def _status_row(rng: random.Random) -> dict[str, Any]:
    status, order = rng.choice(_TEXTS["desk_statuses"]), str(rng.randint(2, 9))
    slots = draw_slots(rng) | {"status": status, "order": order}
    question, answer = ask(STATUS, slots, rng), _answer(STATUS, slots)
    row = tool_row(question, _TEXTS["find_order"], slots["order"], slots["status"], answer)
    return {"topic": STATUS.group, **row}


def _answer(topic: Topic, slots: dict[str, str]) -> str:
    return f"Hi {slots['name']}, {topic.answer.format(**slots)}"

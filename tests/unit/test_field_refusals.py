"""Data as teams have it that cannot be trained on is refused with the setting that helps, and that
setting does help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.field_rows import NAMES, Form, chat, prepare, refusal, says, user, write

REFUSED: dict[str, tuple[Form, str, str]] = {
    "images": (lambda name: {"images": [f"{name}.png"], **chat(name)}, "'images'", "text"),
    "an image among the parts": (
        lambda name: {"messages": [user([{"type": "image_url"}]), says(name)]},
        "image_url",
        "text",
    ),
    "choices": (
        lambda name: {"question": name, "choices": ["a", "b"], "answer": "a"},
        "'choices'",
        "data.ignore=[choices]",
    ),
    "preferences": (
        lambda name: {"prompt": name, "chosen": "Hello", "rejected": "No."},
        "chosen",
        "data.columns.response=chosen",
    ),
    "preferences after a conversation": (
        lambda name: {
            "conversations": [{"from": "human", "value": name}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No."},
        },
        "'chosen'",
        "data.columns.prompt=conversations",
    ),
    "preferences of whole conversations": (
        lambda name: {"chosen": chat(name), "rejected": chat("nobody")},
        "chosen",
        "jq -c '{messages: .chosen.messages}'",
    ),
    "two answers, one of them the worse": (
        lambda name: {"question": name, "response_j": "Hello", "response_k": "No."},
        "response_j, response_k",
        "data.columns.response=....",
    ),
    "an answer that was not liked": (
        lambda name: {**chat(name), "label": False},
        "'label'",
        "Keep",
    ),
    "plain text": (
        lambda name: {"text": f"Greet {name}. Hello."},
        "columns text",
        "Split the text",
    ),
    "a list of messages instead of a row": (
        lambda name: chat(name)["messages"],
        "found list",
        "jq -c '{messages: .}'",
    ),
    "another name of messages": (
        lambda name: {"dialog": chat(name)["messages"]},
        "columns dialog",
        "data.columns.messages=dialog",
    ),
    "no answer": (lambda name: {"messages": [user(name)]}, "no assistant turn", "row 1"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_the_way_out(
    form: str, tmp_path: Path, released_model: Path
) -> None:
    rows, found, way = REFUSED[form]
    reason = refusal(write(tmp_path, rows), released_model)
    assert found in reason
    assert way in reason


FOLLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("images", {"ignore": ["images"]}),
    "choices": ("choices", {"ignore": ["choices"]}),
    "preferences": ("chosen", {"format": "columns", "columns": {"response": "chosen"}}),
    "preferences after a conversation": (
        "conversations",
        {"format": "columns", "columns": {"prompt": "conversations", "response": "chosen"}},
    ),
    "another name of messages": ("dialog", {"columns": {"messages": "dialog"}}),
}


@pytest.mark.parametrize("form", FOLLOWED)
def test_the_way_out_of_a_refusal_leads_to_a_prepared_data_set(
    form: str, tmp_path: Path, released_model: Path
) -> None:
    key, settings = FOLLOWED[form]
    source = write(tmp_path, REFUSED[form][0])
    assert key in refusal(source, released_model)
    found = prepare(source, released_model, **settings)
    assert found.examples == len(NAMES)
    assert "No." not in found.response
    assert found.card["unused"] == ({"rejected": len(NAMES)} if "chosen" in str(settings) else {})


def test_a_table_without_a_header_is_refused_as_one(tmp_path: Path, released_model: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("".join(f"Greet {name}.\tHello {name}.\n" for name in NAMES))
    reason = refusal(file, released_model)
    assert "columns Greet Ana1., Hello Ana1." in reason
    assert "no header" in reason
    file.write_text("prompt\tresponse\n" + file.read_text())
    assert prepare(file, released_model).examples == len(NAMES)

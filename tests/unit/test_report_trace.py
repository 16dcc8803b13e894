"""The denoising trace of the report: every frame is text, changes are marked, and nothing recorded
is parsed as HTML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from canvastune.errors import UserError
from canvastune.report.denoising_trace import read_denoising_trace


def recorded(folder: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Path:
    film = {"id": "0", "prompt": "p", "reference": "r", "before": before, "after": after}
    (folder / "film.json").write_text(json.dumps(film))
    return folder


def frame(block: int, step: int, *tokens: tuple[str, int]) -> dict[str, Any]:
    return {"block": block, "step": step, "tokens": [list(token) for token in tokens]}


def test_what_changed_is_marked_once_for_neighbours_and_not_where_all_is_new(
    tmp_path: Path,
) -> None:
    frames = [
        frame(0, 0, (" a", 1), ("<b>", 1)),
        frame(0, 3, (" a", 0), ("<i>", 1), (" c", 1), (" d", 0)),
        frame(1, 0, ("e", 1)),
    ]
    trace = read_denoising_trace(recorded(tmp_path, frames, frames[:1]))
    assert trace is not None
    before, after = trace["sides"]
    assert [each["text"] for each in before["frames"]] == [
        " a&lt;b&gt;",
        " a<mark>&lt;i&gt; c</mark> d",
        "e",
    ]
    assert [
        (each["block"], each["blocks"], each["step"], each["changed"], each["tokens"])
        for each in before["frames"]
    ] == [
        (0, 2, 0, 2, 2),
        (0, 2, 3, 2, 4),
        (1, 2, 0, 1, 1),
    ]
    assert after["frames"][0]["blocks"] == 1


def test_a_canvas_full_of_ends_is_counted_not_written(tmp_path: Path) -> None:
    tokens = [("6", 0), *[("<eos>", 0)] * 200, *[("<eos>", 1)] * 3, *[(" of", 0)] * 5]
    trace = read_denoising_trace(recorded(tmp_path, [frame(0, 4, *tokens)], []))
    assert trace is not None
    ends = "<mark>" + "&lt;eos&gt;" * 3 + "</mark>"
    assert trace["sides"][0]["frames"][0]["text"] == f"6&lt;eos&gt;×200 {ends} of of of of of", (
        "words are what the model said"
    )


def test_without_a_recorded_trace_there_is_none(tmp_path: Path) -> None:
    assert read_denoising_trace(None) is None
    assert read_denoising_trace(tmp_path) is None
    assert read_denoising_trace(recorded(tmp_path, [], [])) is None
    (tmp_path / "film.json").write_text("{")
    with pytest.raises(UserError, match=r"film\.json"):
        read_denoising_trace(tmp_path)

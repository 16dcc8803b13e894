"""How one held-out answer forms: the frames of film.json, as the page shows them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from canvastune.report.summary import optional_file, read_json

_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>")  # <eos>, <pad>: a canvas may be full of them
_MIN_REPEATS = 4  # equal special tokens in a row that are written as a count


def read_denoising_trace(evaluation: Path | None) -> dict[str, Any] | None:
    """Return the prompt, the reference and the frames of both sides; None if no trace was recorded.

    A side is {"title", "frames"}, a frame {"block" from 0, "blocks", "step", "tokens", "changed",
    "text" as HTML}.

    Raises:
        UserError: film.json is not JSON.
    """
    path = optional_file(evaluation, "film.json")
    if path is None:
        return None
    trace = read_json(path)
    sides = [{"title": side, "frames": _frames(trace[side])} for side in ("before", "after")]
    if not any(side["frames"] for side in sides):
        return None
    return {"prompt": trace["prompt"], "reference": trace["reference"], "sides": sides}


def _frames(recorded: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    blocks = max((frame["block"] + 1 for frame in recorded), default=0)
    return [
        {
            "block": frame["block"],
            "blocks": blocks,
            "step": frame["step"],
            "tokens": len(frame["tokens"]),
            "changed": sum(bool(changed) for _, changed in frame["tokens"]),
            "text": _mark_changes(frame["tokens"]),
        }
        for frame in recorded
    ]


def _mark_changes(tokens: Sequence[Sequence[Any]]) -> Markup:
    """Escape the tokens and put `<mark>` around those that changed, unless all are new."""
    if all(changed for _, changed in tokens):
        return escape("".join(_count_repeats(text for text, _ in tokens)))
    html = Markup()
    for changed, run in itertools.groupby(tokens, key=lambda token: bool(token[1])):
        text = "".join(_count_repeats(each for each, _ in run))
        html += Markup("<mark>{}</mark>").format(text) if changed else escape(text)
    return html


def _count_repeats(texts: Iterator[str]) -> Iterator[str]:
    for text, run in itertools.groupby(texts):
        times = sum(1 for _ in run)
        repeated = times >= _MIN_REPEATS and _SPECIAL_TOKEN.fullmatch(text)
        yield f"{text}×{times} " if repeated else text * times

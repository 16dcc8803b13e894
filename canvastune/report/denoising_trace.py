"""How one held-out answer forms: the frames of the evaluation's film.json, as the page shows them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from canvastune.report.summary import read_json

_SPECIAL = re.compile(r"<[^<>\s]+>")  # <eos>, <pad>: a canvas is full of them
_MANY = 4  # equal special tokens in a row, from which on they are counted instead of written


def denoising_trace(evaluation: Path | None) -> dict[str, Any] | None:
    """The prompt, the reference and the frames of both sides; None where no film was recorded.

    Each side: {"title", "frames"}, a frame {"block" from 0, "blocks", "step", "tokens", "changed", "text" as HTML}.

    Raises:
        UserError: film.json is not JSON.
    """
    path = evaluation / "film.json" if evaluation and evaluation.is_dir() else None
    if path is None or not path.is_file():
        return None
    film = read_json(path)
    sides = [{"title": side, "frames": _frames(film[side])} for side in ("before", "after")]
    if not any(side["frames"] for side in sides):
        return None
    return {"prompt": film["prompt"], "reference": film["reference"], "sides": sides}


def _frames(recorded: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    blocks = max((frame["block"] + 1 for frame in recorded), default=0)
    return [
        {
            "block": frame["block"],
            "blocks": blocks,
            "step": frame["step"],
            "tokens": len(frame["tokens"]),
            "changed": sum(bool(changed) for _, changed in frame["tokens"]),
            "text": _marked(frame["tokens"]),
        }
        for frame in recorded
    ]


def _marked(tokens: Sequence[Sequence[Any]]) -> Markup:
    """The tokens' texts, escaped, with `<mark>` around those that changed; where all are new, none is marked."""
    if all(changed for _, changed in tokens):
        return escape("".join(_counted(text for text, _ in tokens)))
    html = Markup()
    for changed, run in itertools.groupby(tokens, key=lambda token: bool(token[1])):
        text = "".join(_counted(each for each, _ in run))
        html += Markup("<mark>{}</mark>").format(text) if changed else escape(text)
    return html


def _counted(texts: Iterator[str]) -> Iterator[str]:
    for text, run in itertools.groupby(texts):
        times = sum(1 for _ in run)
        yield f"{text}×{times} " if times >= _MANY and _SPECIAL.fullmatch(text) else text * times

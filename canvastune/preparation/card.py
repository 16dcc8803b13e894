"""The data card: `card.json` for programs, `card.html` for people, one file without scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from canvastune.io.json_text import write_json

_SAMPLE_CHARACTERS = 1500  # of each side of a sample
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 440, 170, 18, 20  # of a chart and its margins
_BARS = 24


def write_card(card: dict[str, Any], folder: Path) -> None:
    """Write `card.json` and `card.html` into `folder`."""
    write_json(folder / "card.json", card, ensure_ascii=False)
    (folder / "card.html").write_text(render_card(card), encoding="utf-8")


def render_card(card: dict[str, Any]) -> str:
    """Render the card as one self-contained HTML page; all text of the data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"thousands": "{:,}".format, "visible": _visible}
    template = environment.get_template("card.html.jinja")
    return template.render(
        card,
        token_chart=_token_chart(card),
        block_chart=_block_chart(card),
        epoch_shares=epoch_shares(card["block_histogram"]),
    )


def epoch_shares(histogram: Mapping[str, int]) -> dict[str, float]:
    """Return the share of all blocks that an epoch denoises, by `objective.blocks`; nothing if no
    answer has several blocks.

    Args:
        histogram: conversations by the number of their blocks.
    """
    counts = {int(blocks): rows for blocks, rows in histogram.items()}
    every = sum(blocks * rows for blocks, rows in counts.items())
    most = max(counts)
    shares = {
        str(chosen): sum(min(chosen, blocks) * rows for blocks, rows in counts.items()) / every
        for chosen in (1, 2, 4, 8)
        if chosen < most
    }
    return shares | {"all": 1.0} if shares else {}


def _token_chart(card: dict[str, Any]) -> dict[str, Any]:
    edges, counts = card["token_histogram"]["edges"], card["token_histogram"]["counts"]
    bars = [
        (f"{low:,} to {high - 1:,} tokens", count)
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    first, last, limit = edges[0], edges[-1], card["seq_length"]
    share = (limit - first) / (last - first) if first < limit < last else None
    return _chart(bars, [f"{first:,}", f"{last:,} tokens"], share)


def _block_chart(card: dict[str, Any]) -> dict[str, Any]:
    blocks = {int(number): count for number, count in card["block_histogram"].items()}
    last = max(blocks)
    width = -(-last // _BARS)  # blocks in one bar
    bars = []
    for first in range(1, last + 1, width):
        count = sum(blocks.get(number, 0) for number in range(first, first + width))
        one = f"{first} block{'s' if first > 1 else ''}"
        bars.append((one if width == 1 else f"{first} to {first + width - 1} blocks", count))
    return _chart(bars, ["1", f"{last:,} blocks"] if last > 1 else ["1 block"], None)


def _chart(bars: list[tuple[str, int]], ends: list[str], limit: float | None) -> dict[str, Any]:
    """Compute the geometry of a bar chart.

    Args:
        bars: name and count of each.
        ends: labels of the axis.
        limit: share of the axis, in (0, 1), where a line crosses it.
    """
    step = _WIDTH / len(bars)
    tallest = max(count for _, count in bars)
    base = _HEIGHT - _BOTTOM
    heights = [max((base - _TOP) * count / tallest, 1.0 if count else 0.0) for _, count in bars]
    anchors = [(0, "start"), (_WIDTH, "end")] if len(ends) == 2 else [(_WIDTH // 2, "middle")]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "top": _TOP,
        "base": base,
        "tallest": tallest,
        "limit": None if limit is None else limit * _WIDTH,
        "labels": [
            {"x": x, "anchor": anchor, "text": text}
            for (x, anchor), text in zip(anchors, ends, strict=True)
        ],
        "bars": [
            {
                "name": name,
                "count": count,
                "x": index * step + 1,
                "y": base - height,
                "width": max(step - 2, 1),
                "height": height,
            }
            for index, ((name, count), height) in enumerate(zip(bars, heights, strict=True))
        ],
    }


def _visible(text: str) -> str:
    """Shorten a long text in the middle, and show control characters."""
    if len(text) > _SAMPLE_CHARACTERS:
        half = _SAMPLE_CHARACTERS // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[-half:]}"
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "�", text)

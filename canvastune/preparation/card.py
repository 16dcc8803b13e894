"""The data card: `card.json` for programs, `card.html` for people: one file, no script, nothing fetched."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

_SAMPLE_CHARACTERS = 1500  # of each side of a sample

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b2430; --quiet: #5c6878; --line: #dde2e9;
  --bar: #3b6fd4; --prefix: #eef1f6; --response: #dff3e6; --warn: #a85b00; }
@media (prefers-color-scheme: dark) { :root { --page: #11151b; --card: #1a2029; --text: #e5e9ef; --quiet: #97a3b4; --line: #2d3643;
  --bar: #7aa5f7; --prefix: #232b36; --response: #173b29; --warn: #f0b055; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 0 0 8px; } .quiet { color: var(--quiet); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px; margin-top: 16px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin-top: 20px; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.figures b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; } .figures .warn b { color: var(--warn); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 0 16px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: 5px 12px 5px 0; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--quiet); font-weight: normal; } .number { text-align: right; font-variant-numeric: tabular-nums; }
td.hash { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
svg rect { fill: var(--bar); } svg line { stroke: var(--line); } svg .limit { stroke: var(--warn); stroke-dasharray: 4 3; }
svg text.limit { fill: var(--warn); stroke: none; }
pre { margin: 0; padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace;
  background: var(--prefix); border-radius: 6px 6px 0 0; }
pre + pre { background: var(--response); border-radius: 0 0 6px 6px; margin-bottom: 12px; }
"""


def write_card(card: dict[str, Any], folder: Path) -> None:
    """Write `card.json` and `card.html` into `folder`."""
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "card.html").write_text(render_card(card), encoding="utf-8")


def render_card(card: dict[str, Any]) -> str:
    """The card as one self-contained HTML page; every text of the data is escaped."""
    left_out = sum(card["dropped"].values())
    figures = [
        ("rows read", card["rows_read"], False),
        ("train", card["train"], False),
        ("validation", card["validation"], False),
        ("left out", left_out, left_out > 0),
        ("cut at the end", card["cut"], card["cut"] > 0),
    ]
    tiles = "".join(
        f'<div{" class=warn" if warn else ""}><b>{value:,}</b><span class="quiet">{name}</span></div>' for name, value, warn in figures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data card: {escape(card["source"])}</title><style>{_STYLE}</style></head><body><main>
<h1>Data card</h1>
<p class="quiet">{escape(card["source"])}, read as {escape(card["format"])} in {card["seconds"]:g} s</p>
<div class="figures">{tiles}</div>
<div class="pair">
<section><h2>Tokens per conversation, before the cut</h2>{_token_bars(card)}</section>
<section><h2>Response blocks per conversation</h2>{_block_bars(card)}</section>
</div>
<section><h2>Lengths in tokens</h2>{_lengths(card)}</section>
<section><h2>Left out and cut</h2>{_dropped(card)}</section>
{_bad_rows(card)}
{_samples(card)}
<section><h2>What was read, and with what</h2>{_identity(card)}</section>
</main></body></html>
"""


def _token_bars(card: dict[str, Any]) -> str:
    edges, counts = card["token_histogram"]["edges"], card["token_histogram"]["counts"]
    bars = [(f"{low:,} to {high - 1:,} tokens", count) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    span = edges[-1] - edges[0]
    limit = (card["seq_length"] - edges[0]) / span if edges[0] < card["seq_length"] < edges[-1] else None
    return _bars(bars, [f"{edges[0]:,}", f"{edges[-1]:,} tokens"], limit, f"seq_length {card['seq_length']:,}")


def _block_bars(card: dict[str, Any]) -> str:
    blocks = {int(number): count for number, count in card["block_histogram"].items()}
    last = max(blocks)
    width = -(-last // 24)  # blocks in one bar
    bars = []
    for first in range(1, last + 1, width):
        count = sum(blocks.get(number, 0) for number in range(first, first + width))
        name = f"{first} block{'s' if first > 1 else ''}" if width == 1 else f"{first} to {first + width - 1} blocks"
        bars.append((name, count))
    return (
        _bars(bars, ["1", f"{last:,} blocks"] if last > 1 else ["1 block"], None, "")
        + f'<p class="quiet">One block is {card["canvas_length"]} tokens.</p>'
    )


def _bars(bars: list[tuple[str, int]], ends: list[str], limit: float | None, limit_name: str) -> str:
    """Vertical bars as SVG. `ends` label the axis; `limit` in (0, 1) draws a line across the axis."""
    wide, high, top, bottom = 440, 170, 18, 20
    step = wide / len(bars)
    tallest = max(count for _, count in bars)
    room = high - top - bottom
    parts = [f'<svg viewBox="0 0 {wide} {high}" role="img">', f'<text x="0" y="11">{tallest:,} rows</text>']
    for at, (name, count) in enumerate(bars):
        size = max(room * count / tallest, 1.0 if count else 0.0)
        box = f'x="{at * step + 1:.1f}" y="{high - bottom - size:.1f}" width="{max(step - 2, 1):.1f}" height="{size:.1f}"'
        parts.append(f"<rect {box} rx='1'><title>{escape(name)}: {count:,} rows</title></rect>")
    parts.append(f'<line x1="0" x2="{wide}" y1="{high - bottom}" y2="{high - bottom}"/>')
    anchors = ["start", "end"] if len(ends) == 2 else ["middle"]
    places = [0, wide] if len(ends) == 2 else [wide // 2]
    parts += [f'<text x="{x}" y="{high - 5}" text-anchor="{a}">{escape(e)}</text>' for x, a, e in zip(places, anchors, ends, strict=True)]
    if limit is not None:
        x = limit * wide
        side = "end" if limit > 0.5 else "start"
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{high - bottom}"/>')
        parts.append(
            f'<text class="limit" x="{x + (-4 if limit > 0.5 else 4):.1f}" y="{top + 6}" text-anchor="{side}">{escape(limit_name)}</text>'
        )
    return "".join(parts) + "</svg>"


def _lengths(card: dict[str, Any]) -> str:
    names = ("min", "mean", "median", "p95", "max", "sum")
    head = "".join(f'<th class="number">{name}</th>' for name in names)
    rows = ""
    for title, key in (("prefix", "prefix_tokens"), ("response, before the cut", "response_tokens")):
        rows += f"<tr><td>{title}</td>" + "".join(f'<td class="number">{card[key][name]:,}</td>' for name in names) + "</tr>"
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>{rows}</table></div>'


def _dropped(card: dict[str, Any]) -> str:
    rows = [(reason, count) for reason, count in card["dropped"].items()]
    if card["cut"]:
        rows.append((f"kept, but the response was cut at {card['seq_length']:,} tokens (trained without an end)", card["cut"]))
    if not rows:
        return "<p>Nothing: every row that was read is trained or validated on, whole.</p>"
    lines = "".join(f'<tr><td>{escape(reason)}</td><td class="number">{count:,}</td></tr>' for reason, count in rows)
    return f"<table><thead><tr><th>reason</th><th class='number'>rows</th></tr></thead>{lines}</table>"


def _bad_rows(card: dict[str, Any]) -> str:
    if not card["bad_rows"]:
        return ""
    lines = "".join(
        f'<tr><td>{escape(bad["file"])}</td><td class="number">{bad["row"]:,}</td><td>{escape(bad["reason"])}</td></tr>'
        for bad in card["bad_rows"]
    )
    more = card["bad"] - len(card["bad_rows"])
    note = f'<p class="quiet">and {more:,} more</p>' if more else ""
    head = '<tr><th>file</th><th class="number">row</th><th>reason</th></tr>'
    return f'<section><h2>Bad rows</h2><div class="scroll"><table><thead>{head}</thead>{lines}</table></div>{note}</section>'


def _samples(card: dict[str, Any]) -> str:
    shown = ""
    for sample in card["samples"]:
        state = "whole" if sample["complete"] else "cut"
        shown += f'<p class="quiet">{escape(sample["origin"])}: {sample["tokens"]:,} tokens, {state}</p>'
        shown += f"<pre>{_visible(sample['prefix'])}</pre><pre>{_visible(sample['response'])}</pre>"
    note = '<p class="quiet">Above: the prefix, which is given. Below: the response, which is trained.</p>'
    return f"<section><h2>The first rows, as the model sees them</h2>{note}{shown}</section>"


def _visible(text: str) -> str:
    if len(text) > _SAMPLE_CHARACTERS:
        half = _SAMPLE_CHARACTERS // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "�", text))


def _identity(card: dict[str, Any]) -> str:
    rows = [
        ("fingerprint of the source", card["fingerprint"]),
        ("content hash of the prepared rows", card["content_hash"]),
        ("tokenizer", f"{card['tokenizer']}, vocabulary {card['vocab_size']:,}"),
        ("seq_length", f"{card['seq_length']:,}"),
        ("canvas_length", f"{card['canvas_length']:,}"),
    ]
    lines = "".join(f'<tr><td>{escape(name)}</td><td class="hash">{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'

"""What the page's script draws: the curves as JSON, the script itself, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from canvastune.report.curves import Chart, Line, smoothing_span, thin

_HERE = Path(__file__).parent
_POINTS = 2400  # of one curve, over all runs it shows: bounds the page for any number of steps and runs
_SPANS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # steps that the slider averages over


def curves_json(charts: Sequence[Chart], events: Sequence[int], steps: int) -> Markup:
    """The charts as `charts.js` reads them, safe inside a `<script>` element; `events` are steps that get a mark.

    A line is "raw", its lowest and highest points, so that no peak is lost, and "means" of short stretches, from which the page
    smooths: an average of lowest and highest points alone would be another one.
    """
    usual = smoothing_span(steps)
    spans = sorted({usual, *(span for span in _SPANS if span == 1 or span <= steps // 3)})
    content = {
        "events": sorted(set(events)),
        "spans": spans,
        "start": spans.index(usual),
        "charts": [_chart(chart) for chart in charts],
    }
    # A run's name may hold "</script>": within JSON "<" can be written otherwise.
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def script() -> Markup:
    """uPlot with its licence, what drives it, the answers' filter and the film."""
    library = _HERE / "uplot"
    licence = (library / "LICENSE").read_text(encoding="utf-8").strip()
    parts = [f"/*\n{licence}\n*/", (library / "uPlot.iife.min.js").read_text(encoding="utf-8")]
    return Markup("\n".join([*parts, *((_HERE / name).read_text(encoding="utf-8") for name in ("charts.js", "answers.js", "film.js"))]))


def policy(code: str) -> str:
    """The page's Content-Security-Policy: this very script runs, nothing else does, and nothing is fetched or sent."""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def summary_rows(chart: Chart) -> list[dict[str, Any]]:
    """A chart in figures, one row per line: its ends, and its extremes as recorded with their steps."""
    rows = []
    for line in chart.lines:
        lowest, highest = (pick(range(len(line.values)), key=line.values.__getitem__) for pick in (min, max))
        at = {"first": 0, "last": -1, "lowest": lowest, "highest": highest}
        rows.append({"label": line.label, **{name: (line.values[index], line.steps[index]) for name, index in at.items()}})
    return rows


def _chart(chart: Chart) -> dict[str, Any]:
    most = max(200, _POINTS // len(chart.lines))
    lines = [_line(line, most) for line in chart.lines]
    return {"name": chart.name, "title": chart.title, "unit": chart.unit, "log": chart.log, "lines": lines}


def _line(line: Line, most: int) -> dict[str, Any]:
    raw = thin(line.steps, line.values, most)
    means = _means(line.steps, line.values, most // 2) if line.noisy and len(line.steps) > most else None
    return {
        "label": line.label,
        "colour": line.colour,
        "dashed": line.dashed,
        "noisy": line.noisy,
        "raw": _rounded(raw),
        "means": means and _rounded(means),
    }


def _means(steps: list[int], values: list[float], most: int) -> tuple[list[int], list[float]]:
    """At most `most` points: the mean of each stretch, at the step in its middle."""
    stretch = -(-len(steps) // most)
    starts = range(0, len(steps), stretch)
    middles = [steps[(start + min(start + stretch, len(steps))) // 2] for start in starts]
    return middles, [fmean(values[start : start + stretch]) for start in starts]


def _rounded(points: tuple[list[int], list[float]]) -> list[list[Any]]:
    """Five figures that count: more than a screen or a reader can tell apart."""
    return [points[0], [float(f"{value:.5g}") for value in points[1]]]

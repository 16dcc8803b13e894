"""The curves of a run: which there are, how they are smoothed, and how matplotlib draws them as still pictures (SVG and PNG)."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Record = dict[str, Any]

_MOST_POINTS = 600  # of one line: more than the pixels it has, and a bound on the page's size for any number of steps
_HEIGHT = 2.15  # inches
_WIDTHS = {"narrow": 3.8, "wide": 7.85}  # inches at 100 units of the viewBox each: one column of the page, and two with their gap
# The page's CSS has the same names, in light and in dark. s: one colour per run. l: a ramp, from little corruption to much.
_PAPER = {
    **{"soft": "#566072", "line": "#e3e6ec"},
    **{"s0": "#1f5fd0", "s1": "#b4540a", "s2": "#0b7a75", "s3": "#8a3ab9", "s4": "#b3261e", "s5": "#5f6b1d"},
    **{"l0": "#2a9a8b", "l1": "#2a82b8", "l2": "#2563c9", "l3": "#5a45bd", "l4": "#7a2391"},
}
_FEW = 12  # points of a line that are marked, since the line between them is a guess
_RUNS, _LEVELS = 6, 5  # colours; lines beyond that are dashed in the same ones
# Colours that stand for the page's variables: one drawing serves light and dark.
_PAGE = {name: f"#0101{index:02x}" for index, name in enumerate(_PAPER)}


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, small, and read out by a screen reader
    "svg.hashsalt": "canvastune",  # the same curves give the same file
    "font.size": 10,
    "axes.linewidth": 0.8,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Line:
    """One series as recorded, `noisy` if it is shown smoothed. Steps ascend; `colour` is a name of the palette."""

    label: str
    steps: list[int]
    values: list[float]
    noisy: bool = False
    colour: str = "s0"
    dashed: bool = False

    @cached_property
    def shown(self) -> list[float]:
        """Values of the strong line."""
        return smooth(self.values) if self.noisy else self.values


@dataclass(frozen=True)
class Chart:
    """One curve of the report."""

    name: str  # stem of its PNG
    title: str
    unit: str
    lines: list[Line]
    wide: bool = False
    log: bool = False
    note: str = ""

    @property
    def first_and_last(self) -> tuple[float, float] | None:
        """Values at both ends of the first line."""
        return (self.lines[0].shown[0], self.lines[0].shown[-1]) if self.lines else None

    @property
    def recorded(self) -> list[float]:
        """Every value that is drawn: those of the first line as recorded, behind it; of the others what is shown."""
        return [value for index, line in enumerate(self.lines) for value in (line.shown if index else line.values)]


@dataclass(frozen=True)
class _Measure:
    name: str
    title: str
    unit: str
    field: str
    noisy: bool
    scale: float = 1.0
    wide: bool = False


_MEASURES = (
    _Measure("total_loss", "Total loss", "nats per token", "loss", True, wide=True),
    _Measure("diffusion_loss", "Diffusion loss", "nats per token", "diffusion_loss", True),
    _Measure("autoregressive_loss", "Autoregressive loss", "nats per token", "autoregressive_loss", True),
    _Measure("gradient_norm", "Gradient norm", "L2, before clipping", "grad_norm", True),
    _Measure("learning_rate", "Learning rate", "", "lr", False),
    _Measure("memory", "Memory of rank 0", "GB, peak so far", "memory_bytes", False, 1e-9),
    _Measure("utilisation", "Model FLOP/s", "TFLOP/s per process", "tflops", True),
    _Measure("throughput", "Throughput", "tokens per second", "tokens_per_second", True, wide=True),
)
_UTILISATION = _Measure("utilisation", "Model FLOPs utilisation", "% of the accelerator's peak", "mfu", True, 100.0)
_SLOW = _Measure("utilisation", "Model FLOP/s", "GFLOP/s per process", "tflops", True, 1000.0)


def charts_of(runs: Sequence[tuple[str, list[Record]]]) -> list[Chart]:
    """The charts of a run and of those it is compared with: (name, records) each, the run itself first."""
    measures = [_measure_chart(_used(runs) or each if each.name == "utilisation" else each, runs) for each in _MEASURES]
    charts = [*measures[:3], _validation_chart(runs), *measures[3:]]
    return [chart for chart in charts if chart.lines]


def series(records: list[Record], kind: str, field: str) -> tuple[list[int], list[float]]:
    """Steps and values of a field; records in which it is missing or null are left out."""
    found = [(record["step"], float(record[field])) for record in records if record["kind"] == kind and is_number(record.get(field))]
    return [step for step, _ in found], [value for _, value in found]


def is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def smoothing_span(points: int) -> int:
    """Points in the moving average: enough to see the trend of a noisy loss, a fifteenth of the run at most."""
    return max(1, min(50, points // 15))


def smooth(values: list[float]) -> list[float]:
    """Moving average around each point (one that looks back alone would lag behind a falling loss); shorter at both ends."""
    span = smoothing_span(len(values))
    sums = list(itertools.accumulate(values, initial=0.0))
    bounds = ((max(0, at - span // 2), min(len(values), at + (span + 1) // 2)) for at in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def draw_svg(chart: Chart, events: Sequence[int], wide: bool) -> str:
    """The chart as an SVG element in the page's colours; `events` are steps that get a mark."""
    with matplotlib.rc_context(_STYLE):
        figure = _draw(chart, events, _PAGE, _WIDTHS["wide" if wide else "narrow"], _HEIGHT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?viewBox", '<svg aria-hidden="true" viewBox', svg, count=1)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    for name, colour in _PAGE.items():
        svg = svg.replace(colour, f"var(--{name})")
    prefix = f"{chart.name}-{'w' if wide else 'n'}-"  # ids are the page's: two drawings may not share one
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return re.sub(r"\n\s*", "\n", svg)


def draw_png(chart: Chart, events: Sequence[int], path: Path) -> None:
    """The chart as a picture that stands alone: title and legend in it, on white."""
    with matplotlib.rc_context(_STYLE):
        figure = _draw(chart, events, _PAPER, 6.4, 3.6)
        axes = figure.axes[0]
        axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, loc="left", fontsize=11)
        axes.set_ylabel("")
        if len(chart.lines) > 1:
            axes.legend(*(found[::-1] for found in axes.get_legend_handles_labels()), frameon=False, fontsize=8, ncols=3)
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def _used(runs: Sequence[tuple[str, list[Record]]]) -> _Measure | None:
    """How use of accelerators is drawn, if not in TFLOP/s: as a share where every run's peak is known, in GFLOP/s where all are slow."""
    if all(series(records, "train", "mfu")[0] for _, records in runs):
        return _UTILISATION
    return _SLOW if all(max(series(records, "train", "tflops")[1], default=0) < 1 for _, records in runs) else None


def _measure_chart(measure: _Measure, runs: Sequence[tuple[str, list[Record]]]) -> Chart:
    lines = []
    for index, (name, records) in enumerate(runs):
        steps, values = series(records, "train", measure.field)
        values = [value * measure.scale for value in values]
        if steps:
            lines.append(Line(name, steps, values, measure.noisy, f"s{index % _RUNS}", dashed=index >= _RUNS))
    chart = Chart(measure.name, measure.title, measure.unit, lines, wide=measure.wide)
    every = chart.recorded
    log = measure.field == "grad_norm" and min(every, default=0) > 0 and max(every) > 10 * min(every)
    return replace(chart, log=log)


def _validation_chart(runs: Sequence[tuple[str, list[Record]]]) -> Chart:
    """Every corruption level of the run itself; where runs are compared, the mean of each, dashed in its colour."""
    records = [record for record in runs[0][1] if record["kind"] == "validation"]
    levels = sorted({level for record in records for level in record.get("levels", {})}, key=float)
    lines = []
    for index, level in enumerate(levels):
        found = [(record["step"], record["levels"][level]) for record in records if is_number(record.get("levels", {}).get(level))]
        if found:
            shade = round(index * (_LEVELS - 1) / max(1, len(levels) - 1))
            lines.append(Line(f"t = {level}", [step for step, _ in found], [value for _, value in found], colour=f"l{shade}"))
    for index, (name, other) in enumerate(runs if lines and len(runs) > 1 else []):
        steps, values = series(other, "validation", "loss")
        if steps:
            lines.append(Line(f"{name}, mean", steps, values, colour=f"s{index % _RUNS}", dashed=True))
    title = "Validation loss by corruption level"
    return Chart("validation_loss", title, "nats per token", lines, wide=True, note="t: share of the canvas that is corrupted")


def _draw(chart: Chart, events: Sequence[int], palette: dict[str, str], width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for step in events:
        axes.axvline(step, color=palette["soft"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for depth, line in enumerate(reversed(chart.lines), 3):  # the run itself over those it is compared with
        colour = palette[line.colour]
        if line.noisy and line is chart.lines[0]:
            axes.plot(*thin(line.steps, line.values), color=colour, linewidth=0.7, alpha=0.35, zorder=2)
        axes.plot(
            *thin(line.steps, line.shown),
            color=colour,
            linewidth=1.7,
            linestyle=(0, (4, 2)) if line.dashed else "solid",
            label=line.label,
            marker="o" if len(line.steps) < _FEW else None,
            markersize=3,
            zorder=depth,
        )
    if chart.log:
        axes.set_yscale("log")
    _dress(axes, chart, palette)
    return figure


def _dress(axes: Axes, chart: Chart, palette: dict[str, str]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette["line"])
    axes.tick_params(colors=palette["soft"], length=0, labelsize=9.5)
    axes.grid(axis="y", color=palette["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("step", color=palette["soft"], fontsize=9.5)
    axes.set_ylabel(chart.unit, color=palette["soft"], fontsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02, y=0.08)
    if chart.log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        drawn = chart.recorded
        if min(drawn) >= 0 and max(drawn) > 0:
            axes.set_ylim(0, 1.08 * max(drawn))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A number as an axis shows it: 0.5, 12k, 1.5e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def thin(steps: list[int], values: list[float], most: int = _MOST_POINTS) -> tuple[list[int], list[float]]:
    """At most `most` points and both ends: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(steps) <= most:
        return steps, values
    chosen = {0, len(steps) - 1}
    stretch = -(-len(steps) * 2 // most)
    for start in range(0, len(steps), stretch):
        part = range(start, min(start + stretch, len(steps)))
        chosen |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    order = sorted(chosen)
    return [steps[i] for i in order], [values[i] for i in order]


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

"""The charts of a run: their lines, how they are smoothed, and how they are drawn.

The page draws them itself, from `charts_json` by `charts.js`. Where scripts are off, in print
and in MLflow they are images, which matplotlib draws.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Sequence
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
from PIL import Image

from canvastune.report.summary import Record, is_plottable, loss_ends, series
from canvastune.tracking import mean_by_block

_MAX_POINTS = 600  # of a line in a picture: more than its pixels
# of a chart on the page, over all its runs: bounds the page for any number of steps
_PAGE_POINTS = 2400
_SMOOTHING_SPANS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # steps, of the slider
_FEW_POINTS = 12  # lines with fewer points get markers, since the line between them is a guess
_RUN_COLORS, _LEVEL_COLORS = 6, 5  # further lines are dashed in the same colors
_PALETTE_SIZE = 128  # colors of an image on the page; fewer colors make it a third of the size
# The light palette of report.css. s: one color per run; l: a ramp over the corruption levels.
_COLORS = {
    **{"soft": "#566072", "line": "#e3e6ec"},
    **{
        "s0": "#1f5fd0",
        "s1": "#b4540a",
        "s2": "#0b7a75",
        "s3": "#8a3ab9",
        "s4": "#b3261e",
        "s5": "#5f6b1d",
    },
    **{"l0": "#2a9a8b", "l1": "#2a82b8", "l2": "#2563c9", "l3": "#5a45bd", "l4": "#7a2391"},
}
_STYLE: dict[Any, Any] = {"font.size": 10, "axes.linewidth": 0.8, "path.simplify": True}
_LOSS_UNIT = "nats per token"
# Highest to lowest value from which a scale is logarithmic: on a linear one, all but the start of a
# falling loss is one flat line.
_LOG_FROM = {_LOSS_UNIT: 4.0, "L2, before clipping": 10.0}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Line:
    """A recorded series; steps (or what the chart's `across` names) ascend, `color` is a name of the
    palette.

    The page draws a noisy line smoothed.
    """

    label: str
    steps: list[int]
    values: list[float]
    noisy: bool = False
    color: str = "s0"
    dashed: bool = False

    @cached_property
    def shown(self) -> list[float]:
        """Values of the bold line."""
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
    across: str = "step"  # what the horizontal axis counts

    @property
    def ends(self) -> tuple[float, float] | None:
        """Ends of the first line; those of a training loss are `RunSummary`'s."""
        if not self.lines:
            return None
        line = self.lines[0]
        if line.noisy and self.unit == _LOSS_UNIT:
            return loss_ends(line.values)
        return line.shown[0], line.shown[-1]

    @property
    def recorded(self) -> list[float]:
        """Every value that is drawn: the first line's as recorded, the other lines' as shown."""
        return [
            value
            for index, line in enumerate(self.lines)
            for value in (line.shown if index else line.values)
        ]


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
    _Measure("total_loss", "Total loss", _LOSS_UNIT, "loss", True, wide=True),
    _Measure("diffusion_loss", "Diffusion loss", _LOSS_UNIT, "diffusion_loss", True),
    _Measure("autoregressive_loss", "Autoregressive loss", _LOSS_UNIT, "autoregressive_loss", True),
    _Measure("gradient_norm", "Gradient norm", "L2, before clipping", "grad_norm", True),
    _Measure("learning_rate", "Learning rate", "", "lr", False),
    _Measure("memory", "Memory of rank 0", "GB, peak so far", "memory_bytes", False, 1e-9),
    _Measure("utilisation", "Model FLOP/s", "TFLOP/s per process", "tflops", True),
    _Measure("throughput", "Throughput", "tokens per second", "tokens_per_second", True, wide=True),
)
_MFU = _Measure(
    "utilisation", "Model FLOPs utilization", "% of the accelerator's peak", "mfu", True, 100.0
)
_GFLOPS = _Measure("utilisation", "Model FLOP/s", "GFLOP/s per process", "tflops", True, 1000.0)


def build_charts(runs: Sequence[tuple[str, list[Record]]]) -> list[Chart]:
    """Return the charts of runs: (name, records) of the run itself, then of compared ones."""
    measures = [
        _flops_measure(runs) or each if each.name == "utilisation" else each for each in _MEASURES
    ]
    charts = [_measure_chart(measure, runs) for measure in measures]
    charts[3:3] = [_validation_chart(runs), _block_chart(runs)]
    return [chart for chart in charts if chart.lines]


def smoothing_span(points: int) -> int:
    """Return the points of the moving average: a fifteenth of the run, at most 50."""
    return max(1, min(50, points // 15))


def smooth(values: list[float]) -> list[float]:
    """Return the centered moving average, shorter at both ends: a trailing one would lag."""
    span = smoothing_span(len(values))
    sums = list(itertools.accumulate(values, initial=0.0))
    bounds = (
        (max(0, at - span // 2), min(len(values), at + (span + 1) // 2))
        for at in range(len(values))
    )
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def draw_chart_file(chart: Chart, events: Sequence[int], path: Path) -> None:
    """Write the chart as a PNG that needs no page: on white, with its title and legend.

    Args:
        events: steps that get a mark.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _draw(chart, events, 6.4, 3.6)
        title = f"{chart.title} ({chart.unit})" if chart.unit else chart.title
        figure.axes[0].set_title(title, loc="left", fontsize=11)
        figure.axes[0].set_ylabel("")
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def draw_chart_image(chart: Chart, events: Sequence[int]) -> str:
    """Return the chart as the data URI of a PNG for the page, which has the title."""
    with matplotlib.rc_context(_STYLE):
        figure = _draw(
            chart, events, 7.85 if chart.wide else 3.8, 2.15 + 0.2 * (len(chart.lines) > 1)
        )
        drawn, packed = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=200, facecolor="white")
    # The octree keeps rare colors; a median cut would give a short line another run's color.
    colors = (
        Image.open(drawn)
        .convert("RGB")
        .quantize(_PALETTE_SIZE, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    colors.save(packed, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


def _flops_measure(runs: Sequence[tuple[str, list[Record]]]) -> _Measure | None:
    """Return the measure of FLOP/s: MFU if every run has it, GFLOP/s if all are slow, else None."""
    if all(series(records, "train", "mfu")[0] for _, records in runs):
        return _MFU
    slow = all(max(series(records, "train", "tflops")[1], default=0) < 1 for _, records in runs)
    return _GFLOPS if slow else None


def _measure_chart(measure: _Measure, runs: Sequence[tuple[str, list[Record]]]) -> Chart:
    lines = []
    for index, (name, records) in enumerate(runs):
        steps, values = series(records, "train", measure.field)
        values = [value * measure.scale for value in values]
        if steps:
            color, dashed = f"s{index % _RUN_COLORS}", index >= _RUN_COLORS
            lines.append(Line(name, steps, values, measure.noisy, color, dashed))
    return _scaled(Chart(measure.name, measure.title, measure.unit, lines, wide=measure.wide))


def _scaled(chart: Chart) -> Chart:
    """Choose the scale that shows a chart's values."""
    every, factor = chart.recorded, _LOG_FROM.get(chart.unit)
    low = min(every, default=0)
    return replace(chart, log=factor is not None and low > 0 and max(every) > factor * low)


def _validation_chart(runs: Sequence[tuple[str, list[Record]]]) -> Chart:
    """Chart every corruption level of the run itself and, to compare, each run's mean, dashed."""
    records = [record for record in runs[0][1] if record["kind"] == "validation"]
    levels = sorted({level for record in records for level in record.get("levels", {})}, key=float)
    lines = []
    for level, color in zip(levels, _level_colors(len(levels)), strict=True):
        found = [(record["step"], record.get("levels", {}).get(level)) for record in records]
        lines += _plottable(f"t = {level}", found, color)
    for index, (name, other) in enumerate(runs if lines and len(runs) > 1 else []):
        steps, values = series(other, "validation", "loss")
        if steps:
            lines.append(
                Line(f"{name}, mean", steps, values, color=f"s{index % _RUN_COLORS}", dashed=True)
            )
    title, note = "Validation loss by corruption level", "t: share of the canvas that is corrupted"
    return _scaled(Chart("validation_loss", title, _LOSS_UNIT, lines, wide=True, note=note))


def _block_chart(runs: Sequence[tuple[str, list[Record]]]) -> Chart:
    """Chart the last validation's loss across the blocks of an answer: of each corruption level and,
    dashed, the mean; of compared runs the mean.
    """
    found = [
        [record for record in records if record["kind"] == "validation" and record.get("blocks")]
        for _, records in runs
    ]
    lines: list[Line] = []
    if found[0]:
        last = found[0][-1]
        levels = sorted(last["blocks"], key=float)
        for level, color in zip(levels, _level_colors(len(levels)), strict=True):
            lines += _plottable(f"t = {level}", enumerate(last["blocks"][level], 1), color)
        lines += _plottable("mean", enumerate(mean_by_block(last), 1), "s0", dashed=True)
        for index, (name, _) in enumerate(runs[1:], 1):
            if found[index]:
                values, color = mean_by_block(found[index][-1]), f"s{index % _RUN_COLORS}"
                lines += _plottable(f"{name}, mean", enumerate(values, 1), color, dashed=True)
    return Chart(
        "validation_loss_by_block",
        "Validation loss by position in the answer",
        _LOSS_UNIT,
        lines,
        wide=True,
        note="Of the last validation. Block 1 begins the answer; the last blocks are those of the"
        " longest answers only.",
        across="block",
    )


def _level_colors(count: int) -> list[str]:
    """Return colors of the ramp over the corruption levels, from first to last."""
    return [f"l{round(at * (_LEVEL_COLORS - 1) / max(1, count - 1))}" for at in range(count)]


def _plottable(
    label: str, points: Iterable[tuple[int, Any]], color: str, dashed: bool = False
) -> list[Line]:
    """Return the line through the points whose value is a number; none if there are none."""
    known = [(at, value) for at, value in points if is_plottable(value)]
    if not known:
        return []
    places, values = zip(*known, strict=True)
    return [Line(label, list(places), list(values), color=color, dashed=dashed)]


def _draw(chart: Chart, events: Sequence[int], width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for step in events if chart.across == "step" else ():
        axes.axvline(step, color=_COLORS["soft"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for depth, line in enumerate(reversed(chart.lines), 3):  # the run itself on top
        color = _COLORS[line.color]
        if line.noisy and line is chart.lines[0]:
            axes.plot(
                *thin(line.steps, line.values), color=color, linewidth=0.7, alpha=0.35, zorder=2
            )
        axes.plot(
            *thin(line.steps, line.shown),
            color=color,
            linewidth=1.7,
            linestyle=(0, (4, 2)) if line.dashed else "solid",
            label=line.label,
            marker="o" if len(line.steps) < _FEW_POINTS else None,
            markersize=3,
            zorder=depth,
        )
    if chart.log:
        axes.set_yscale("log")
    _style_axes(axes, chart)
    if len(chart.lines) > 1:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, ncols=3)
    return figure


def _style_axes(axes: Axes, chart: Chart) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLORS["line"])
    axes.tick_params(colors=_COLORS["soft"], length=0, labelsize=9.5)
    axes.grid(axis="y", color=_COLORS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.across, color=_COLORS["soft"], fontsize=9.5)
    axes.set_ylabel(chart.unit, color=_COLORS["soft"], fontsize=9.5)
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
    """Format a number as an axis shows it: 0.5, 12k, 1.5e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def thin(
    steps: list[int], values: list[float], limit: int = _MAX_POINTS
) -> tuple[list[int], list[float]]:
    """Return at most `limit` points and both ends: each stretch's minimum and maximum."""
    if len(steps) <= limit:
        return steps, values
    chosen = {0, len(steps) - 1}
    stretch = -(-len(steps) * 2 // limit)
    for start in range(0, len(steps), stretch):
        part = range(start, min(start + stretch, len(steps)))
        chosen |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    order = sorted(chosen)
    return [steps[i] for i in order], [values[i] for i in order]


def charts_json(charts: Sequence[Chart], events: Sequence[int], steps: int) -> Markup:
    """Return the charts as `charts.js` reads them, safe inside a `<script>` element.

    A line has "raw", the minimum and maximum of each stretch, so that no peak is lost, and "means"
    of short stretches, from which the page smooths: a mean of extremes would be another one.

    Args:
        events: steps that get a mark.
        steps: of the run, which decide the spans of the smoothing slider.
    """
    default = smoothing_span(steps)
    spans = sorted(
        {default, *(span for span in _SMOOTHING_SPANS if span == 1 or span <= steps // 3)}
    )
    content = {
        "events": sorted(set(events)),
        "spans": spans,
        "start": spans.index(default),
        "charts": [_chart(chart) for chart in charts],
    }
    # A run's name may contain "</script>": JSON can write "<" as an escape.
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def page_script() -> Markup:
    """Return the page's script: uPlot with its license, charts, answer filter and trace."""
    library = _FOLDER / "uplot"
    license_text = (library / "LICENSE").read_text(encoding="utf-8").strip()
    parts = [f"/*\n{license_text}\n*/", (library / "uPlot.iife.min.js").read_text(encoding="utf-8")]
    names = ("charts.js", "answers.js", "denoising_trace.js")
    return Markup(
        "\n".join([*parts, *((_FOLDER / name).read_text(encoding="utf-8") for name in names)])
    )


def content_security_policy(code: str) -> str:
    """Return the page's Content-Security-Policy: only this script, and no request."""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def summary_rows(chart: Chart) -> list[dict[str, Any]]:
    """Return a row per line: first, last, lowest and highest recorded value, with their steps."""
    rows = []
    for line in chart.lines:
        order = range(len(line.values))
        lowest, highest = (pick(order, key=line.values.__getitem__) for pick in (min, max))
        at = {"first": 0, "last": -1, "lowest": lowest, "highest": highest}
        ends = {name: (line.values[index], line.steps[index]) for name, index in at.items()}
        rows.append({"label": line.label, **ends})
    return rows


def _chart(chart: Chart) -> dict[str, Any]:
    limit = max(200, _PAGE_POINTS // len(chart.lines))
    shown = {name: getattr(chart, name) for name in ("name", "title", "unit", "log", "across")}
    return shown | {"lines": [_line(line, limit) for line in chart.lines]}


def _line(line: Line, limit: int) -> dict[str, Any]:
    raw = thin(line.steps, line.values, limit)
    long = line.noisy and len(line.steps) > limit
    means = _rounded(_means(line.steps, line.values, limit // 2)) if long else None
    shown = {name: getattr(line, name) for name in ("label", "color", "dashed", "noisy")}
    return shown | {"raw": _rounded(raw), "means": means}


def _means(steps: list[int], values: list[float], limit: int) -> tuple[list[int], list[float]]:
    """Return at most `limit` points: the mean of each stretch, at the step in its middle."""
    stretch = -(-len(steps) // limit)
    starts = range(0, len(steps), stretch)
    middles = [steps[(start + min(start + stretch, len(steps))) // 2] for start in starts]
    return middles, [fmean(values[start : start + stretch]) for start in starts]


def _rounded(points: tuple[list[int], list[float]]) -> list[list[Any]]:
    """Round to five significant digits: more than a screen shows."""
    return [points[0], [float(f"{value:.5g}") for value in points[1]]]

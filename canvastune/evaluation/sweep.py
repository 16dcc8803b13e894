"""Quality against forward passes: the tuned model's answers with a few settings of its sampler."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.evaluation.figures import JudgedRow, judge_rows, measure, side_scores
from canvastune.evaluation.generation import (
    Question,
    answer_seeds,
    answering,
    response_ends,
    select_questions,
    software_versions,
)
from canvastune.evaluation.judges import Judging
from canvastune.evaluation.model_run import Checkpoint, Conditions, ModelRun, Store, find_device
from canvastune.evaluation.ranks import Ranks
from canvastune.evaluation.result import SIDES
from canvastune.evaluation.run import judging_of
from canvastune.evaluation.scoring import paired_test
from canvastune.io.atomic import atomic_directory, check_writable
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import write_json
from canvastune.io.provenance import write_provenance
from canvastune.preparation.tokenizer import load_transformers_tokenizer

_BEST, _OTHER, _OWN = "#1f5fd0", "#8a93a3", "#c2410c"  # colors of the picture
# Of a label from its point, in points: the first of those that cover least is taken.
_OFFSETS = tuple(
    (right, up) for far in (5, 14) for up in (far, -far, 0) for right in (7, -7, 0) if right or up
)
_NEAR = 12  # pixels between points that share a label
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPoint:
    """One setting of the sampler, and how the tuned model answers with it."""

    name: str  # what differs from the recipe's settings
    sampler: dict[str, Any]
    score: float  # mean of the scored rows, 0 to 1
    score_low: float  # ends of its 95% interval
    score_high: float
    forwards: float  # denoising steps of an answer, mean
    tokens_per_forward: float
    seconds: float  # of an answer, mean
    p_value: float  # of the paired test against the recipe's settings
    verdict: str  # "better", "worse" or "undecided"
    best: bool  # no other setting has a higher score with at most as many forwards


def settings_to_try(own: SamplerSettings) -> dict[str, SamplerSettings]:
    """Return the recipe's settings and those around them, by what differs.

    Fewer steps cut off the end of a block, a higher entropy bound accepts more places of a step,
    and a higher confidence threshold ends a stable block earlier.
    """
    changes: dict[str, dict[str, Any]] = {"the recipe's": {}}
    for part in (2, 4, 8):
        changes[f"steps / {part}"] = {"steps": max(1, own.steps // part)}
    for factor in (0.5, 2, 4, 8):
        changes[f"entropy bound x {factor:g}"] = {"entropy_bound": own.entropy_bound * factor}
    if own.confidence_threshold:
        threshold = own.confidence_threshold * 10
        changes["confidence threshold x 10"] = {"confidence_threshold": threshold}
    found: dict[str, SamplerSettings] = {}
    for name, change in changes.items():
        settings = replace(own, **change)
        if settings not in found.values():  # of one step there is no half
            found[name] = settings
    return found


def sweep(
    config: RunConfig,
    dataset: Path,
    base: Path,
    tuned: Path,
    out: Path,
    ranks: Ranks,
    cache_path: Path | None = None,
) -> None:
    """Answer the held-out rows with each setting; write sweep.json, sweep.svg and sweep.png.

    Several ranks take the questions from one queue. A sweep that was killed resumes, as an evaluation
    does.

    Args:
        base: checkpoint folder, whose tokenizer and generation_config.json count.
        tuned: checkpoint folder of the model that answers.
        cache_path: file that saves partial results, deleted at the end; None: a file next to `out`.

    Raises:
        UserError: as `evaluate`; no row that a judge can score.
    """
    out = out.absolute()
    ranks.on_first(lambda: check_writable(out))
    tokenizer = load_transformers_tokenizer(base)
    questions = select_questions(dataset, tokenizer, config.evaluate.rows)
    judges: list[Judging] = []  # the first rank's
    ranks.on_first(lambda: judges.append(judging_of(config, questions)))
    how = answering(base, read_model_config(base), config.evaluate, response_ends(dataset))
    hashes = ranks.on_first(lambda: {path: hash_path(path) for path in (base, tuned)})
    device = find_device()
    common = {"base": hashes[base], "device": device.type, **software_versions()}
    conditions = Conditions(config, tokenizer, common, device)
    tried = settings_to_try(how.sampler)
    judged: dict[str, list[JudgedRow]] = {}
    costs: dict[str, list[dict[str, Any]]] = {}
    with ranks.open_cache(cache_path or out.with_name(f".{out.name}.unfinished.jsonl")) as cache:
        checkpoint = Checkpoint(SIDES[1], tuned, hashes[tuned])
        run = ModelRun(checkpoint, conditions, ranks, Store(cache, None))
        for name, sampler in tried.items():
            answers = run.answer(questions, replace(how, sampler=sampler))
            costs[name] = list(answers.values())

            def judge(
                name: str = name, answers: Mapping[tuple[str, int], dict[str, Any]] = answers
            ) -> None:
                judged[name] = _judge(config, judges[0], questions, answers)
                score = side_scores(judged[name], "after")["score"]
                logger.info(f"sweep: {name}: {score:.1%}")

            ranks.on_first(judge)
        if judges:
            points, label = _points(tried, judged, costs), measure(next(iter(judged.values())))
            with atomic_directory(out) as folder:
                tree = {
                    "measure": label,
                    "judges": judges[0].names,
                    "rows": len(questions),
                    "repeats": config.evaluate.repeats,
                    "points": [asdict(point) for point in points],
                }
                write_json(folder / "sweep.json", tree)
                for suffix in ("svg", "png"):
                    draw_sweep(points, label, folder / f"sweep.{suffix}")
                inputs = {"data": dataset, "base": base, "tuned": tuned}
                write_provenance(folder, "sweep", config, inputs)
        cache.delete()


def _judge(
    config: RunConfig,
    judging: Judging,
    questions: Sequence[Question],
    answers: Mapping[tuple[str, int], dict[str, Any]],
) -> list[JudgedRow]:
    """Judge what one setting answered. Raises: UserError, no row that a judge can score."""
    rows = []
    for one in questions:
        texts = [answers[one.id, seed]["text"] for seed in answer_seeds(config)]
        shown, *repeats = ({"before": text, "after": text} for text in texts)
        row: dict[str, Any] = {"source": one.source or config.data.source}
        row |= {"prompt": one.text, "reference": one.reference, **shown, "repeats": repeats}
        rows.append(row)
    judged = judge_rows(judging, rows)
    if not any(row.scored for row in judged):
        raise UserError(
            f"evaluate.judge ({', '.join(judging.names)}) cannot judge any of the "
            f"{len(questions)} rows, but a sweep compares scores",
            hint="Set evaluate.judge to one that fits the references, such as chrf.",
        )
    return judged


def _points(
    tried: dict[str, SamplerSettings],
    judged: dict[str, list[JudgedRow]],
    costs: dict[str, list[dict[str, Any]]],
) -> list[SweepPoint]:
    own = next(iter(tried))
    points = []
    for name, sampler in tried.items():
        figures = side_scores(judged[name], "after")
        pairs = zip(judged[name], judged[own], strict=True)
        p, verdict = paired_test(
            [
                row.mean("after") - before.mean("after")
                for row, before in pairs
                if row.scored and before.scored
            ]
        )
        answers = costs[name]
        points.append(
            SweepPoint(
                name=name,
                sampler=asdict(sampler),
                score=figures["score"],
                score_low=figures["score_low"],
                score_high=figures["score_high"],
                forwards=_mean(answers, "forwards"),
                tokens_per_forward=sum(each["tokens"] / each["forwards"] for each in answers)
                / len(answers),
                seconds=_mean(answers, "seconds"),
                p_value=p,
                verdict=verdict,
                best=False,
            )
        )
    return [replace(point, best=_is_best(point, points)) for point in points]


def _mean(answers: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(each[name] for each in answers)) / len(answers)


def _is_best(point: SweepPoint, points: Sequence[SweepPoint]) -> bool:
    """Return whether no other point is better in one of the two and at least as good in the other."""
    return not any(
        other.score >= point.score
        and other.forwards <= point.forwards
        and (other.score, other.forwards) != (point.score, point.forwards)
        for other in points
    )


def sweep_table(points: Sequence[SweepPoint], label: str) -> str:
    """Return the points as a table for the terminal, fewest forward passes first."""
    head = ("setting", label, "95% interval", "forwards", "tokens/forward", "against the recipe's")
    rows = [
        (
            f"{'* ' if point.best else '  '}{point.name}",
            f"{point.score:.1%}",
            f"{point.score_low:.1%} to {point.score_high:.1%}",
            f"{point.forwards:.2f}",
            f"{point.tokens_per_forward:.2f}",
            f"{point.verdict}, p = {point.p_value:.2g}",
        )
        for point in sorted(points, key=lambda point: point.forwards)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([*lines, "* no other setting has a higher score with as few forward passes"])


def draw_sweep(points: Sequence[SweepPoint], label: str, path: Path) -> None:
    """Draw score against forward passes, with intervals, as SVG or PNG by the path's suffix.

    Args:
        points: the first one is the recipe's.
        label: what the scores are called.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "sweep", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        best = sorted((point for point in points if point.best), key=lambda point: point.forwards)
        axes.plot(
            [point.forwards for point in best],
            [100 * point.score for point in best],
            color=_BEST,
            linewidth=1.2,
            label="no other has a higher score with as few passes",
            marker="o",
            markersize=5,
        )
        for point in points:
            axes.plot(
                [point.forwards] * 2,
                [100 * point.score_low, 100 * point.score_high],
                color=_BEST if point.best else _OTHER,
                linewidth=0.8,
                alpha=0.6,
                zorder=1,
            )
        others = [point for point in points if not point.best]
        axes.plot(
            [point.forwards for point in others],
            [100 * point.score for point in others],
            color=_OTHER,
            linestyle="none",
            marker="o",
            markersize=5,
            label="another has",
        )
        axes.plot(
            [points[0].forwards],
            [100 * points[0].score],
            color=_OWN,
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            label="the recipe's settings",
        )
        axes.set_xlabel("forward passes of an answer, mean")
        axes.set_ylabel(f"{label} (%), 95% intervals")
        axes.set_xlim(0, 1.15 * max(point.forwards for point in points))
        axes.margins(y=0.08)
        axes.grid(color="#e3e6ec", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        _label_points(axes, points)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)


def _label_points(axes: Any, points: Sequence[SweepPoint]) -> None:
    """Write each setting next to its point, where it covers the least of labels and points.

    Settings whose points are in one place share a label, a line each.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # the layout, which the places depend on
    frame, taken = axes.get_window_extent(), []
    labels: dict[tuple[float, float], list[SweepPoint]] = {}  # by the place of the first one
    for point in points:
        ends = [(point.forwards, 100 * y) for y in (point.score_low, point.score, point.score_high)]
        (x, low), (_, y), (_, high) = axes.transData.transform(ends)
        taken += [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9)]
        taken += [Bbox.from_extents(x - 2, low, x + 2, high)]
        near = (place for place in labels if max(abs(place[0] - x), abs(place[1] - y)) < _NEAR)
        labels.setdefault(next(near, (x, y)), []).append(point)
    for together in labels.values():
        at = (together[0].forwards, 100 * together[0].score)
        names = "\n".join(point.name for point in together)
        text = axes.annotate(names, at, xytext=(0, 0), textcoords="offset points")
        choices = []
        for offset in _OFFSETS:
            _put(text, offset)
            box = text.get_window_extent()
            outside = box.width * box.height - _shared(box, frame)
            choices.append(10 * outside + sum(_shared(box, other) for other in taken))
        _put(text, _OFFSETS[choices.index(min(choices))])
        taken.append(text.get_window_extent())


def _put(text: Any, offset: tuple[float, float]) -> None:
    right, up = offset
    text.set(
        position=offset,
        ha="left" if right > 0 else "right" if right < 0 else "center",
        va="bottom" if up > 0 else "top" if up < 0 else "center",
    )


def _shared(one: Any, other: Any) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def read_sweep(folder: Path) -> tuple[str, list[SweepPoint]]:
    """Return what the scores of a sweep are called, and its points."""
    tree = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return tree["measure"], [SweepPoint(**point) for point in tree["points"]]

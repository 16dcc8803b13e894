"""Quality against forward passes: the tuned model's answers with a few settings of its sampler."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.evaluation.answer_cache import AnswerCache
from canvastune.evaluation.figures import JudgedRow, judge_rows, measure, side_scores
from canvastune.evaluation.generation import (
    answer_seeds,
    answering,
    generate_answers,
    response_ends,
    select_questions,
    software_versions,
)
from canvastune.evaluation.run import judging_of
from canvastune.evaluation.scoring import paired_test
from canvastune.io.atomic import atomic_directory, check_writable
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import to_json_text
from canvastune.io.provenance import write_provenance
from canvastune.preparation.tokenizer import load_tokenizer

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
    for part in (2, 4):
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


def sweep(config: RunConfig, dataset: Path, base: Path, tuned: Path, out: Path) -> list[SweepPoint]:
    """Answer the held-out rows with each setting; write sweep.json, sweep.svg and sweep.png.

    A sweep that was killed resumes, as an evaluation does.

    Args:
        base: checkpoint folder, whose tokenizer and generation_config.json count.
        tuned: checkpoint folder of the model that answers.

    Raises:
        UserError: as `evaluate`; no row that a judge can score.
    """
    out = out.absolute()
    check_writable(out)
    tokenizer = load_tokenizer(base).tokenizer
    questions = select_questions(dataset, tokenizer, config.evaluate.rows)
    judging = judging_of(config, questions)
    how = answering(base, read_model_config(base), config.evaluate, response_ends(dataset))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common = {"model": hash_path(tuned), "base": hash_path(base), "device": device.type}
    common |= software_versions()
    seeds = answer_seeds(config)
    tried = settings_to_try(how.sampler)
    model = load_stock(tuned, device)
    judged: dict[str, list[JudgedRow]] = {}
    costs: dict[str, list[dict[str, Any]]] = {}
    with AnswerCache(out.with_name(f".{out.name}.unfinished.jsonl")) as cache:
        for name, sampler in tried.items():
            with_it = replace(how, sampler=sampler)
            keys = {
                (one.id, seed): {
                    **common,
                    **asdict(with_it),
                    "seed": seed,
                    "id": one.id,
                    "asked": one.tokens,
                }
                for seed in seeds
                for one in questions
            }
            for seed in seeds:
                open_questions = [one for one in questions if cache.get(keys[one.id, seed]) is None]
                given = (open_questions, tokenizer, with_it, seed, config.evaluate.batch_size)
                for id, answer in generate_answers(model, *given, None):
                    cache.put(keys[id, seed], answer)
            answers = {key: cache.get(found) for key, found in keys.items()}
            costs[name] = list(answers.values())
            rows = []
            for one in questions:
                shown, *repeats = (
                    {"before": text, "after": text}
                    for text in (answers[one.id, seed]["text"] for seed in seeds)
                )
                row: dict[str, Any] = {"source": one.source or config.data.source}
                row |= {"prompt": one.text, "reference": one.reference, **shown}
                row["repeats"] = repeats
                rows.append(row)
            judged[name] = judge_rows(judging, rows)
            if not any(row.scored for row in judged[name]):
                raise UserError(
                    f"evaluate.judge ({', '.join(judging.names)}) can judge none of the "
                    f"{len(questions)} rows, and a sweep compares scores",
                    hint="Set evaluate.judge to one that fits the references, such as chrf.",
                )
            logger.info(f"sweep: {name}: {side_scores(judged[name], 'after')['score']:.1%}")
        points = _points(tried, judged, costs)
        with atomic_directory(out) as folder:
            label = measure(next(iter(judged.values())))
            tree = {
                "measure": label,
                "judges": judging.names,
                "rows": len(questions),
                "repeats": len(seeds),
                "points": [asdict(point) for point in points],
            }
            (folder / "sweep.json").write_text(to_json_text(tree, indent=2), encoding="utf-8")
            for suffix in ("svg", "png"):
                draw_sweep(points, label, folder / f"sweep.{suffix}")
            inputs = {"data": dataset, "base": base, "tuned": tuned}
            write_provenance(folder, "sweep", config, inputs)
        cache.delete()
    return points


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
            f"{point.forwards:.1f}",
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
    """Draw score against forward passes, with intervals, as SVG or PNG by the path's suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "sweep", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        best = sorted((point for point in points if point.best), key=lambda point: point.forwards)
        axes.plot(
            [point.forwards for point in best],
            [100 * point.score for point in best],
            color="#1f5fd0",
            linewidth=1,
        )
        for point in points:
            below, above = point.score - point.score_low, point.score_high - point.score
            axes.errorbar(
                [point.forwards],
                [100 * point.score],
                yerr=[[100 * max(0.0, below)], [100 * max(0.0, above)]],
                fmt="o",
                color="#1f5fd0" if point.best else "#8a93a3",
                elinewidth=0.8,
                markersize=5,
            )
            axes.annotate(
                point.name,
                (point.forwards, 100 * point.score),
                xytext=(6, 4),
                textcoords="offset points",
            )
        axes.set_xlabel("forward passes of an answer, mean")
        axes.set_ylabel(f"{label} (%), 95% intervals")
        axes.margins(x=0.15)
        axes.grid(color="#e3e6ec", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)


def read_sweep(folder: Path) -> tuple[str, list[SweepPoint]]:
    """Return what the scores of a sweep are called, and its points."""
    tree = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return tree["measure"], [SweepPoint(**point) for point in tree["points"]]

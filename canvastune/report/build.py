"""Gathers what the steps left behind and writes it as one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from canvastune import __version__
from canvastune.config import RunConfig, parse_config
from canvastune.config.strict import flatten
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from canvastune.io.provenance import write_provenance
from canvastune.report import formatting
from canvastune.report.charts import Chart, Record, charts_of, curves_json, draw_png, draw_svg, policy, script, smoothing_span, summary_rows
from canvastune.report.denoising_trace import denoising_trace
from canvastune.report.formatting import marked
from canvastune.report.summary import (
    RunArtifacts,
    cost_of,
    differing,
    events_of,
    exact_match,
    figures,
    file_in,
    named,
    plan_rows,
    read_json,
    training,
    warnings_of,
)
from canvastune.tracking import read_metrics

_MOST_ANSWERS = 200  # on the page; the rest is in answers.jsonl
_OPEN_ANSWERS = 12  # of them seen without a click
_LONGEST_TEXT = 1500  # characters of one cell
_MOST_EVENTS = 100
_MOST_BYTES = 2_000_000  # of the page: what Kubeflow's and MLflow's viewers show without trouble


def write_report(run: RunArtifacts, out: Path, compare: Sequence[RunArtifacts] = ()) -> Path:
    """Write `report.html` and a PNG per curve into `out`; returns the page's path.

    The page is self-contained (its own script alone, no request), under 2 MB, and says what was not done rather than leaving it out.

    Args:
        compare: other runs, whose curves are laid over; their figures and what they set otherwise become tables.

    Raises:
        UserError: an input cannot be read, there is no training step in a run's metrics, or `out` is not empty.
    """
    runs = [run, *compare]
    names, recorded = named(runs), [_records(each.metrics) for each in runs]
    with atomic_directory(out) as folder:
        charts = charts_of(list(zip(names, recorded, strict=True)))
        marks = [event["step"] for event in events_of(recorded[0])[0]]
        for chart in charts:
            draw_png(chart, marks, folder / f"{chart.name}.png")
        context = _context(run, recorded[0])
        if compare:
            context["compared"] = [figures(*each) for each in zip(names, runs, recorded, strict=True)]
            context["differing"] = differing(runs)
        context["charts"] = [_drawn(chart, marks) for chart in charts]
        context["curves"] = curves_json(charts, marks, context["facts"]["steps"])
        page = _render(context)
        if len(page.encode()) > _MOST_BYTES:
            context["answers"] = context["answers"][:_OPEN_ANSWERS]
            page = _render(context)
        (folder / "report.html").write_text(page, encoding="utf-8")
        given = {"metrics": run.metrics, "data": run.data, "plan": run.plan, "evaluation": run.evaluation, "merge": run.merge}
        given |= {f"compared with {name}": each.metrics for name, each in zip(names[1:], compare, strict=True)}
        write_provenance(folder, "report", run.config, {name: path for name, path in given.items() if path is not None})
    return out / "report.html"


def _context(run: RunArtifacts, records: list[Record]) -> dict[str, Any]:
    config = run.config
    card = read_json(run.data / "card.json") if run.data else None
    planned = read_json(file_in(run.plan, "plan.json")) if run.plan else None
    evaluated = read_json(file_in(run.evaluation, "evaluation.json")) if run.evaluation else None
    proof = read_json(file_in(run.merge, "merge_proof.json")) if run.merge else None
    facts = training(records, config)
    told, checkpoints = events_of(records)
    answers = _answers(run.evaluation)
    return {
        "name": run.name,
        "config": config,
        "changed": _changed(config),
        "config_yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "version": __version__,
        "facts": facts,
        "match": exact_match(evaluated) if evaluated else None,
        "cost": cost_of(records, config),
        "evaluation": evaluated,
        "answers": [_side_by_side(row) for row in answers[:_MOST_ANSWERS]],
        "answer_count": len(answers),
        "open_answers": _OPEN_ANSWERS,
        "film": denoising_trace(run.evaluation),
        "smoothing": smoothing_span(facts["steps"]),
        "outcomes": _outcomes(answers),
        "card": card,
        "plan_rows": plan_rows(planned, facts) if planned else [],
        "plan_text": _plan_text(run.plan),
        "plan": planned,
        "merge": proof,
        "events": told[:_MOST_EVENTS],
        "event_count": len(told),
        "checkpoints": checkpoints,
        "warnings": warnings_of(config, facts, records, evaluation=evaluated, merge=proof, card=card or {}),
        "compared": [],
        "differing": [],
        "ended": max((record.get("time", 0) for record in records), default=0),
        "provenance": _provenance(run),
    }


def _records(path: Path) -> list[Record]:
    found = read_metrics(file_in(path, "metrics.jsonl"))
    if not any(record["kind"] == "train" for record in found):
        raise UserError(f"{path}: holds no training step. Give the metrics.jsonl of a run that made at least one")
    return found


def _drawn(chart: Chart, marks: list[int]) -> dict[str, Any]:
    # Markup: matplotlib escapes the only texts that are the user's, the names of runs, and the page shows those itself.
    return {
        "chart": chart,
        "summary": summary_rows(chart),
        "narrow": Markup(draw_svg(chart, marks, wide=False)),
        "wide": Markup(draw_svg(chart, marks, wide=True)) if chart.wide else None,
    }


def _answers(evaluation: Path | None) -> list[dict[str, Any]]:
    """Answers with what became of each, the ones to look at first: lost, still wrong, gained, right on both sides, not scored."""
    path = evaluation / "answers.jsonl" if evaluation and evaluation.is_dir() else None
    if path is None or not path.is_file():
        return []
    order = ("lost", "wrong", "gained", "right", "unscored")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sides = (row.get("correct_before"), row.get("correct_after"))
        row["outcome"] = {(True, False): "lost", (False, False): "wrong", (False, True): "gained", (True, True): "right"}.get(
            sides, "unscored"
        )
        rows.append(row)
    return sorted(rows, key=lambda row: order.index(row["outcome"]))


def _side_by_side(row: dict[str, Any]) -> dict[str, Any]:
    before, after = marked(_cut(row["before"]), _cut(row["after"]))
    return row | {"before": before, "after": after}


def _outcomes(answers: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row["outcome"] == name for row in answers) for name in ("gained", "lost", "right", "wrong", "unscored")}


def _changed(config: RunConfig) -> list[dict[str, Any]]:
    """What the recipe sets otherwise than Canvastune would: {"key", "value", "default"} each; a required key has no default."""
    required = {"name": config.name, "data": {"source": config.data.source}}
    usual = flatten(parse_config(required).model_dump(mode="json")) | dict.fromkeys(flatten(required))
    found = flatten(config.model_dump(mode="json"))
    keys = sorted({*found, *usual}, key=[*found, *usual].index)
    return [{"key": key, "value": found.get(key), "default": usual.get(key)} for key in keys if found.get(key) != usual.get(key)]


def _plan_text(plan: Path | None) -> str | None:
    path = plan / "plan.txt" if plan and plan.is_dir() else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _provenance(run: RunArtifacts) -> list[dict[str, Any]]:
    """provenance.json of every step that has one, in the order of the steps."""
    folders = (run.data, run.plan, file_in(run.metrics, "metrics.jsonl").parent, run.merge, run.evaluation)
    files = [folder / "provenance.json" for folder in folders if folder is not None]
    return [read_json(file) for file in files if file.is_file()]


def _render(context: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formatting.FILTERS
    environment.filters |= {"cut": _cut, "as_written": json.dumps}
    # The policy names the hash of the script as it stands in the page, line breaks included.
    code = Markup(f"\n{script()}\n")
    return environment.get_template("report.html.jinja").render(context, script=code, policy=policy(code))


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} [... {len(text) - _LONGEST_TEXT:,} more characters]"

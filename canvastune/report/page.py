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
from canvastune.errors import UserError
from canvastune.outputs import whole_folder, write_provenance
from canvastune.report import numbers
from canvastune.report.curves import Chart, Record, charts_of, draw_png, draw_svg, series, smoothing_span
from canvastune.report.differences import marked
from canvastune.report.facts import cost_of, events_of, exact_match, file_in, leaves, median, plan_rows, read_json, training, warnings_of
from canvastune.report.interactive import curves_json, policy, script, summary_rows
from canvastune.tracking import read_metrics

_MOST_ANSWERS = 200  # on the page; the rest is in answers.jsonl
_OPEN_ANSWERS = 12  # of them seen without a click
_LONGEST_TEXT = 1500  # characters of one cell
_MOST_EVENTS = 100
_MOST_BYTES = 2_000_000  # of the page: what Kubeflow's and MLflow's viewers show without trouble


def write_report(
    config: RunConfig,
    out: Path,
    *,
    metrics: Path,
    data: Path,
    plan: Path | None,
    evaluation: Path | None,
    merge: Path | None,
    compare: Sequence[Path] = (),
) -> Path:
    """Write `report.html` and a PNG per curve into `out`; returns the page's path.

    The page is self-contained (its own script alone, no request), under 2 MB, and says what was not done rather than leaving it out.

    Args:
        metrics: metrics.jsonl of the run, or the folder that holds it; likewise each of `compare`, whose curves are laid over.
        data: folder of the prepared data set.
        plan, evaluation, merge: output folders of these steps; None where the step was not made.

    Raises:
        UserError: an input cannot be read, there is no training step in `metrics`, or `out` is not empty.
    """
    own = _records(metrics)
    if not any(record["kind"] == "train" for record in own):
        raise UserError(f"{metrics}: holds no training step. Give the metrics.jsonl of a run that made at least one")
    runs = [(config.name, own), *((name, _records(path)) for name, path in _named(compare, config.name))]
    with whole_folder(out) as folder:
        charts = charts_of(runs)
        marks = [event["step"] for event in events_of(own)[0]]
        for chart in charts:
            draw_png(chart, marks, folder / f"{chart.name}.png")
        context = _context(config, runs, data=data, plan=plan, evaluation=evaluation, merge=merge)
        context["charts"] = [_drawn(chart, marks) for chart in charts]
        context["curves"] = curves_json(charts, marks, context["facts"]["steps"])
        context["provenance"] = _provenance(
            {"train": file_in(metrics, "metrics.jsonl").parent, "data": data, "plan": plan, "merge": merge, "evaluation": evaluation}
        )
        page = _render(context)
        if len(page.encode()) > _MOST_BYTES:
            context["answers"] = context["answers"][:_OPEN_ANSWERS]
            page = _render(context)
        (folder / "report.html").write_text(page, encoding="utf-8")
        given = {"metrics": metrics, "data": data, "plan": plan, "evaluation": evaluation, "merge": merge}
        write_provenance(folder, "report", config, {name: path for name, path in given.items() if path is not None})
    return out / "report.html"


def _context(
    config: RunConfig, runs: list[tuple[str, list[Record]]], *, data: Path, plan: Path | None, evaluation: Path | None, merge: Path | None
) -> dict[str, Any]:
    own = runs[0][1]
    card = read_json(data / "card.json")
    planned = read_json(file_in(plan, "plan.json")) if plan else None
    evaluated = read_json(file_in(evaluation, "evaluation.json")) if evaluation else None
    proof = read_json(file_in(merge, "merge_proof.json")) if merge else None
    facts = training(own, config)
    told, checkpoints = events_of(own)
    answers = _answers(evaluation)
    return {
        "config": config,
        "changed": _changed(config),
        "config_yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "version": __version__,
        "facts": facts,
        "match": exact_match(evaluated) if evaluated else None,
        "cost": cost_of(config, facts["seconds"], evaluated),
        "evaluation": evaluated,
        "answers": [_side_by_side(row) for row in answers[:_MOST_ANSWERS]],
        "answer_count": len(answers),
        "open_answers": _OPEN_ANSWERS,
        "smoothing": smoothing_span(facts["steps"]),
        "outcomes": _outcomes(answers),
        "card": card,
        "plan_rows": plan_rows(planned, facts) if planned else [],
        "plan_text": _plan_text(plan),
        "plan": planned,
        "merge": proof,
        "events": told[:_MOST_EVENTS],
        "event_count": len(told),
        "checkpoints": checkpoints,
        "warnings": warnings_of(config, facts, own, evaluation=evaluated, merge=proof, card=card),
        "compared": [_summary(name, records) for name, records in runs] if len(runs) > 1 else [],
        "ended": max((record.get("time", 0) for record in own), default=0),
    }


def _records(path: Path) -> list[Record]:
    return read_metrics(file_in(path, "metrics.jsonl"))


def _named(compare: Sequence[Path], own: str) -> list[tuple[str, Path]]:
    """A name for each earlier run: its folder's, made unique."""
    taken, named = {own}, []
    for path in compare:
        folder = file_in(path, "metrics.jsonl").absolute().parent
        name = base = folder.parent.name if folder.name == "train" else folder.name
        number = 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        taken.add(name)
        named.append((name, path))
    return named


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


def _summary(name: str, records: list[Record]) -> dict[str, Any]:
    losses, validation = series(records, "train", "loss")[1], series(records, "validation", "loss")[1]
    ends = max(1, len(losses) // 30)
    return {
        "name": name,
        "steps": len(losses),
        "loss": sum(losses[-ends:]) / ends if losses else None,
        "validation": validation[-1] if validation else None,
        "tokens_per_second": median(series(records, "train", "tokens_per_second")[1]),
        "seconds": sum(series(records, "train", "seconds")[1]),
    }


def _changed(config: RunConfig) -> list[dict[str, Any]]:
    """What the recipe sets otherwise than Canvastune would: {"key", "value", "default"} each; a required key has no default."""
    required = {"name": config.name, "data": {"source": config.data.source}}
    usual = leaves(parse_config(required).model_dump(mode="json")) | dict.fromkeys(leaves(required))
    found = leaves(config.model_dump(mode="json"))
    keys = sorted({*found, *usual}, key=[*found, *usual].index)
    return [{"key": key, "value": found.get(key), "default": usual.get(key)} for key in keys if found.get(key) != usual.get(key)]


def _plan_text(plan: Path | None) -> str | None:
    path = plan / "plan.txt" if plan and plan.is_dir() else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _provenance(folders: dict[str, Path | None]) -> list[dict[str, Any]]:
    """provenance.json of every step that has one, in the order of the steps."""
    found = []
    for name, folder in folders.items():
        path = folder / "provenance.json" if folder is not None and folder.is_dir() else None
        if path is not None and path.is_file():
            found.append({"input": name, **read_json(path)})
    return found


def _render(context: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= numbers.FILTERS
    environment.filters |= {"cut": _cut, "as_written": json.dumps}
    # The policy names the hash of the script as it stands in the page, line breaks included.
    code = Markup(f"\n{script()}\n")
    return environment.get_template("report.html.jinja").render(context, script=code, policy=policy(code))


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} [... {len(text) - _LONGEST_TEXT:,} more characters]"

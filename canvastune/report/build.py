"""Build the report of a run: one self-contained HTML page, and a PNG per chart."""

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
from canvastune.evaluation.result import SIDES, VERDICTS, EvaluationResult
from canvastune.io.atomic import atomic_directory
from canvastune.io.json_text import read_json_lines
from canvastune.io.provenance import write_provenance
from canvastune.report import formatting
from canvastune.report.charts import (
    build_charts,
    charts_json,
    content_security_policy,
    draw_chart_file,
    draw_chart_image,
    page_script,
    smoothing_span,
    summary_rows,
)
from canvastune.report.comparison import (
    differing_inputs,
    other_answers,
    pair_rows,
    seed_spread,
)
from canvastune.report.data_drift import compare_data
from canvastune.report.denoising_trace import read_denoising_trace
from canvastune.report.formatting import mark_differences
from canvastune.report.next_action import Action, ask_command, next_action
from canvastune.report.summary import (
    LAST_STEPS,
    Cost,
    Energy,
    Record,
    RunArtifacts,
    RunSummary,
    StepCost,
    TrainingStats,
    count_checkpoints,
    differing_settings,
    direction,
    file_in,
    find_warnings,
    notable_events,
    optional_file,
    plan_rows,
    read_json,
    step_costs,
    unique_names,
)
from canvastune.tracking import read_metrics

_MAX_ANSWERS = 200  # on the page; answers.jsonl has all of them
_OPEN_ANSWERS = 12  # shown without a click
_MAX_TEXT = 1500  # characters of a cell
_MAX_EVENTS = 100
_MAX_PAGE_BYTES = 2_000_000  # what Kubeflow's and MLflow's viewers show without trouble
# In the order of the page; "same" is a score between right and wrong that did not change.
_OUTCOMES = ("lost", "wrong", "same", "gained", "right", "unscored")


def build_report(run: RunArtifacts, out: Path, compare: Sequence[RunArtifacts] = ()) -> Path:
    """Write `report.html` and a PNG per chart into `out`; return the page's path.

    The page is self-contained (its own script, no request), under 2 MB, and names the steps that
    did not run instead of leaving them out.

    Args:
        compare: other runs, overlaid in the charts; their figures and differing settings become
            tables.

    Raises:
        UserError: an input cannot be read, a run's metrics have no training step, or `out` is not
            empty.
    """
    runs = [run, *compare]
    names, recorded = unique_names(runs), [_read_records(each.metrics) for each in runs]
    with atomic_directory(out) as folder:
        charts = build_charts(list(zip(names, recorded, strict=True)))
        marks = [event["step"] for event in notable_events(recorded[0])]
        for chart in charts:
            draw_chart_file(chart, marks, folder / f"{chart.name}.png")
        context = _context(run, recorded[0])
        if compare:
            rows = zip(names, runs, recorded, strict=True)
            context["compared"] = [_comparison_row(*each) for each in rows]
            results = [each["evaluation"] for each in context["compared"] if each["evaluation"]]
            context["titles"] = " / ".join(dict.fromkeys(each.title for each in results))
            context["titles"] = context["titles"] or "Exact match"
            context["mixed_measures"] = len({each.measure for each in results}) > 1
            context["differing"] = differing_settings(runs)
            evaluations = [each["evaluation"] for each in context["compared"]]
            context["seeds"] = seed_spread(runs, evaluations)
            context["differing"] += differing_inputs(runs)
            own, *others = [_answer_lines(each.evaluation) for each in runs]
            for row, other in zip(context["compared"][1:], others, strict=True):
                row["paired"] = pair_rows(own, other)
            for row, data in zip(context["compared"], compare_data(run, compare), strict=True):
                row["data"] = data
            by_name = {
                name: {row["id"]: row["after"] for row in other}
                for name, other in zip(names[1:], others, strict=True)
            }
            for row in context["answers"]:
                row["others"] = other_answers(row["recorded"], by_name)
        context["charts"] = [
            {"chart": each, "summary": summary_rows(each), "image": draw_chart_image(each, marks)}
            for each in charts
        ]
        context["curves"] = charts_json(charts, marks, context["stats"].steps)
        page = _render(context)
        if len(page.encode()) > _MAX_PAGE_BYTES:
            context["answers"] = context["answers"][:_OPEN_ANSWERS]
            page = _render(context)
        (folder / "report.html").write_text(page, encoding="utf-8")
        read = ("metrics", "data", "plan", "evaluation", "merge")
        inputs: dict[str, Path | None] = {name: getattr(run, name) for name in read}
        inputs |= {
            f"compared with {name}": each.metrics
            for name, each in zip(names[1:], compare, strict=True)
        }
        found = {name: path for name, path in inputs.items() if path is not None}
        write_provenance(folder, "report", run.config, found)
    return out / "report.html"


def _context(run: RunArtifacts, records: list[Record]) -> dict[str, Any]:
    config = run.config
    card = read_json(run.data / "card.json") if run.data else None
    plan = read_json(file_in(run.plan, "plan.json")) if run.plan else None
    evaluation = EvaluationResult.read(run.evaluation) if run.evaluation else None
    proof = read_json(file_in(run.merge, "merge_proof.json")) if run.merge else None
    stats = TrainingStats.from_records(records, config)
    events = notable_events(records)
    answers = _read_answers(run.evaluation)
    return {
        "name": run.name,
        "config": config,
        "changed": _changed_settings(config),
        "config_yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "version": __version__,
        "summary": RunSummary.from_records(records, evaluation),
        "stats": stats,
        "last_steps": min(LAST_STEPS, stats.steps),
        "cost": Cost.from_records(records, config),
        "energy": Energy.from_records(records),
        "step_costs": (costs := step_costs(run)),
        "price": _total_price(costs),
        "currency": config.cluster.currency,
        "pages": [page for page in run.pages if page[1].startswith(("http://", "https://"))],
        "folder": run.folder,
        "model": run.model,
        "try_it": ask_command(run.folder) if run.folder and evaluation else "",
        "action": _next_action(run, evaluation, proof, card or {}),
        "evaluation": evaluation,
        "direction": direction(evaluation) if evaluation else None,
        "slice_kinds": _slice_kinds(evaluation) if evaluation else "",
        "answers": [_side_by_side(row) for row in answers[:_MAX_ANSWERS]],
        "answer_count": len(answers),
        "open_answers": _OPEN_ANSWERS,
        "trace": read_denoising_trace(run.evaluation),
        "smoothing": smoothing_span(stats.steps),
        "outcomes": _count_outcomes(answers),
        "card": card,
        "plan_rows": plan_rows(plan, stats) if plan else [],
        "plan_text": _read_plan_text(run.plan),
        "plan": plan,
        "merge": proof,
        "events": events[:_MAX_EVENTS],
        "event_count": len(events),
        "checkpoints": count_checkpoints(records),
        "warnings": find_warnings(
            config,
            records,
            evaluation=evaluation,
            merge=proof,
            card=card or {},
            answers=answers,
        ),
        "compared": [],
        "differing": [],
        "seeds": None,
        "ended": max((record.get("time", 0) for record in records), default=0),
        "provenance": _read_provenance(run),
    }


def _read_records(path: Path) -> list[Record]:
    found = read_metrics(file_in(path, "metrics.jsonl"))
    if not any(record["kind"] == "train" for record in found):
        raise UserError(
            f"{path}: found no training step in metrics.jsonl",
            hint="Use a run that has finished at least one step.",
        )
    return found


def _comparison_row(name: str, run: RunArtifacts, records: list[Record]) -> dict[str, Any]:
    evaluation = EvaluationResult.read(run.evaluation) if run.evaluation else None
    return {
        "name": name,
        "summary": RunSummary.from_records(records, evaluation),
        "stats": TrainingStats.from_records(records, run.config),
        "cost": Cost.from_records(records, run.config),
        "evaluation": evaluation,
        "paired": None,
    }


def _read_answers(evaluation: Path | None) -> list[dict[str, Any]]:
    """Read the answers with the outcome of each, the ones to look at first coming first."""
    rows = []
    for row in _answer_lines(evaluation):
        scores = [row.get(f"score_{side}", row.get(f"correct_{side}")) for side in SIDES]
        graded = None not in scores and not set(scores) <= {0, 1}
        more = {"outcome": _outcome(*scores), "graded": graded}
        rows.append(row | dict(zip(("score_before", "score_after"), scores, strict=True)) | more)
    return sorted(rows, key=lambda row: _OUTCOMES.index(row["outcome"]))


def _answer_lines(evaluation: Path | None) -> list[dict[str, Any]]:
    path = optional_file(evaluation, "answers.jsonl")
    return [] if path is None else read_json_lines(path)


def _outcome(before: float | None, after: float | None) -> str:
    """Name how the score of a row changed; earlier versions wrote only whether it is right."""
    if before is None or after is None:
        return "unscored"
    if before != after:
        return "gained" if after > before else "lost"
    return {0: "wrong", 1: "right"}.get(int(after) if after in (0, 1) else -1, "same")


def _side_by_side(row: dict[str, Any]) -> dict[str, Any]:
    """Mark how the answers differ from the reference, also the right ones: a judge may look at their
    end only.
    """
    reference = _shorten(row["reference"])
    shown: dict[str, Any] = {"recorded": row, "others": []}
    for side in SIDES:  # the last one is the tuned model's
        shown["reference"], shown[side] = mark_differences(reference, _shorten(row[side]))
    return row | shown


def _total_price(costs: Sequence[StepCost]) -> float | None:
    prices = [cost.price for cost in costs if cost.price is not None]
    return sum(prices) if prices else None


def _next_action(
    run: RunArtifacts,
    evaluation: EvaluationResult | None,
    merge: dict[str, Any] | None,
    card: dict[str, Any],
) -> Action | None:
    """Return what to do next; None for a training without a pipeline, whose folders differ."""
    if run.folder is None or run.model is None:
        return None
    return next_action(
        run.config, evaluation, merge=merge, card=card, folder=run.folder, model=run.model
    )


def _count_outcomes(answers: list[dict[str, Any]]) -> dict[str, int]:
    order = ("gained", "lost", "right", "wrong", "same", "unscored")
    return {name: sum(row["outcome"] == name for row in answers) for name in order}


def _slice_kinds(evaluation: EvaluationResult) -> str:
    names = {"judge": "judge", "source": "source", "column": "column", "length": "answer length"}
    names["forgetting"] = "other data"
    found = list(dict.fromkeys(names[each.by] for each in evaluation.all_slices))
    return " and ".join([", ".join(found[:-1]), found[-1]] if found[1:] else found)


def _changed_settings(config: RunConfig) -> list[dict[str, Any]]:
    """Return settings that differ from the defaults: {"key", "value", "default"}.

    A required key has no default.
    """
    sources = {name: getattr(config.data, name) for name in ("source", "mixture")}
    chosen = {name: value for name, value in sources.items() if value}
    required = {"name": config.name, "data": chosen}
    defaults = flatten(parse_config(required).model_dump(mode="json")) | dict.fromkeys(
        flatten(required)
    )
    found = flatten(config.model_dump(mode="json"))
    keys = sorted({*found, *defaults}, key=[*found, *defaults].index)
    return [
        {"key": key, "value": found.get(key), "default": defaults.get(key)}
        for key in keys
        if found.get(key) != defaults.get(key)
    ]


def _read_plan_text(plan: Path | None) -> str | None:
    path = optional_file(plan, "plan.txt")
    return None if path is None else path.read_text(encoding="utf-8")


def _read_provenance(run: RunArtifacts) -> list[dict[str, Any]]:
    """Read provenance.json of every step that has one, in the order of the steps."""
    train = file_in(run.metrics, "metrics.jsonl").parent
    folders = (run.data, run.plan, train, run.merge, run.evaluation)
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
    environment.globals["verdicts"] = VERDICTS
    environment.filters |= {"shorten": _shorten, "as_json": json.dumps}
    # The policy has the hash of the script exactly as embedded, including line breaks.
    code = Markup(f"\n{page_script()}\n")
    template = environment.get_template("report.html.jinja")
    return template.render(context, script=code, policy=content_security_policy(code))


def _shorten(text: Any) -> str:
    text = str(text)
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]} [... {len(text) - _MAX_TEXT:,} more characters]"

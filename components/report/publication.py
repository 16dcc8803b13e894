"""Writes the report of a run, and the few figures that stand for it."""

from __future__ import annotations

import json
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.report import write_report
from canvastune.report.facts import training
from canvastune.statistics import verdict
from canvastune.tracking import StepRun, notes, read_metrics
from canvastune.tracking.promotion import score_of

# Of evaluation.json: what pipeline runs are compared by. The run of the step `evaluate` has everything.
_COMPARED = ("exact_match_before", "exact_match_after", "validation_loss_before", "validation_loss_after", "tokens_per_second_after")
_LAST_STEPS = 10  # the loss is noisy, since every step draws new corruption levels: its end is a mean


def publish(
    config: RunConfig, record: StepRun, run_folder: Path, *, metrics: Path, data: Path, plan: Path, evaluation: Path, tuned: Path
) -> dict[str, float]:
    """Write `report/` and `summary.json` into the run's folder, and both into MLflow; returns the summary.

    A retried step finds the whole report, or none.
    """
    out = run_folder / "report"
    merge = tuned if (tuned / "merge_proof.json").is_file() else None
    if not out.exists():
        write_report(config, out, metrics=metrics, data=data, plan=plan, evaluation=evaluation, merge=merge, compare=[])
    summary = summarize(metrics, evaluation)
    (run_folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    record.outputs(out)
    _tell(config, record, run_folder, metrics, data, evaluation, summary)
    return summary


def _tell(
    config: RunConfig, record: StepRun, run_folder: Path, metrics: Path, data: Path, evaluation: Path, summary: dict[str, float]
) -> None:
    """Give MLflow the figures by which runs and models are compared, the verdict, and the description."""
    found = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    facts = training(read_metrics(metrics), config)
    values = {
        **{f"train/loss_{end}": summary[f"train_loss_{end}"] for end in ("first", "last")},
        **{f"val/loss_{end}": summary[f"validation_loss_{end}"] for end in ("first", "last")},
        **{f"eval/{name}": found[name] for name in _COMPARED if name in found},
        "train/total_tokens": facts["tokens"],
        "train/total_seconds": facts["seconds"],
        "train/median_tokens_per_second": facts["tokens_per_second"],
        "train/peak_memory_bytes": facts["memory_bytes"],
    }
    record.summary(values, data)
    record.note("The report, as a page and as pictures.")
    record.verdict(score_of(found), verdict(found["gained"], found["lost"]), notes.reported(config, run_folder, values, found))


def summarize(metrics: Path, evaluation: Path) -> dict[str, float]:
    """Losses before and after from metrics.jsonl, and exact match before and after from an evaluation's folder, where there is one."""
    records = read_metrics(metrics)
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    validation = [record["loss"] for record in records if record["kind"] == "validation"]
    answers = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    summary = {
        "train_loss_first": losses[0],
        "train_loss_last": sum(losses[-_LAST_STEPS:]) / len(losses[-_LAST_STEPS:]),
        "validation_loss_first": validation[0],
        "validation_loss_last": validation[-1],
        "exact_match_before": answers["exact_match_before"],
        "exact_match_after": answers["exact_match_after"],
    }
    return {name: value for name, value in summary.items() if value is not None}  # no row has an answer that could be compared

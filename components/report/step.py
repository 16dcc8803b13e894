"""Writes the report of a run, and the few figures that stand for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.evaluation.scoring import compare
from canvastune.io.atomic import atomic_directory
from canvastune.report import RunArtifacts, write_report
from canvastune.report.summary import training
from canvastune.tracking import StepRun, descriptions, read_metrics
from canvastune.tracking.model_registry import score_of
from components.earlier_runs import find_run

# Of evaluation.json: what pipeline runs are compared by. The run of the step `evaluate` has everything.
_COMPARED = ("exact_match_before", "exact_match_after", "validation_loss_before", "validation_loss_after", "tokens_per_second_after")
_LAST_STEPS = 10  # the loss is noisy, since every step draws new corruption levels: its end is a mean


def publish(
    config: RunConfig,
    record: StepRun,
    run_folder: Path,
    *,
    metrics: Path,
    data: Path,
    plan: Path,
    evaluation: Path,
    tuned: Path,
    compare: Sequence[Path] = (),
) -> dict[str, float]:
    """Write `report/` and `summary.json` into the run's folder, and both into MLflow; returns the summary.

    A retried step finds the whole report, or none. What the report shows of data, plan and evaluation is kept beside it, so that it
    can be written again.

    Args:
        compare: folders of runs that are laid over.
    """
    out = run_folder / "report"
    for name, made in (("data", data), ("plan", plan), ("evaluation", evaluation)):
        _keep(made, run_folder / name)
    if not out.exists():
        merge = tuned if (tuned / "merge_proof.json").is_file() else None
        run = replace(find_run(run_folder), config=config, data=data, plan=plan, evaluation=evaluation, merge=merge)
        write_report(run, out, _still_there(compare))
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
    record.verdict(score_of(found), compare(found["gained"], found["lost"]), descriptions.reported(config, run_folder, values, found))


def _still_there(folders: Sequence[Path]) -> list[RunArtifacts]:
    """The runs to compare with. One that was deleted since the pipeline's first step looked costs a line, not the report."""
    found = []
    for folder in folders:
        try:
            found.append(find_run(folder))
        except UserError as error:
            print(f"WARNING not compared: {error}", flush=True)
    return found


def _keep(made: Path, out: Path) -> None:
    """Copy the files at the top of a step's output, but not, for example, the rows of the prepared data in its folders."""
    if not out.exists():
        with atomic_directory(out) as folder:
            for file in made.iterdir():
                if file.is_file():
                    shutil.copy(file, folder)


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

"""Write the report of a run and its main figures."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from canvastune.checkpoint.model_card import set_evaluation
from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.evaluation.result import EvaluationResult, read_answers
from canvastune.io.atomic import atomic_directory
from canvastune.report.build import build_report
from canvastune.report.summary import RunArtifacts, RunSummary, TrainingStats
from canvastune.tracking import StepRun, descriptions, read_metrics
from canvastune.tracking.descriptions import figures_table
from canvastune.tracking.model_registry import score_of
from components.earlier_runs import find_comparable
from components.run_artifacts import find_pages, find_run

logger = logging.getLogger(__name__)

# Keys of evaluation.json that runs are compared by, where known; the step `evaluate` logs all.
_COMPARED = (
    *("exact_match_before", "exact_match_after"),
    *("exact_match_normalized_before", "exact_match_normalized_after"),
    *("validation_loss_before", "validation_loss_after", "tokens_per_second_after"),
)

_SCORES = ("score_before", "score_after")  # of summary.json: where exact match does not say it


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
) -> RunSummary:
    """Write `report/` and `summary.json` into the run's folder, log both to MLflow.

    A retried step finds a complete report or none. What the report shows of data, plan and
    evaluation is copied into the run's folder, so that the report can be written again.

    Args:
        compare: folders of runs to overlay.
    """
    out = run_folder / "report"
    for name, made in (("data", data), ("plan", plan), ("evaluation", evaluation)):
        _copy_files(made, run_folder / name)
    if not out.exists():
        merge = tuned if (tuned / "merge_proof.json").is_file() else None
        run = replace(
            find_run(run_folder),
            config=config,
            data=data,
            plan=plan,
            evaluation=evaluation,
            merge=merge,
            pages=find_pages(config, run_folder),
        )
        build_report(run, out, _existing_runs(compare))
    records, result = read_metrics(metrics), EvaluationResult.read(evaluation)
    summary = RunSummary.from_records(records, result)
    summary.write(run_folder)
    record.outputs(out)
    record.file(out / "report.html", of="run/")
    values = _mlflow_metrics(summary, result, TrainingStats.from_records(records, config))
    _complete_cards(run_folder, tuned, values, result)
    record.summary(values, data)
    texts = config.tracking.log_texts
    page = "as a page and as images" if texts else "as images; its page is in the run folder only"
    record.note(f"The report, {page}.")
    description = descriptions.describe_report(config, run_folder, values, result)
    score = score_of(result, read_answers(evaluation))
    record.promotion(score, result.verdict, description)
    return summary


def push_model(config: RunConfig, record: StepRun, run_folder: Path, tuned: Path) -> None:
    """Push the tuned model to the Hub if the recipe names a repository; MLflow shows its address.

    Raises:
        UserError: as `push_to_hub`.
    """
    settings = config.tracking
    if settings.hub_model_id is None:
        return
    # Here, as it takes a second to import.
    from canvastune.checkpoint.hub_push import push_to_hub

    folder = tuned if settings.hub_content == "model" else run_folder / "train" / "adapter"
    url = push_to_hub(folder, settings.hub_model_id, private=settings.hub_private_repo)
    record.tags({"canvastune.hub_model": url}, of="run/")


def _complete_cards(
    run_folder: Path, tuned: Path, figures: Mapping[str, float], result: EvaluationResult
) -> None:
    """Add the evaluation to the model cards of the tuned model and of its adapter."""
    verdict, table = descriptions.describe_evaluation(result), figures_table(figures, result)
    of = "of the merged model " if (run_folder / "train" / "adapter").is_dir() else ""
    text = f"{verdict}\n\n{table}\n\nFigures {of}by the run `{run_folder.name}`."
    for folder in (tuned, run_folder / "train" / "adapter"):
        try:
            set_evaluation(folder, text)
        except OSError as error:  # the card without figures is right too
            logger.warning(f"{folder}: the model card lacks the evaluation ({error.strerror})")


def _mlflow_metrics(
    summary: RunSummary, result: EvaluationResult, stats: TrainingStats
) -> dict[str, float]:
    """Return the figures by which runs and models are compared in MLflow."""
    evaluated, figures = result.figures(), summary.figures()
    names = {
        "train/loss_first": "train_loss_first",
        "train/loss_last": "train_loss_last",
        "val/loss_first": "validation_loss_first",
        "val/loss_last": "validation_loss_last",
        "train/energy_kwh": "train_energy_kwh",
    }
    totals = {
        "train/total_tokens": stats.tokens,
        "train/total_seconds": stats.seconds,
        "train/median_tokens_per_second": stats.tokens_per_second,
        "train/peak_memory_bytes": stats.memory_bytes,
    }
    return {
        **{name: figures[key] for name, key in names.items() if key in figures},
        **{f"eval/{name}": evaluated[name] for name in _COMPARED if name in evaluated},
        **{f"eval/{name}": figures[name] for name in _SCORES if name in figures},
        **{name: value for name, value in totals.items() if value is not None},
    }


def _existing_runs(folders: Sequence[Path]) -> list[RunArtifacts]:
    """Return the runs to compare with, without those lost since the pipeline started."""
    found = []
    for folder in folders:
        try:
            found.append(find_comparable(folder))
        except UserError as error:
            logger.warning(f"not compared: {error}")
    return found


def _copy_files(made: Path, out: Path) -> None:
    """Copy a step's output files, but not its folders, such as the rows of the prepared data."""
    if not out.exists():
        with atomic_directory(out) as folder:
            for file in made.iterdir():
                if file.is_file():
                    shutil.copy(file, folder)

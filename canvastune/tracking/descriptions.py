"""Descriptions in Markdown for MLflow's pages: of a pipeline run and of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.evaluation.result import EvaluationResult, ModelFigures
from canvastune.tracking.evaluation_traces import ROWS

NOTE = "mlflow.note.content"  # the tag that MLflow's page shows as a run's description
STEP_NOTES = {
    "prepare_data": "Rows to tokens: the train and validation split, with a data card.",
    "plan": "What the run needs of its hardware: memory by part, FLOPs, time, communication.",
    "train": "Losses of every step, validation loss by corruption level, and what the machine did.",
    "merge_lora": "The adapter merged into the base, shard by shard, with a proof.",
    "evaluate": "Held-out rows answered by the base and by the tuned model.",
    "evaluate_base": "Answers of the base, to compare with those of the run `evaluate`.",
    "report": "One page with the curves, the answers and the figures.",
}
_AGAIN = """**Again**

`config.yaml`, a file of this run, is the whole recipe:

```sh
canvastune run config.yaml      # on this machine
canvastune submit config.yaml   # on Kubeflow
```"""


def describe_start(config: RunConfig, folder: Path) -> str:
    """Describe what a pipeline run is about to do."""
    curves = "While it trains, the curves are in the nested run `train`."
    return "\n\n".join((_what(config), _table(_about(config, folder)), curves, _AGAIN))


def describe_report(
    config: RunConfig, folder: Path, figures: Mapping[str, float], evaluation: EvaluationResult
) -> str:
    """Describe what a pipeline run did: verdict, figures, where its files are, how to repeat it.

    Args:
        figures: the run's summary, by MLflow's names.
    """
    table = figures_table(figures, evaluation)
    places = {"model": "train/model"}
    if config.train.method == "lora":
        places = {"adapter": "train/adapter", "merged model": "model"}
    report = f"{_code(folder / 'report/report.html')}, also `report.html` of the run in MLflow"
    where = {"report": report} | {name: _code(folder / path) for name, path in places.items()}
    where |= {"checkpoints": _code(folder / "train/checkpoints")}
    files = _table(_about(config, folder) | where)
    verdict = describe_evaluation(evaluation)
    return "\n\n".join((verdict, _what(config), table, "**Where**", files, _AGAIN))


def figures_table(figures: Mapping[str, float], evaluation: EvaluationResult) -> str:
    """Return a table of the figures before and after training; of losses, those that are known.

    Args:
        figures: as for `describe_report`.
    """
    rows: list[tuple[str, ...]] = [("", "before", "after"), ("---", "---:", "---:")]
    if evaluation.scored:
        sides = (evaluation.before, evaluation.after)
        label = f"{evaluation.measure} on {evaluation.scored} held-out rows (95% interval)"
        rows.append((label, *(_with_interval(model, "score") for model in sides)))
        if evaluation.after.exact_match is not None:
            label, name = "exact match, normalized (95% interval)", "exact_match_normalized"
            rows.append((label, *(_with_interval(model, name) for model in sides)))
        rows += [
            (
                f"{each.by}: {_code(each.name)}, {each.scored} rows",
                *(
                    f"{score:.1%}"
                    for score in (each.score_before, each.score_after)
                    if score is not None
                ),
            )
            for each in evaluation.all_slices
            if each.scored
        ]
    # Of the exported weights; training's own curve ends with the last step's.
    losses = ("eval/validation_loss_before", "eval/validation_loss_after")
    if losses[0] not in figures:
        losses = ("val/loss_first", "val/loss_last")
    training = ("training loss, first and last", "train/loss_first", "train/loss_last")
    for label, before, after in (("validation loss", *losses), training):
        if before in figures and after in figures:
            rows.append((label, f"{figures[before]:.3f}", f"{figures[after]:.3f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe_evaluation(evaluation: EvaluationResult) -> str:
    """Summarize the evaluation in a sentence."""
    before, after = evaluation.before.score, evaluation.after.score
    if evaluation.verdict is None or before is None or after is None:
        return f"**Not judged by {evaluation.measure}**: {evaluation.unscored_reason}."
    verdicts = {"better": "Better", "worse": "Worse", "undecided": "No clear difference"}
    verdict = verdicts[evaluation.verdict]
    change = f"{evaluation.gained} gained, {evaluation.lost} lost of {evaluation.scored} rows"
    return f"**{verdict}**: {evaluation.measure} {before:.1%} before, {after:.1%} after ({change})."


def describe_traces(rows: int) -> str:
    """Say where MLflow shows the answers to so many rows."""
    which = f"each of the {rows} rows" if rows <= ROWS else f"the first {ROWS} of {rows} rows"
    return (
        f"The tuned model's answers to {which} are traces of this run, with expectation and score; "
        "the base's are those of the run `evaluate_base`. `answers.json` has all rows."
    )


def _with_interval(model: ModelFigures, name: str) -> str:
    share, low, high = (getattr(model, f"{name}{end}") for end in ("", "_low", "_high"))
    return "not recorded" if share is None else f"{share:.1%} ({low:.1%} to {high:.1%})"


def _what(config: RunConfig) -> str:
    train = config.train
    method = f"LoRA of rank {config.lora.rank}" if train.method == "lora" else "Full fine-tuning"
    length = f"{train.steps} steps of {train.global_batch_size} examples"
    return f"{method} of {_code(config.model.id)} on {_code(config.data.label)}, {length}."


def _about(config: RunConfig, folder: Path) -> dict[str, str]:
    cluster = config.cluster
    local = cluster.backend == "local"
    where = "this machine" if local else f"{cluster.backend}, {cluster.nodes} nodes"
    return {
        "recipe": _code(config.name),
        "ranks": f"{config.world_size} (expert parallel {config.parallel.ep}), {where}",
        "run folder": _code(folder),
    }


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _code(value: object) -> str:
    """Return a person's text, which may hold Markdown, as code for a table's cell."""
    text = str(value)
    quoted = repr(text) if "`" in text else f"`{' '.join(text.split())}`"
    return quoted.replace("|", "\\|")

"""Descriptions in Markdown for MLflow's pages: of a pipeline run and of its steps."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.evaluation.result import VERDICTS, EvaluationResult, ModelFigures
from canvastune.io.markdown import code, table
from canvastune.tracking.evaluation_traces import ROWS
from canvastune.tracking.steps import FAILED, FINISHED, KILLED, RUNNING, Attempt

NOTE = "mlflow.note.content"  # the tag that MLflow's page shows as a run's description
STEP_NOTES = {
    "prepare_data": "Rows to tokens: the train and validation split, with a data card.",
    "plan": "What the run needs of its hardware: memory by part, FLOPs, time, communication.",
    "train": "Losses of every step, validation loss by corruption level, and system metrics.",
    "merge_lora": "The adapter, merged into the base shard by shard and verified.",
    "evaluate": "Held-out rows answered by the base and by the tuned model.",
    "evaluate_base": "The base in the same evaluation, to compare with the run `evaluate`.",
    "report": "One page with the curves, the answers and the figures.",
}
FAILURE_TAGS = ("canvastune.failed_step", "canvastune.error")  # of a run whose last attempt failed
_STATES = {RUNNING: "running", FINISHED: "finished", FAILED: "failed", KILLED: "interrupted"}
_SHOWN_ATTEMPTS = 20  # the newest, each a tag
_LONGEST_REASON = 1000  # characters in a description
_AGAIN = """**Repeat the run**

`config.yaml`, an artifact of this run, is the complete recipe:

```sh
canvastune run config.yaml      # on this machine
canvastune submit config.yaml   # on Kubeflow
```"""


def describe_attempt(config: RunConfig, folder: Path, attempts: Sequence[Attempt]) -> str:
    """Describe what a pipeline run is about to do, or where and why its last attempt ended."""
    last = attempts[-1]
    state = "While it trains, the curves are in the nested run `train`."
    if last.status in (FAILED, KILLED):
        state = _describe_end(last)
    parts = [_what(config), table(_about(config, folder).items()), state]
    if last.status != RUNNING:
        parts.insert(0, parts.pop())
    if len(attempts) > 1:
        rows = {str(number): each for number, each in number_attempts(attempts).items()}
        parts += ["**Attempts**", table(rows.items())]
    return "\n\n".join((*parts, _AGAIN))


def attempt_tags(attempts: Sequence[Attempt]) -> dict[str, str]:
    """Return tags that say how each attempt at a run went, and where and why the last one failed."""
    last = attempts[-1]
    tags = {"canvastune.state": _STATES[last.status], "canvastune.attempts": str(len(attempts))}
    for number, text in number_attempts(attempts).items():
        tags[f"canvastune.attempt_{number}"] = text
    if last.status == FAILED:
        found = (last.step or "unknown", last.reason or "unknown")
        tags |= dict(zip(FAILURE_TAGS, found, strict=True))
    return tags


def number_attempts(attempts: Sequence[Attempt]) -> dict[int, str]:
    """Describe the newest attempts at a run in a line each, by number from 1."""
    lines = {number: str(_line(attempt)) for number, attempt in enumerate(attempts, 1)}
    return dict(list(lines.items())[-_SHOWN_ATTEMPTS:])


def _line(attempt: Attempt) -> str:
    start = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(attempt.started))
    where = f", process {attempt.process} on {attempt.host}" if attempt.host else ""
    took = "" if attempt.ended is None else f" after {_duration(attempt.ended - attempt.started)}"
    step = f" in {attempt.step}" if attempt.step else ""
    reason = f": {attempt.reason.splitlines()[0][:300]}" if attempt.reason else ""
    return f"{start}{where}: {_STATES[attempt.status]}{step}{took}{reason}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _describe_end(attempt: Attempt) -> str:
    """Say in which step an attempt failed or was interrupted, why, and how to resume the run."""
    word = _STATES[attempt.status].capitalize()
    step = f" in `{attempt.step}`" if attempt.step else ""
    reason = attempt.reason[:_LONGEST_REASON] or "no reason is known"
    text = f"**{word}{step}**\n\n```text\n{reason.replace('```', '')}\n```"
    if not attempt.command:
        return text + "\n\nTo resume it, submit the same recipe with the name of this run."
    command = f"cd {shlex.quote(attempt.directory)}\n{attempt.command}"
    return f"{text}\n\nTo resume it:\n\n```sh\n{command}\n```"


def describe_report(
    config: RunConfig, folder: Path, figures: Mapping[str, float], evaluation: EvaluationResult
) -> str:
    """Describe what a pipeline run did: verdict, figures, where its files are, how to repeat it.

    Args:
        figures: the run's summary, by MLflow's names.
    """
    compared = figures_table(figures, evaluation)
    places = {"model": "train/model"}
    if config.train.method == "lora":
        places = {"adapter": "train/adapter", "merged model": "model"}
    report = code(folder / "report/report.html")
    if config.tracking.log_texts:
        report += ", also `report.html` of the run in MLflow"
    where = {"report": report} | {name: code(folder / path) for name, path in places.items()}
    where |= {"checkpoints": code(folder / "train/checkpoints")}
    files = table((_about(config, folder) | where).items())
    verdict = describe_evaluation(evaluation)
    return "\n\n".join((verdict, _what(config), compared, "**Where**", files, _AGAIN))


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
                f"{each.by}: {code(each.name)}, {each.scored} rows",
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
    verdict = VERDICTS[evaluation.verdict].capitalize()
    change = f"{evaluation.gained} gained, {evaluation.lost} lost of {evaluation.scored} rows"
    return f"**{verdict}**: {evaluation.measure} {before:.1%} before, {after:.1%} after ({change})."


def describe_traces(rows: int, texts: bool = True) -> str:
    """Say where MLflow shows the answers to so many rows.

    Args:
        texts: `tracking.log_texts`.
    """
    if not texts:
        return "The answers are in the run folder only: `tracking.log_texts` is false."
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
    return f"{method} of {code(config.model.id)} on {code(config.data.label)}, {length}."


def _about(config: RunConfig, folder: Path) -> dict[str, str]:
    cluster = config.cluster
    local = cluster.backend == "local"
    where = "this machine" if local else f"{cluster.backend}, {cluster.nodes} nodes"
    return {
        "recipe": code(config.name),
        "ranks": f"{config.world_size} (expert parallel {config.parallel.ep}), {where}",
        "run folder": code(folder),
    }

"""What to do with a run next: one action, as a sentence and a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig
from canvastune.evaluation.result import EvaluationResult, Slice

_MANY_CUT = 0.1  # share of answers cut at the limit of tokens, above which it decides the score
_JUDGED = {"tool_call": "calls to tools", "chrf": "text", "json": "JSON", "number": "numbers"}
_SEEDS = 4  # answers to each row, as more rows are wanted and there are none


@dataclass(frozen=True)
class Action:
    """What to do, why, and the command that does it ("" if there is none)."""

    text: str
    command: str = ""


def ask_command(folder: Path | str, program: str = "canvastune") -> str:
    """Return the command that asks the tuned model of a run a question."""
    return f'{_quote(program)} ask {_quote(folder)} "your question"'


def next_action(
    config: RunConfig,
    evaluation: EvaluationResult | None,
    *,
    merge: Mapping[str, Any] | None,
    card: Mapping[str, Any],
    folder: Path,
    model: Path,
) -> Action:
    """Return the first of the actions that a run's results ask for.

    Args:
        merge: the proof of the merge, if there was one.
        card: the data card; {} if there is none.
        folder: the run's.
        model: the tuned model's folder.
    """
    if merge is not None and not merge.get("passed", False):
        command = f"canvastune merge {_quote(folder / 'train/adapter')} --output merged"
        text = "Do not use the merged model, whose verification failed. Merge it again."
        return Action(text, command)
    if evaluation is None:
        return Action("Finish the run: without an evaluation, it is unknown what training changed.")
    again, serve = f"canvastune evaluate {_quote(folder)}", f"canvastune serve {_quote(model)}"
    held_out = card.get("validation", 0)
    return next(_actions(config, evaluation, held_out, again, serve))


def _actions(
    config: RunConfig, evaluation: EvaluationResult, held_out: int, again: str, serve: str
) -> Iterator[Action]:
    answers, cut = evaluation.rows * evaluation.repeats, evaluation.after.cut or 0
    if cut > _MANY_CUT * answers:
        yield Action(
            f"Allow longer answers first: {cut} of {answers} were cut.",
            f"{again} --set evaluate.max_new_tokens={2 * evaluation.max_new_tokens}",
        )
    if not evaluation.scored and evaluation.judges and "chrf" not in evaluation.judges:
        text = "Choose a judge that fits the references, such as chrF for text."
        yield Action(text, f"{again} --set evaluate.judge=chrf")
    if not evaluation.scored:
        yield Action("Read the answers below. If they are good, use the model.", serve)
    if evaluation.verdict == "worse":
        yield Action(
            "Do not use this model. Read the answers that were lost, below; then train with a lower "
            f"optimizer.lr (now {config.optimizer.lr:g}) or fewer steps (now {config.train.steps:,})."
        )
    other = evaluation.forgetting
    if other is not None and other.verdict == "worse":
        text = f"Decide whether the lower score on {other.name} matters. If not, use the model."
        yield Action(text, serve)
    weak = _weak_slices(evaluation)
    if evaluation.verdict == "better" and weak:
        each = ", ".join(f"{_part(part)} ({part.score_after or 0:.1%})" for part in weak)
        text = (
            f"Use the model, but not for {each} yet: read those answers below, and add such rows."
        )
        yield Action(text, serve)
    if evaluation.verdict == "better":
        yield Action("Use the model.", serve)
    unclear = "The rows do not show whether the model is better."
    if held_out > evaluation.rows:
        text = f"{unclear} Ask all {held_out:,} held-out rows, not {evaluation.rows:,}."
        yield Action(text, f"{again} --set evaluate.rows={held_out}")
    if evaluation.repeats < _SEEDS:
        text = f"{unclear} Every held-out row was asked: answer each with several seeds."
        yield Action(text, f"{again} --set evaluate.repeats={_SEEDS}")
    yield Action(
        f"{unclear} Hold out more rows (data.validation_rows), or train for more steps (now "
        f"{config.train.steps:,})."
    )


def _weak_slices(evaluation: EvaluationResult) -> list[Slice]:
    """Return the parts of the rows for which the tuned model became worse, or whose score is clearly
    lower than that of all rows: the two 95% intervals do not meet. Parts with the same figures, such
    as calls to a tool and answers of their length, are named once.
    """
    overall = evaluation.after.score_low or 0.0
    weak = [
        part
        for part in evaluation.slices
        if part.verdict == "worse"
        or (part.score_after_high is not None and part.score_after_high < overall)
    ]
    once = {(part.rows, part.score_before, part.score_after): part for part in reversed(weak)}
    return list(reversed(once.values()))


def _part(part: Slice) -> str:
    if part.by == "judge":
        return _JUDGED.get(part.name, f"rows judged by {part.name}")
    return f"answers of {part.name}" if part.by == "length" else part.name


def _quote(path: Path | str) -> str:
    return shlex.quote(str(path))

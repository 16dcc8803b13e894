"""Judge the answers of a finished run again, with other judges and without a model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig
from canvastune.config.strict import flatten
from canvastune.errors import UserError
from canvastune.evaluation.figures import (
    JudgedRow,
    compared,
    forgetting_figures,
    judge_rows,
    measure,
    side_scores,
    slices,
    write_answers,
)
from canvastune.evaluation.judges import Judging
from canvastune.evaluation.result import (
    ANSWERS,
    FILE_NAME,
    FORGETTING_ANSWERS,
    SIDES,
    EvaluationResult,
)
from canvastune.io.atomic import atomic_directory
from canvastune.io.json_text import read_json_lines
from canvastune.io.provenance import write_provenance

_SECTION = "evaluate."
_OF_JUDGES = ("evaluate.answer_pattern", "evaluate.judge", "evaluate.judges.", "evaluate.slices")
_OF_NOTHING = ("evaluate.batch_size",)  # answers do not depend on it


def changes_answers(old: RunConfig, new: RunConfig) -> bool:
    """Return whether the models have to answer again, or other judges are all that changed.

    Raises:
        UserError: a setting that a finished run cannot change.
    """
    before, after = (flatten(config.model_dump(mode="json")) for config in (old, new))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if other := [key for key in changed if not key.startswith(_SECTION)]:
        raise UserError(
            f"{other[0]}: found a value that differs from the run's, expected only changes of evaluate.*",
            hint="Train another run with it, using `canvastune run`.",
        )
    return any(not key.startswith((*_OF_JUDGES, *_OF_NOTHING)) for key in changed)


def judge_again(
    config: RunConfig,
    evaluation: Path,
    out: Path,
    canvas: int,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    kept: Path | None = None,
) -> EvaluationResult:
    """Write a copy of an evaluation, with its answers judged as the recipe now says.

    Args:
        evaluation: the folder of evaluation.json and answers.jsonl.
        canvas: tokens of the model's canvas, for the figures by answer length.
        columns: values of `evaluate.slices` by row; None: those that the rows have.
        kept: folder where the scores of a judging model are kept.

    Raises:
        UserError: no such files, a judge that cannot be loaded, an `out` that is not empty.
    """
    found = EvaluationResult.read(evaluation)
    rows = _read_rows(evaluation / ANSWERS, config)
    if columns is not None:
        rows = [_with_columns(row, columns.get(row["id"], {})) for row in rows]
    judging = Judging(config.evaluate, [(row["source"], row["reference"]) for row in rows], kept)
    judged = judge_rows(judging, rows)
    result = with_scores(found, config, judging, judged, canvas)
    others: list[dict[str, Any]] = []
    if found.forgetting is not None:
        others = _read_rows(evaluation / FORGETTING_ANSWERS, config)
    references = [(row["source"], row["reference"]) for row in others]
    other_judged = judge_rows(Judging(config.evaluate, references, kept), others)
    result = replace(result, forgetting=forgetting_figures(config.evaluate, other_judged))
    with atomic_directory(out) as folder:
        result.write(folder)
        write_answers(folder / ANSWERS, rows, judged)
        if others:
            write_answers(folder / FORGETTING_ANSWERS, others, other_judged)
        if (evaluation / "film.json").is_file():
            shutil.copy(evaluation / "film.json", folder)
        inputs = {name: evaluation / name for name in (FILE_NAME, ANSWERS)}
        write_provenance(folder, "evaluate", config, inputs)
    return result


def with_scores(
    result: EvaluationResult,
    config: RunConfig,
    judging: Judging,
    judged: Sequence[JudgedRow],
    canvas: int,
) -> EvaluationResult:
    """Return a result with its scores replaced by those of these rows."""
    changed = replace(
        result,
        scored=sum(row.scored for row in judged),
        before=replace(result.before, **side_scores(judged, "before")),
        after=replace(result.after, **side_scores(judged, "after")),
        **compared(judged),
        answer_pattern=config.evaluate.answer_pattern,
        measure=measure(judged),
        judges=tuple(judging.names),
        slices=slices(judged, canvas),
    )
    return EvaluationResult.from_json(changed.to_json())  # as it is read: finite numbers


def _with_columns(row: dict[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name != "columns"}
    return {**rest, "columns": dict(values)} if values else rest


def _read_rows(file: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Read what each line has before it is judged.

    Raises:
        UserError: the file cannot be read, or does not say which source a row is from.
    """
    about = ("id", "source", "origin", "columns", "prompt", "reference", "reference_tokens")
    kept = (*about, *SIDES, "repeats")
    hint = "Use the folder of a run whose evaluation has finished."
    try:
        lines = read_json_lines(file)
        rows = [{name: line[name] for name in kept if name in line} for line in lines]
        for row in rows:
            row.setdefault("source", config.data.source)  # an earlier version did not write it
            row["prompt"], row["reference"], row["before"], row["after"]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read: {error}", hint=hint) from None
    except KeyError as error:
        raise UserError(f"{file}: found a row without {error}", hint=hint) from None
    if config.evaluate.judges and any(row["source"] is None for row in rows):
        raise UserError(
            f"{file}: does not record the source of each row, which evaluate.judges needs",
            hint="It was written by an earlier version. Set evaluate.rows too, so that the rows are "
            "answered again.",
        )
    return rows

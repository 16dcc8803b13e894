"""Compare a run with others: row by row where both answered the same rows, and over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.scoring import count_changes, paired_test
from canvastune.report.summary import RunArtifacts, differing_settings, file_in, read_json

_HASH = 16  # characters that are shown
_AFTER = ("score_after", "correct_after")  # the second one in results of earlier versions


@dataclass(frozen=True)
class PairedRows:
    """This run's tuned model against another run's, on the rows that both scored alike."""

    rows: int
    gained: int  # on which this run scores higher
    lost: int
    p_value: float
    verdict: str  # "better", "worse" or "undecided"


@dataclass(frozen=True)
class SeedSpread:
    """A score over runs that differ in their seed only."""

    runs: int
    mean: float
    low: float
    high: float


def pair_rows(
    own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]
) -> PairedRows | None:
    """Compare two runs' answers with the paired test; None without a row that both scored alike.

    Rows are the same if id, reference and judge are.
    """
    scores = {_row_key(row): score for row in other if (score := _score(row)) is not None}
    differences = [
        score - scores[key]
        for row in own
        if (score := _score(row)) is not None and (key := _row_key(row)) in scores
    ]
    if not differences:
        return None
    gained, lost = count_changes(differences)
    return PairedRows(len(differences), gained, lost, *paired_test(differences))


def seed_spread(
    runs: Sequence[RunArtifacts], evaluations: Sequence[EvaluationResult | None]
) -> SeedSpread | None:
    """Return the spread over the runs that differ from the first in nothing but the seed, one for
    each seed; None if there are fewer than two, or if they were judged by other measures.
    """
    found: dict[int, EvaluationResult] = {}
    for run, evaluation in zip(runs, evaluations, strict=True):
        alike = {row["key"] for row in differing_settings([runs[0], run])} <= {"seed"}
        if alike and evaluation and evaluation.scored:
            found.setdefault(run.config.seed, evaluation)
    scored = list(found.values())
    scores = [each.after.score for each in scored if each.after.score is not None]
    if len(scores) < 2 or len({each.measure for each in scored}) > 1:
        return None
    return SeedSpread(len(scores), mean(scores), min(scores), max(scores))


def other_answers(
    row: Mapping[str, Any], others: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, str]]:
    """Return what the tuned models of other runs wrote for a row of this run, with the runs' names.

    Left out are runs that did not answer it, and those that wrote the same.

    Args:
        row: an answer of this run.
        others: the answers of each other run by their row's id, by the run's name.
    """
    written = ((name, answers.get(row["id"], row["after"])) for name, answers in others.items())
    return [(name, answer) for name, answer in written if answer != row["after"]]


def differing_inputs(runs: Sequence[RunArtifacts]) -> list[dict[str, Any]]:
    """Return what was trained on or from where its content differs between runs, whatever its name:
    {"key", "values"} as of settings, with the start of each SHA-256; None where it is not known.
    """
    found = [_inputs(run) for run in runs]
    rows = []
    for key in ("data", "base"):
        values = [str(each[key])[:_HASH] if key in each else None for each in found]
        if len({value for value in values if value is not None}) > 1:
            rows.append({"key": f"{key}, SHA-256", "values": values})
    return rows


def _inputs(run: RunArtifacts) -> dict[str, Any]:
    file = file_in(run.metrics, "metrics.jsonl").parent / "provenance.json"
    return dict(read_json(file).get("inputs", {})) if file.is_file() else {}


def _score(row: Mapping[str, Any]) -> float | None:
    return next((float(row[name]) for name in _AFTER if row.get(name) is not None), None)


def _row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["id"], row["reference"], row.get("judge")

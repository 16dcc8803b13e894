"""Compare a run with others: row by row where both answered the same rows, and over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.scoring import count_changes, paired_test
from canvastune.report.summary import RunArtifacts, differing_settings

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
    """Return the spread over the runs that differ from the first in nothing but the seed; None if
    there is none, or if they were judged by other measures.
    """
    found = [
        evaluation
        for run, evaluation in zip(runs, evaluations, strict=True)
        if {row["key"] for row in differing_settings([runs[0], run])} <= {"seed"}
    ]
    scored = [each for each in found if each and each.scored]
    scores = [each.after.score for each in scored if each.after.score is not None]
    if len(scores) < 2 or len({each.measure for each in scored}) > 1:
        return None
    return SeedSpread(len(scores), mean(scores), min(scores), max(scores))


def _score(row: Mapping[str, Any]) -> float | None:
    return next((float(row[name]) for name in _AFTER if row.get(name) is not None), None)


def _row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["id"], row["reference"], row.get("judge")

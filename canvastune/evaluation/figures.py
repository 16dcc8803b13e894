"""From the texts of both models to figures: every answer judged, both models compared row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config.schema import EvaluateConfig
from canvastune.data.row_columns import NO_VALUE
from canvastune.evaluation.judges import Judge, Judging, Score
from canvastune.evaluation.result import SIDES, EvaluationResult, Slice
from canvastune.evaluation.scoring import (
    answer_part,
    count_changes,
    mean_interval,
    paired_test,
    share_interval,
)
from canvastune.io.json_text import to_json_text

_MOST_VALUES = 20  # of a column that have their own figures


@dataclass(frozen=True)
class JudgedRow:
    """What the judge says of all answers to one row."""

    source: str | None
    columns: Mapping[str, str]  # values by which figures are split
    reference_tokens: int
    judge: str | None  # None: no judge can judge by the reference
    scores: Mapping[str, tuple[Score, ...]]  # by side, of every repeat; of no repeat: not scored

    @property
    def scored(self) -> bool:
        """Whether the row counts."""
        return bool(self.scores[SIDES[0]])

    @property
    def exact(self) -> bool:
        """Whether every answer is right or wrong, with nothing between."""
        return all(score.exact for side in SIDES for score in self.scores[side])

    def mean(self, side: str) -> float:
        """Return the mean score of a side's answers."""
        return _mean([score.value for score in self.scores[side]])

    def normalized(self, side: str) -> float:
        """Return the share of a side's answers that are right without typography."""
        return _mean([float(bool(score.normalized)) for score in self.scores[side]])


def judge_rows(judging: Judging, rows: Sequence[Mapping[str, Any]]) -> list[JudgedRow]:
    """Judge all rows, as `judge_row`; slow judges see all answers at once before."""
    waiting: dict[str, tuple[Judge, list[tuple[str, Any, str]]]] = {}
    for row in rows:
        found = judging.find(row.get("source"), row["reference"])
        if found is None or found[0].prepare is None:
            continue
        judge, expected = found
        _, asked = waiting.setdefault(judge.name, (judge, []))
        asked += [
            (answer_part(answers[side]), expected, row["prompt"])
            for answers in (row, *row.get("repeats", ()))
            for side in SIDES
        ]
    for judge, asked in waiting.values():
        assert judge.prepare is not None
        judge.prepare(asked)
    return [judge_row(judging, row) for row in rows]


def judge_row(judging: Judging, row: Mapping[str, Any]) -> JudgedRow:
    """Judge all answers of a line of answers.jsonl: those shown, and those of further repeats.

    A row counts if its judge scores all of them.
    """
    nothing: dict[str, tuple[Score, ...]] = {side: () for side in SIDES}
    about = (row.get("source"), row.get("columns", {}), int(row.get("reference_tokens") or 0))
    found = judging.find(row.get("source"), row["reference"])
    if found is None:
        return JudgedRow(*about, None, nothing)
    judge, expected = found
    scores: dict[str, tuple[Score, ...]] = {}
    for side in SIDES:
        texts = [answers[side] for answers in (row, *row.get("repeats", ()))]
        each = [judge.compare(answer_part(text), expected, row["prompt"]) for text in texts]
        kept = tuple(score for score in each if score is not None)
        if len(kept) < len(texts):
            return JudgedRow(*about, judge.name, nothing)
        scores[side] = kept
    return JudgedRow(*about, judge.name, scores)


def with_judgement(row: Mapping[str, Any], judged: JudgedRow) -> dict[str, Any]:
    """Return a line of answers.jsonl with what the judge says of it.

    `correct_*` are those of the answers shown, `score_*` the means of all repeats; null where the
    row is not scored, and `correct_*` where an answer is not simply right or wrong.
    """
    found: dict[str, Any] = dict(row)
    shown = {side: judged.scores[side][0] if judged.scored else None for side in SIDES}
    found |= {
        f"correct_{side}": bool(score.value) if score and score.exact else None
        for side, score in shown.items()
    }
    found |= {
        f"correct_normalized_{side}": score.normalized if score else None
        for side, score in shown.items()
    }
    found["judge"] = judged.judge
    return found | {f"score_{side}": judged.mean(side) if judged.scored else None for side in SIDES}


def side_scores(rows: Sequence[JudgedRow], side: str) -> dict[str, Any]:
    """Return the fields of ModelFigures that judge one model."""
    scored = [row for row in rows if row.scored]
    exact = scored if all(row.exact for row in scored) else []
    score, low, high = _score(scored, side)
    by_seed = zip(*(row.scores[side] for row in scored), strict=True)
    return {
        **_exact_match(exact, side, "", lambda row: row.mean(side)),
        **_exact_match(exact, side, "_normalized", lambda row: row.normalized(side)),
        "score": score,
        "score_low": low,
        "score_high": high,
        "score_by_seed": tuple(_mean([each.value for each in scores]) for scores in by_seed),
    }


def compared(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return the fields of EvaluationResult that compare the models row by row."""
    names = ("gained", "lost", "p_value", "verdict", "gained_normalized", "lost_normalized")
    scored = [row for row in rows if row.scored]
    if not scored:
        return dict.fromkeys(names)
    before, after = SIDES
    strict = [row.mean(after) - row.mean(before) for row in scored]
    found = (*count_changes(strict), *paired_test(strict))
    exact = all(row.exact for row in scored)
    normalized = [row.normalized(after) - row.normalized(before) for row in scored]
    return dict(
        zip(names, (*found, *(count_changes(normalized) if exact else (None, None))), strict=True)
    )


def measure(rows: Sequence[JudgedRow]) -> str:
    """Return what the scores are called: "exact match", "chrF", or "score" of several judges."""
    scored = [row for row in rows if row.scored]
    if all(row.exact for row in scored):
        return "exact match"
    return "chrF" if {row.judge for row in scored} == {"chrf"} else "score"


def slices(rows: Sequence[JudgedRow], canvas: int) -> tuple[Slice, ...]:
    """Return the figures of each judge's rows, each source, each value of a column and each answer
    length, where there are several.

    Lengths are the references', in bins of 1, 2, 3 to 4, 5 to 8, ... canvases. Of a column's values,
    the most frequent have their own figures, and the others have common ones.
    """
    sources = [row.source or "" for row in rows]
    bins = [max(0, -(-row.reference_tokens // canvas) - 1).bit_length() for row in rows]
    lengths = {
        number: f"{(canvas << number - 1) + 1 if number else 1} to {canvas << number} tokens"
        for number in sorted(set(bins))
    }
    judges = [row.judge if row.scored else None for row in rows]
    found: list[tuple[str, str, list[bool]]] = []
    for by, places in (("judge", judges), ("source", sources)):
        if len(several := [name for name in dict.fromkeys(places) if name is not None]) > 1:
            found += [(by, name, [name == each for each in places]) for name in several]
    for column in dict.fromkeys(name for row in rows for name in row.columns):
        values = _frequent([row.columns.get(column, NO_VALUE) for row in rows])
        if len(names := dict.fromkeys(values)) > 1:
            found += [
                ("column", f"{column}={name}", [name == each for each in values])
                for name in sorted(names)
            ]
    if len(lengths) > 1:
        found += [("length", lengths[n], [n == each for each in bins]) for n in lengths]
    return tuple(
        _slice(by, name, [row for row, inside in zip(rows, chosen, strict=True) if inside])
        for by, name, chosen in found
    )


def _frequent(values: Sequence[str]) -> list[str]:
    """Return each row's value, or one name for all that are beyond the most frequent ones."""
    counts = Counter(values)
    kept = {value for value, _ in counts.most_common(_MOST_VALUES)}
    others = f"{len(counts) - len(kept)} other values"
    return [value if value in kept else others for value in values]


def describe_slices(result: EvaluationResult) -> list[str]:
    """Return a line for each part of the rows, for the log."""
    lines = []
    for each in result.all_slices:
        if not each.scored:
            lines.append(f"{each.by} {each.name}: {each.rows} rows, none scored")
            continue
        lines.append(
            f"{each.by} {each.name}: {each.score_before:.1%} before, {each.score_after:.1%} after, "
            f"{each.scored} rows ({', '.join(each.judges)}); {each.gained} gained, "
            f"{each.lost} lost, p = {each.p_value:.2g}"
        )
    return lines


def summarize(result: EvaluationResult) -> str:
    """Return the whole evaluation in a line, for the log."""
    before, after = (
        "not finite" if model.validation_loss is None else f"{model.validation_loss:.3f}"
        for model in (result.before, result.after)
    )
    losses = f"validation loss {before} before, {after} after"
    if not result.scored:
        return f"{losses}; no row is scored: {result.unscored_reason}"
    sides = (("before", result.before), ("after", result.after))
    shares = [
        f"{model.score:.1%} [{model.score_low:.1%}, {model.score_high:.1%}] {side}"
        for side, model in sides
    ]
    change = (
        f"{result.gained} gained, {result.lost} lost, p = {result.p_value:.2g}: {result.verdict}"
    )
    rows = (
        f"{result.scored} rows"
        if result.repeats == 1
        else (f"{result.scored} rows x {result.repeats} seeds")
    )
    if unscored := result.rows - result.scored:
        rows += f", {unscored} not scored"
    parts = [f"{result.measure} {', '.join(shares)}, {rows}", change]
    if result.before.exact_match_normalized is not None:
        normalized = [f"{model.exact_match_normalized:.1%} {side}" for side, model in sides]
        parts.append(f"normalized {', '.join(normalized)}")
    return "; ".join([*parts, losses])


def forgetting_figures(settings: EvaluateConfig, rows: Sequence[JudgedRow]) -> Slice | None:
    """Return the figures of the rows of `evaluate.forgetting`; None without them."""
    name = settings.forgetting.source
    return _slice("forgetting", name, rows) if name is not None and rows else None


def write_answers(
    file: Path, rows: Sequence[Mapping[str, Any]], judged: Sequence[JudgedRow]
) -> None:
    """Write a line for each row: what was asked and answered, and what the judge says of it."""
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(
            to_json_text(with_judgement(row, each), ensure_ascii=False)
            for row, each in zip(rows, judged, strict=True)
        )


def _slice(by: str, name: str, rows: Sequence[JudgedRow]) -> Slice:
    scored = [row for row in rows if row.scored]
    comparison = compared(rows)
    figures: dict[str, Any] = {
        f"score_{side}{end}": value
        for side in SIDES
        for end, value in zip(("", "_low", "_high"), _score(scored, side), strict=True)
    }
    figures |= {key: comparison[key] for key in ("gained", "lost", "p_value", "verdict")}
    return Slice(
        by=by,
        name=name,
        rows=len(rows),
        scored=len(scored),
        judges=tuple(dict.fromkeys(row.judge for row in scored if row.judge)),
        **figures,
    )


def _score(scored: Sequence[JudgedRow], side: str) -> tuple[float | None, ...]:
    """Return the mean score of a side, and the ends of its interval; None without rows."""
    if not scored:
        return None, None, None
    means = [row.mean(side) for row in scored]
    if all(row.exact for row in scored):
        return _mean(means), *share_interval(means, len(scored[0].scores[side]))
    return _mean(means), *mean_interval(means)


def _exact_match(
    rows: Sequence[JudgedRow], side: str, kind: str, share: Callable[[JudgedRow], float]
) -> dict[str, Any]:
    """Return the fields of ModelFigures for one kind of exact match, "" or "_normalized"."""
    names = (f"correct{kind}", *(f"exact_match{kind}{end}" for end in ("", "_low", "_high")))
    if not rows:
        return dict.fromkeys(names)
    repeats, shares = len(rows[0].scores[side]), [share(row) for row in rows]
    right = round(sum(shares) * repeats)
    figures = (right, right / (len(rows) * repeats), *share_interval(shares, repeats))
    return dict(zip(names, figures, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

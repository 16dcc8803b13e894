"""The figures of an evaluation: evaluation.json, typed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from canvastune.errors import UserError
from canvastune.io.json_text import finite, read_json_lines, write_json

FILE_NAME = "evaluation.json"
ANSWERS, FORGETTING_ANSWERS = "answers.jsonl", "forgetting.jsonl"
SIDES = ("before", "after")  # the base and the tuned model

# Fields of ModelFigures, by when evaluation.json got keys for them.
_SCORES = ("correct", "exact_match", "exact_match_low", "exact_match_high")
_NORMALIZED = (  # absent from results of earlier versions
    *("correct_normalized", "exact_match_normalized"),
    *("exact_match_normalized_low", "exact_match_normalized_high"),
)
_MEASURED = ("tokens", "seconds", "tokens_per_second", "tokens_per_forward", "validation_loss")
_CUT = "cut"  # absent from results of earlier versions, as the two below
_REUSED, _SAMPLER = "base_reused", "sampler"
# Absent from results of earlier versions, as all that follows.
_SCORE = ("score", "score_low", "score_high", "score_by_seed")
_JUDGED, _SLICES = ("measure", "judges", "repeats"), "slices"
_FORGETTING = "forgetting"  # absent without evaluate.forgetting
_COMPARISON = ("gained", "lost", "p_value", "verdict")
_NORMALIZED_COMPARISON = ("gained_normalized", "lost_normalized")
_SETTINGS = (
    *("validation_rows", "answer_pattern", "asked"),
    *("batch_size", "max_new_tokens", "max_denoising_steps", "seed", "device"),
)
_ENDING = re.compile("(_low|_high|_by_seed)?$")
_NOT_IN_NAME = re.compile(r"[^\w.-]+")  # of a figure, where "/" would begin another level
_NOT_FIGURES = ("batch_size", "max_new_tokens", "max_denoising_steps", "seed", "repeats")


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one model.

    Scores are None if no row was scored, exact match also if a judge gives more than right and wrong.
    """

    correct: int | None  # answers, of all repeats
    exact_match: float | None  # share of the scored rows, 0 to 1
    exact_match_low: float | None  # ends of Wilson's 95% interval
    exact_match_high: float | None
    correct_normalized: int | None  # the same without typography: `$18.00` is 18
    exact_match_normalized: float | None
    exact_match_normalized_low: float | None
    exact_match_normalized_high: float | None
    tokens: int  # generated, including the one that ends an answer
    seconds: float  # spent generating, of all GPUs together
    tokens_per_second: float | None  # None, here and below: not a finite number
    tokens_per_forward: float | None  # mean over the rows, as `generate` counts them
    cut: int | None  # answers that `max_new_tokens` cut
    validation_loss: float | None  # nats per token, mean over the corruption levels
    validation_loss_by_level: Mapping[str, float | None]  # by corruption level, for example "0.1"
    score: float | None = None  # mean over the scored rows, 0 to 1; exact match is one kind
    score_low: float | None = None  # ends of its 95% interval
    score_high: float | None = None
    score_by_seed: tuple[float, ...] = ()  # of each repeat


@dataclass(frozen=True)
class Slice:
    """Both models on the held-out rows of one judge, of one source, of one value of a column, or of
    one length of the reference; or on the rows of another data set.
    """

    by: str  # "judge", "source", "column" or "length"; "forgetting", of another data set
    name: str
    rows: int
    scored: int
    judges: tuple[str, ...]
    # None, if no row was scored:
    score_before: float | None
    score_before_low: float | None
    score_before_high: float | None
    score_after: float | None
    score_after_low: float | None
    score_after_high: float | None
    gained: int | None
    lost: int | None
    p_value: float | None
    verdict: str | None


# Of the paired test, as people read it.
VERDICTS = {"better": "better", "worse": "worse", "undecided": "no clear difference"}


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of both models on the same held-out rows."""

    rows: int  # answered
    scored: int  # of them, those that a judge can judge by their reference
    before: ModelFigures  # the base
    after: ModelFigures  # the tuned model
    # None, if no row was scored:
    gained: int | None  # rows that the tuned model answers better: right, where the base is wrong
    lost: int | None  # rows that the base answers better
    p_value: float | None  # of the paired test on the rows; McNemar's exact one for right and wrong
    verdict: str | None  # "better", "worse" or "undecided"
    gained_normalized: int | None
    lost_normalized: int | None
    validation_rows: int
    answer_pattern: str | None
    asked: str  # hash of the questions and references: results compare where it is the same
    batch_size: int
    max_new_tokens: int
    max_denoising_steps: int
    seed: int
    device: str
    base_reused: int | None  # of the base's answers, those of earlier evaluations that are reused
    sampler: Mapping[str, Any] | None  # its settings, by their name in the recipe
    measure: str = "exact match"  # what a score is called: or "chrF", or "score" of several judges
    judges: tuple[str, ...] = ("pattern",)
    repeats: int = 1  # answers of each model to each row
    slices: tuple[Slice, ...] = ()
    forgetting: Slice | None = None  # both models on the rows of evaluate.forgetting

    @property
    def unscored_reason(self) -> str | None:
        """Why there is no score; None if there is one."""
        if self.scored:
            return None
        if not self.judges:
            return "evaluate.judge is []"
        if self.judges == ("pattern",):
            if self.answer_pattern is None:
                return "evaluate.answer_pattern is null"
            return f"evaluate.answer_pattern matches none of the {self.rows} references"
        return f"evaluate.judge ({', '.join(self.judges)}) can judge none of the {self.rows} rows"

    @property
    def all_slices(self) -> tuple[Slice, ...]:
        """The slices, and the rows of another data set last."""
        return (*self.slices, *([self.forgetting] if self.forgetting else []))

    @property
    def title(self) -> str:
        """What a score is called, at the start of a sentence: "Exact match", "chrF" or "Score"."""
        return self.measure if self.measure == "chrF" else self.measure.capitalize()

    @classmethod
    def read(cls, path: Path) -> EvaluationResult:
        """Read a result.

        Args:
            path: evaluation.json, or the folder that holds it.

        Raises:
            UserError: the file is missing, is not JSON, or lacks a key.
        """
        file = path / FILE_NAME if path.is_dir() else path
        hint = "Use the output folder of the step `evaluate`."
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}", hint=hint) from None
        except KeyError as error:
            raise UserError(
                f"{file}: found no key {error}, expected the result of an evaluation", hint=hint
            ) from None
        except (TypeError, AttributeError):
            raise UserError(
                f"{file}: found no JSON object, expected the result of an evaluation", hint=hint
            ) from None

    def write(self, folder: Path) -> None:
        """Write evaluation.json into `folder`."""
        write_json(folder / FILE_NAME, self.to_json())

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> EvaluationResult:
        """Build a result from the object in evaluation.json. Raises: KeyError, a key is missing."""
        same_names: dict[str, Any] = {name: found[name] for name in (*_COMPARISON, *_SETTINGS)}
        same_names |= {name: found.get(name) for name in _NORMALIZED_COMPARISON}
        return cls(
            rows=found["rows"],
            scored=found["scored"],
            before=_model_figures(found, "before"),
            after=_model_figures(found, "after"),
            base_reused=found.get(_REUSED),
            sampler=found.get(_SAMPLER),
            measure=found.get("measure", "exact match"),
            judges=tuple(found.get("judges", ("pattern",))),
            repeats=found.get("repeats", 1),
            slices=tuple(map(_read_slice, found.get(_SLICES, ()))),
            forgetting=_read_slice(found[_FORGETTING]) if found.get(_FORGETTING) else None,
            **same_names,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the object in evaluation.json: a key per figure and side."""
        sides = [(side, getattr(self, side)) for side in SIDES]
        found: dict[str, Any] = {"rows": self.rows, "scored": self.scored}
        for names, comparison in (
            (_SCORES, _COMPARISON),
            (_NORMALIZED, _NORMALIZED_COMPARISON),
        ):
            for side, model in sides:
                found |= _keyed(model, side, names)
            found |= {name: getattr(self, name) for name in comparison}
        for side, model in sides:
            found |= _keyed(model, side, _MEASURED)
            found |= {
                f"{_level_key(side)}{level}": loss
                for level, loss in model.validation_loss_by_level.items()
            }
        found |= {name: getattr(self, name) for name in _SETTINGS}
        found |= {_key(_CUT, side): model.cut for side, model in sides}
        found |= {_REUSED: self.base_reused, _SAMPLER: self.sampler}
        for side, model in sides:
            found |= _keyed(model, side, _SCORE)
        found |= {name: getattr(self, name) for name in _JUDGED}
        found |= {_SLICES: [asdict(each) for each in self.slices]}
        if self.forgetting is not None:
            found[_FORGETTING] = asdict(self.forgetting)
        return dict(finite(found))

    def figures(self) -> dict[str, float]:
        """Return the measured numbers by their key in evaluation.json, without the settings.

        All of them are finite; a figure that is not known is left out.
        """
        found = {
            name: value
            for name, value in self.to_json().items()
            if isinstance(value, int | float) and name not in _NOT_FIGURES
        }
        for each in self.all_slices:
            scores = {"score_before": each.score_before, "score_after": each.score_after}
            place = f"{each.by}/{_NOT_IN_NAME.sub('_', each.name)}"
            found |= {f"{place}/{name}": n for name, n in scores.items() if n is not None}
        return found


def _read_slice(found: Mapping[str, Any]) -> Slice:
    return Slice(**{**found, "judges": tuple(found["judges"])})


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of an evaluation's answers.jsonl."""
    return read_json_lines(folder / ANSWERS)


def _model_figures(found: Mapping[str, Any], side: str) -> ModelFigures:
    prefix = _level_key(side)
    values: dict[str, Any] = {name: found[_key(name, side)] for name in (*_SCORES, *_MEASURED)}
    values |= {name: found.get(_key(name, side)) for name in (*_NORMALIZED, _CUT)}
    # Earlier versions judged by exact match only.
    earlier = {name: values.get(name.replace("score", "exact_match")) for name in _SCORE}
    values |= {name: found.get(_key(name, side), earlier[name]) for name in _SCORE}
    values["score_by_seed"] = tuple(values["score_by_seed"] or ())
    return ModelFigures(
        **values,
        validation_loss_by_level={
            key.removeprefix(prefix): loss for key, loss in found.items() if key.startswith(prefix)
        },
    )


def _key(name: str, side: str) -> str:
    """Return the key of a figure, with the side before what follows the figure's own name."""
    return _ENDING.sub(rf"_{side}\g<0>", name, count=1)


def _keyed(model: ModelFigures, side: str, names: Sequence[str]) -> dict[str, Any]:
    return {_key(name, side): getattr(model, name) for name in names}


def _level_key(side: str) -> str:
    return f"validation_loss_{side}_t"

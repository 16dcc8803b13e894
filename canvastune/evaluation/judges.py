"""Judges: what decides whether an answer is right, or how near it comes to its reference."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config.judge import python_place, split_judge
from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError, one_line
from canvastune.evaluation.normalization import normalized_answer, normalized_value
from canvastune.evaluation.scoring import answer_part, find_reference, is_correct
from canvastune.evaluation.tool_calls import InvalidCall, read_tool_calls, refuse_constant

_LAST_NUMBER = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL)


@dataclass(frozen=True)
class Score:
    """What a judge says of one answer."""

    value: float  # 0, wrong, to 1, right
    exact: bool  # whether it can only be right or wrong
    normalized: bool | None = None  # of an exact one: whether it is right without typography


@dataclass(frozen=True)
class Judge:
    """One way to compare an answer with its reference."""

    name: str  # for people and for comparing evaluations: with the hash of the user's file
    read: Callable[[str], Any]  # what of a reference is compared; None: it cannot judge by it
    # Answer without thinking, what `read` returned, prompt; None: the judge does not score the row.
    compare: Callable[[str, Any, str], Score | None]
    # Called once with all of them, before they are compared: a slow judge takes several at a time.
    prepare: Callable[[Iterable[tuple[str, Any, str]]], None] | None = None


class Judging:
    """The judges of an evaluation, by the source of a row."""

    def __init__(
        self,
        settings: EvaluateConfig,
        references: Sequence[tuple[str | None, str]],
        kept: Path | None = None,
    ) -> None:
        """Load the judges.

        Args:
            references: source and reference of every row; they decide on the default judge.
            kept: folder where the scores of a model are kept; None: nowhere.

        Raises:
            UserError: a user's function that cannot be loaded.
        """
        self._of: dict[str | None, list[Judge]] = {}
        loaded: dict[str, Judge] = {}
        for source in dict.fromkeys(source for source, _ in references):
            names = settings.judges.get(source or "", settings.judge)
            if names is None:
                own = [reference for other, reference in references if other == source]
                names = default_judges(settings, own)
            for name in names:
                if name not in loaded:
                    loaded[name] = load_judge(name, settings, kept)
            self._of[source] = [loaded[name] for name in names]

    @property
    def names(self) -> list[str]:
        """All judges, each once."""
        return list(dict.fromkeys(judge.name for judges in self._of.values() for judge in judges))

    def find(self, source: str | None, reference: str) -> tuple[Judge, Any] | None:
        """Return the first judge that can judge by a reference, and what it compares."""
        for judge in self._of[source]:
            expected = judge.read(reference)
            if expected is not None:
                return judge, expected
        return None


def default_judges(settings: EvaluateConfig, references: Sequence[str]) -> tuple[str, ...]:
    """Return the judges of a source for which the recipe names none."""
    if settings.answer_pattern:
        pattern = re.compile(settings.answer_pattern)
        if any(find_reference(pattern, reference) is not None for reference in references):
            return ("pattern",)
    return ("chrf",)


def load_judge(name: str, settings: EvaluateConfig, kept: Path | None = None) -> Judge:
    """Return the judge of a name. Raises: UserError, a function that cannot be loaded."""
    kind, argument = split_judge(name)
    if kind == "pattern":
        return _pattern_judge(name, argument or settings.answer_pattern)
    if kind == "python":
        return _python_judge(name, *python_place(argument))
    if kind == "model":
        return _model_judge(settings, kept)
    read, compare = _PLAIN[kind]
    return Judge(name, read, compare)


def _pattern_judge(name: str, regex: str | None) -> Judge:
    if not regex:
        return Judge(name, lambda _: None, lambda *_: None)
    pattern = re.compile(regex)

    def compare(answer: str, expected: Any, _: str) -> Score:
        strict, normalized = is_correct(pattern, answer, expected)
        return Score(float(strict), True, normalized)

    return Judge(name, functools.partial(find_reference, pattern), compare)


def _read_number(text: str) -> Any:
    found = normalized_answer(_LAST_NUMBER, answer_part(text))
    return None if isinstance(found, str) else found


def _compare_numbers(answer: str, expected: Any, _: str) -> Score:
    return _exact(normalized_answer(_LAST_NUMBER, answer) == expected)


def _read_text(text: str) -> str | None:
    return answer_part(text) or None


def _compare_text(answer: str, expected: Any, _: str) -> Score:
    normalized = normalized_value(answer) == normalized_value(expected)
    return Score(float(answer == expected), True, normalized)


def read_json(text: str) -> str | None:
    """Return a canonical form of the object or list that a text is, bare or in a code fence."""
    text = answer_part(text)
    fenced = _FENCE.search(text)
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    return canonical_json(found) if isinstance(found, dict | list) else None


def read_calls(text: str) -> list[str] | None:
    """Return a canonical form of the calls in a text, in any order; None if it calls nothing."""
    try:
        calls = read_tool_calls(answer_part(text))
    except (InvalidCall, ValueError):
        return None
    return sorted(canonical_json([name, arguments]) for name, arguments in calls) or None


def _compare_chrf(answer: str, expected: Any, _: str) -> Score:
    return Score(_chrf().sentence_score(answer, [expected]).score / 100, exact=False)


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF  # 0.1 s, which most runs need not wait

    return CHRF()


_PLAIN: Mapping[str, tuple[Callable[[str], Any], Callable[[str, Any, str], Score | None]]] = {
    "number": (_read_number, _compare_numbers),
    "text": (_read_text, _compare_text),
    "json": (read_json, lambda answer, expected, _: _exact(read_json(answer) == expected)),
    "tool_call": (read_calls, lambda answer, expected, _: _exact(read_calls(answer) == expected)),
    "chrf": (_read_text, _compare_chrf),
}


def canonical_json(value: Any) -> str:
    """Return a text that two values share if they are equal as JSON: 1 is 1.0, and not true."""
    return json.dumps(_canonical(value), sort_keys=True, ensure_ascii=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return value


def _exact(right: bool) -> Score:
    return Score(float(right), True, right)


def _model_judge(settings: EvaluateConfig, kept: Path | None) -> Judge:
    from canvastune.evaluation.model_judge import ModelJudge

    asking = ModelJudge(settings.judge_model, kept)

    def compare(answer: str, reference: str, prompt: str) -> Score | None:
        found = asking.score((answer, reference, prompt))
        return None if found is None else Score(found, exact=False)

    return Judge(asking.name, _read_text, compare, asking.ask)


def _python_judge(name: str, file: str, function: str) -> Judge:
    """Load a function of the user's own: `grade(answer, reference, prompt)`.

    It returns True or False, a number from 0 to 1, or None for a row that it does not score.
    """
    path = Path(file).expanduser()
    hint = "Name a file of yours that this process can read, as in python:judge.py:grade."
    try:
        code = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"evaluate.judge: {path}: cannot be read ({error.strerror})", hint=hint
        ) from None
    spec = importlib.util.spec_from_file_location(f"canvastune_judge_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        grade = getattr(module, function)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"evaluate.judge: {path}: {type(error).__name__}: {one_line(error)}",
            hint=f"Correct the file; it has to define {function}(answer, reference, prompt).",
        ) from error
    if not callable(grade):
        raise UserError(
            f"evaluate.judge: {path}: found {function} = {grade!r}, expected a function",
            hint=f"Define {function}(answer, reference, prompt).",
        )

    def compare(answer: str, expected: Any, prompt: str) -> Score | None:
        return _own_score(name, grade, (answer, expected, prompt))

    return Judge(f"{name}@{hashlib.sha256(code).hexdigest()[:12]}", answer_part, compare)


def _own_score(name: str, grade: Callable[..., Any], given: tuple[str, str, str]) -> Score | None:
    answer, _, prompt = given
    where = f"evaluate.judge: {name}, asked about {answer[:60]!r} to {prompt[:60]!r}"
    try:
        found = grade(*given)
    except Exception as error:
        raise UserError(
            f"{where}: {type(error).__name__}: {one_line(error)}",
            hint="Correct the function, and run the same command again: the answers are kept.",
        ) from error
    if hasattr(found, "item"):  # a scalar of NumPy or PyTorch
        found = found.item()
    if found is None:
        return None
    if isinstance(found, bool):
        return _exact(found)
    if isinstance(found, int | float) and math.isfinite(found) and 0 <= found <= 1:
        return Score(float(found), exact=False)
    raise UserError(
        f"{where}: found {found!r}, expected True, False, a number from 0 to 1, or None",
        hint="Correct the function, and run the same command again: the answers are kept.",
    )

"""Evaluate the base and the tuned model on held-out rows."""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from canvastune import __version__
from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig
from canvastune.data.packing import Example
from canvastune.evaluation.answer_cache import AnswerCache
from canvastune.evaluation.base_results import BaseResults
from canvastune.evaluation.generation import (
    Answering,
    Question,
    answering,
    generate_answers,
    hash_questions,
    response_ends,
    select_questions,
)
from canvastune.evaluation.result import SIDES, EvaluationResult, ModelFigures
from canvastune.evaluation.scoring import (
    Reference,
    answer_part,
    compare,
    find_reference,
    is_correct,
    mcnemar,
    wilson,
)
from canvastune.evaluation.validation_loss import denoising_loss, held_out_examples, mean_losses
from canvastune.io.atomic import atomic_directory, check_writable
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import to_json_text
from canvastune.io.provenance import write_provenance
from canvastune.preparation.tokenizer import load_tokenizer

_PROGRESS_SECONDS = 2.0
_LOGGED_ANSWERS = 3  # at the end; the report has all of them
_EXAMPLES_PER_PART = 32  # held-out examples whose loss is saved at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """What both models are given."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    how: Answering
    examples: list[Example]
    common: dict[str, str]  # what every result depends on
    device: torch.device


@dataclass(frozen=True)
class _ModelOutput:
    """What one model produced."""

    texts: dict[str, str]  # answers by question id
    trace: list[dict[str, Any]]  # of the answer to the first question
    tokens: int
    seconds: float
    tokens_per_forward: float
    cut: int  # answers that the limit of tokens cut
    reused: int  # answers that an earlier run got
    validation_loss: float  # these may be NaN, of a model that overflows
    validation_loss_by_level: dict[str, float]


def evaluate(
    config: RunConfig,
    dataset: Path,
    base: Path,
    tuned: Path,
    out: Path,
    cache_path: Path | None = None,
    base_results: Path | None = None,
) -> EvaluationResult:
    """Ask both models the same held-out questions, measure their losses, and write the result.

    `evaluation.json` has the figures, `answers.jsonl` each answer, `film.json` the denoising trace
    of the answer to the first question. Both models are given the same noise, which depends on the
    seed and the question only. The prompts are the tokens that training put before the responses.
    Exact match compares what `evaluate.answer_pattern` finds last in the answer and in the
    reference, strictly and without typography; rows whose reference has no match are answered but
    not scored, and without any match exact match is left out. The validation loss is training's, of
    the checkpoints as stored. One model at a time is in memory.

    An evaluation that was killed resumes, with the same result.

    Args:
        dataset: a prepared dataset; `evaluate.rows` rows of its validation split are asked, chosen
            by their content hash.
        base: checkpoint folder; its tokenizer and chat template serve both models.
        tuned: checkpoint folder of the merged or fully tuned model.
        cache_path: file that saves partial results, deleted at the end; None: a file next to `out`.
        base_results: folder where results of bases are kept for later evaluations, and used if they
            depend on the same; None: nowhere.

    Raises:
        UserError: no prepared dataset, a checkpoint that cannot be loaded, an `out` that is not
            empty, a batch too large for the device, another process that evaluates into the same
            place.
    """
    out = out.absolute()
    settings = config.evaluate
    pattern = re.compile(settings.answer_pattern) if settings.answer_pattern else None
    check_writable(out)
    tokenizer = load_tokenizer(base).tokenizer
    questions = select_questions(dataset, tokenizer, settings.rows)
    references = {
        question.id: find_reference(pattern, question.reference) for question in questions
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config = read_model_config(base)
    examples = held_out_examples(dataset, config.train, model_config)
    how = answering(base, model_config, settings, response_ends(dataset))
    versions = {
        "canvastune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    common = {"base": (base_hash := hash_path(base)), "device": device.type, **versions}
    task = _Task(config, tokenizer, questions, how, examples, common, device)
    kept = BaseResults(base_results, base_hash)
    with AnswerCache(cache_path or out.with_name(f".{out.name}.unfinished.jsonl")) as cache:
        if len(cache):
            logger.info(f"evaluate: resuming from {cache.path}")
        checkpoints = zip(SIDES, (base, tuned), strict=True)
        outputs = {
            side: _run_model(task, side, checkpoint, cache, kept if side == SIDES[0] else None)
            for side, checkpoint in checkpoints
        }
        answers = [
            _answer_row(question, outputs, pattern, references[question.id])
            for question in questions
        ]
        result = _result(task, answers, outputs)
        first = questions[0]
        film: dict[str, Any] = {"id": first.id, "prompt": first.text, "reference": first.reference}
        film |= {side: output.trace for side, output in outputs.items()}
        with atomic_directory(out) as folder:
            result.write(folder)
            (folder / "film.json").write_text(
                to_json_text(film, ensure_ascii=False), encoding="utf-8"
            )
            with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(to_json_text(row, ensure_ascii=False) for row in answers)
            write_provenance(
                folder, "evaluate", config, {"data": dataset, "base": base, "tuned": tuned}
            )
        cache.delete()
    for row in answers[:_LOGGED_ANSWERS]:
        prompt, before, after = (_shorten(row[key]) for key in ("prompt", *SIDES))
        logger.info(f"evaluate: asked {prompt}, before {before}, after {after}")
    logger.info(f"evaluate: {_summary(result)}: {out}")
    return result


def _run_model(
    task: _Task, side: str, checkpoint: Path, cache: AnswerCache, kept: BaseResults | None
) -> _ModelOutput:
    """Generate one model's answers and measure its loss, reusing what the cache has."""
    config, levels = task.config, task.config.train.validation_levels
    blocks = config.train.validation_blocks
    common = {**task.common, "side": side, "model": hash_path(checkpoint)}
    generation = {"seed": config.seed, **asdict(task.how)}
    first = task.questions[0].id
    store = _Store(cache, kept)

    @functools.cache
    def model() -> Any:
        logger.info(f"evaluate: {side}: loading {checkpoint}")
        return load_stock(checkpoint, task.device)

    def answer_key(question: Question) -> dict[str, Any]:
        asked = {"id": question.id, "asked": question.tokens, "traced": question.id == first}
        return {**common, **generation, **asked}

    def loss_key(part: list[Example]) -> dict[str, Any]:
        denoised = [[one.id, one.prefix_length, one.tokens.tolist()] for one in part]
        # With one block of each answer, the key is that of results from before there were more.
        more = {} if blocks == 1 else {"blocks": blocks}
        return {**common, "levels": levels, **more, "denoised": denoised}

    progress = _Progress(f"{side}: {{}} of {{}} rows answered", len(task.questions))
    answers = {one.id: store.get(answer_key(one)) for one in task.questions}
    reused = store.reused
    open_questions = [one for one in task.questions if answers[one.id] is None]
    progress.add(len(task.questions) - len(open_questions), 0.0)
    if open_questions:
        keys = {one.id: answer_key(one) for one in open_questions}
        given = (open_questions, task.tokenizer, task.how, config.seed, config.evaluate.batch_size)
        for name, answer in generate_answers(model(), *given, first):
            store.put(keys[name], answer)
            answers[name] = answer
            progress.add(1, answer["seconds"])

    losses = []
    progress = _Progress(f"{side}: {{}} of {{}} rows denoised", len(task.examples))
    for at in range(0, len(task.examples), _EXAMPLES_PER_PART):
        part = task.examples[at : at + _EXAMPLES_PER_PART]
        found = store.get(loss_key(part))
        if found is None:
            found = denoising_loss(model(), part, levels, blocks)
            store.put(loss_key(part), found)
        losses.append(found)
        progress.add(len(part), found["seconds"])
    if kept is not None:
        kept.save()
    if reused:
        logger.info(
            f"evaluate: {side}: {reused} of {len(answers)} answers were taken from an earlier "
            "run with the same model, questions and settings"
        )
    loss, by_level = mean_losses(losses, levels)
    each = list(answers.values())
    return _ModelOutput(
        texts={name: answer["text"] for name, answer in answers.items()},
        trace=answers[first]["trace"],
        tokens=sum(answer["tokens"] for answer in each),
        seconds=sum(answer["seconds"] for answer in each),
        tokens_per_forward=sum(answer["tokens"] / answer["forwards"] for answer in each)
        / len(each),
        cut=sum(answer["cut"] for answer in each),
        reused=reused,
        validation_loss=loss,
        validation_loss_by_level=by_level,
    )


class _Store:
    """Where results are looked up and saved: this evaluation's, then those kept of the base."""

    def __init__(self, cache: AnswerCache, kept: BaseResults | None) -> None:
        self.cache, self.kept = cache, kept
        self.reused = 0  # results of earlier evaluations

    def get(self, key: Mapping[str, Any]) -> Any:
        found = self.cache.get(key)
        if self.kept is None:
            return found
        if found is not None:
            self.kept.put(key, found)
            return found
        found = self.kept.get(key)
        self.reused += found is not None
        return found

    def put(self, key: Mapping[str, Any], result: Any) -> None:
        self.cache.put(key, result)
        if self.kept is not None:
            self.kept.put(key, result)


class _Progress:
    """Logs how much is done, and how long the rest takes."""

    def __init__(self, line: str, total: int) -> None:
        self.line, self.total = line, total
        self.done, self.timed, self.seconds = 0, 0, 0.0
        self.logged = time.monotonic()

    def add(self, rows: int, seconds: float) -> None:
        self.done += rows
        if seconds:
            self.timed, self.seconds = self.timed + rows, self.seconds + seconds
        now = time.monotonic()
        if not rows or not (now - self.logged > _PROGRESS_SECONDS or self.done == self.total):
            return
        self.logged = now
        left = round(self.seconds / max(1, self.timed) * (self.total - self.done))
        line = self.line.format(self.done, self.total)
        logger.info(f"evaluate: {line}, {left // 60}:{left % 60:02d} left")


def _answer_row(
    question: Question,
    outputs: Mapping[str, _ModelOutput],
    pattern: re.Pattern[str] | None,
    reference: Reference | None,
) -> dict[str, Any]:
    """Return a line of answers.jsonl."""
    texts = {side: output.texts[question.id] for side, output in outputs.items()}
    strict: dict[str, bool | None] = {}
    normalized: dict[str, bool | None] = {}
    for side, text in texts.items():
        correct = (
            is_correct(pattern, answer_part(text), reference)
            if pattern is not None and reference is not None
            else (None, None)
        )
        strict[f"correct_{side}"], normalized[f"correct_normalized_{side}"] = correct
    return {
        "id": question.id,
        "prompt": question.text,
        "reference": question.reference,
        **texts,
        **strict,
        **normalized,
    }


def _result(
    task: _Task, answers: Sequence[Mapping[str, Any]], outputs: Mapping[str, _ModelOutput]
) -> EvaluationResult:
    scored = [answer for answer in answers if answer["correct_before"] is not None]

    def figures(side: str) -> ModelFigures:
        output = outputs[side]
        return ModelFigures(
            **_exact_match(scored, side, ""),
            **_exact_match(scored, side, "_normalized"),
            tokens=output.tokens,
            seconds=output.seconds,
            tokens_per_second=output.tokens / output.seconds,
            tokens_per_forward=output.tokens_per_forward,
            cut=output.cut,
            validation_loss=output.validation_loss,
            validation_loss_by_level=output.validation_loss_by_level,
        )

    settings = task.config.evaluate
    result = EvaluationResult(
        rows=len(answers),
        scored=len(scored),
        before=figures("before"),
        after=figures("after"),
        **_comparison(scored),
        validation_rows=len(task.examples),
        answer_pattern=settings.answer_pattern,
        asked=hash_questions(task.questions),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        max_denoising_steps=task.how.sampler.steps,
        seed=task.config.seed,
        device=task.device.type,
        base_reused=outputs["before"].reused,
        sampler=asdict(task.how.sampler),
    )
    return EvaluationResult.from_json(result.to_json())  # as it is read: finite numbers


def _exact_match(scored: Sequence[Mapping[str, Any]], side: str, kind: str) -> dict[str, Any]:
    """Return the fields of ModelFigures for one kind of exact match, "" or "_normalized"."""
    correct = sum(answer[f"correct{kind}_{side}"] for answer in scored) if scored else None
    low, high = (None, None) if correct is None else wilson(correct, len(scored))
    return {
        f"correct{kind}": correct,
        f"exact_match{kind}": None if correct is None else correct / len(scored),
        f"exact_match{kind}_low": low,
        f"exact_match{kind}_high": high,
    }


def _comparison(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of EvaluationResult that compare the models row by row."""
    names = ("gained", "lost", "p_value", "verdict", "gained_normalized", "lost_normalized")
    if not scored:
        return dict.fromkeys(names)
    found = []
    for kind in ("", "_normalized"):
        sides = [(row[f"correct{kind}_before"], row[f"correct{kind}_after"]) for row in scored]
        found.append((sides.count((False, True)), sides.count((True, False))))
    strict, normalized = found
    return dict(zip(names, (*strict, mcnemar(*strict), compare(*strict), *normalized), strict=True))


def _summary(result: EvaluationResult) -> str:
    before, after = (
        "not finite" if model.validation_loss is None else f"{model.validation_loss:.3f}"
        for model in (result.before, result.after)
    )
    losses = f"validation loss {before} before, {after} after"
    if not result.scored:
        return f"{losses}; exact match is left out: {result.unscored_reason}"
    sides = (("before", result.before), ("after", result.after))
    shares = [
        f"{model.exact_match:.1%} "
        f"[{model.exact_match_low:.1%}, {model.exact_match_high:.1%}] {side}"
        for side, model in sides
    ]
    normalized = [f"{model.exact_match_normalized:.1%} {side}" for side, model in sides]
    change = (
        f"{result.gained} gained, {result.lost} lost, p = {result.p_value:.2g}: {result.verdict}"
    )
    return (
        f"exact match {', '.join(shares)}, {result.scored} rows; {change}; "
        f"normalized {', '.join(normalized)}; {losses}"
    )


def _shorten(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}..."

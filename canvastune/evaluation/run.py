"""Evaluate the base and the tuned model on held-out rows."""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from canvastune import __version__
from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig
from canvastune.data.packing import Example
from canvastune.errors import UserError
from canvastune.evaluation.answer_cache import AnswerCache
from canvastune.evaluation.generation import Question, answer, batches_of, choose_questions, digest_of
from canvastune.evaluation.scoring import SIDES, compile_pattern, find_answer, is_right, score
from canvastune.evaluation.validation_loss import denoise, held_out_examples, mean_losses
from canvastune.io.atomic import atomic_directory, check_writable
from canvastune.io.hashing import hash_path
from canvastune.io.provenance import write_provenance
from canvastune.preparation.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

Part = TypeVar("Part")


_PROGRESS_SECONDS = 2.0


_SHOWN = 3  # answers that are shown at once; all of them are in the report


_EXAMPLES = 32  # held-out ones that are denoised before the result is written down


_SETTINGS = ("batch_size", "max_new_tokens", "max_denoising_steps", "seed")  # numbers that were not measured


@dataclass(frozen=True)
class _Task:
    """What both models are given."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    examples: list[Example]
    common: dict[str, str]  # what every result depends on
    device: torch.device


@dataclass(frozen=True)
class _Side:
    """What became of one model."""

    texts: dict[str, str]  # its answers, by the question's id
    film: list[dict[str, Any]]  # of the answer to the first question
    figures: dict[str, float]  # for evaluation.json


def evaluate(config: RunConfig, dataset: Path, base: Path, tuned: Path, out: Path, journal: Path | None = None) -> dict[str, Any]:
    """Ask base and tuned model the same held-out questions, measure both losses on the same held-out examples, and write it into `out`.

    `evaluation.json` has the figures, `answers.jsonl` each answer, `film.json` how the answer to the first question formed.
    Every batch is denoised from the same seed before and after. Exact match compares what `evaluate.answer_pattern` finds
    last in the answer and in the reference; rows whose reference holds no such thing are answered and not scored. The validation
    loss is training's, of the checkpoints as they stand. One model at a time is in memory.

    An evaluation that was killed goes on where it was, with the same result.

    Args:
        dataset: a prepared data set; `evaluate.rows` of its validation split are asked, chosen by their content hash.
        base: checkpoint folder; its tokenizer and chat template serve both models.
        tuned: checkpoint folder of the merged or fully tuned model.
        journal: file that keeps what is done, and is removed at the end; None: one beside `out`.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: no prepared data set, a checkpoint that cannot be loaded, a pattern that is not one or that no reference
            matches, an `out` that is not empty, a batch that the device cannot hold, another process that does the same.
    """
    out = out.absolute()
    pattern = compile_pattern(config.evaluate.answer_pattern)
    check_writable(out)
    tokenizer = load_tokenizer(base).tokenizer
    questions = choose_questions(dataset, tokenizer, config.evaluate.rows)
    references = {question.id: find_answer(pattern, question.reference) for question in questions}
    if not any(references.values()):
        example = questions[0].reference[-80:]
        raise UserError(
            f"evaluate.answer_pattern: {pattern.pattern!r} matches none of the {len(questions)} references of {dataset}; "
            f"one of them ends with {example!r}. Give a pattern whose group 1 is the answer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = held_out_examples(dataset, config.train, read_model_config(base))
    versions = {"canvastune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    task = _Task(config, tokenizer, questions, examples, {"base": hash_path(base), "device": device.type, **versions}, device)
    with AnswerCache(journal or out.with_name(f".{out.name}.unfinished.jsonl")) as done:
        if len(done):
            logger.info(f"evaluate: going on where an earlier attempt was: {done.path}")
        sides = {side: _measure(task, side, checkpoint, done) for side, checkpoint in zip(SIDES, (base, tuned), strict=True)}
        answers = [_row(question, sides, pattern, references[question.id]) for question in questions]
        result = score(answers) | {name: value for said in sides.values() for name, value in said.figures.items()}
        result |= {"validation_rows": len(examples), "answer_pattern": pattern.pattern, "asked": digest_of(questions)}
        result |= {name: getattr(config.evaluate, name) for name in _SETTINGS[:-1]} | {"seed": config.seed, "device": device.type}
        first = questions[0]
        film = {"id": first.id, "prompt": first.text, "reference": first.reference} | {side: said.film for side, said in sides.items()}
        with atomic_directory(out) as folder:
            (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            (folder / "film.json").write_text(json.dumps(film, ensure_ascii=False) + "\n", encoding="utf-8")
            with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
            write_provenance(folder, "evaluate", config, {"data": dataset, "base": base, "tuned": tuned})
        done.remove()
    for row in answers[:_SHOWN]:
        logger.info(f"evaluate: asked {_short(row['prompt'])}, before {_short(row['before'])}, after {_short(row['after'])}")
    logger.info(f"evaluate: {_in_words(result)}: {out}")
    return result


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of evaluation.json that were measured: what is shown beside other evaluations'."""
    return {name: value for name, value in result.items() if isinstance(value, int | float) and name not in _SETTINGS}


def _measure(task: _Task, side: str, checkpoint: Path, journal: AnswerCache) -> _Side:
    """Let one model answer the questions and denoise the examples, as far as the journal does not know of it."""
    config, settings, levels = task.config, task.config.evaluate, task.config.train.validation_levels
    common = {**task.common, "side": side, "model": hash_path(checkpoint)}
    generation = {"seed": config.seed, "tokens": settings.max_new_tokens, "steps": settings.max_denoising_steps}
    filmed = task.questions[0].id

    @functools.cache
    def model() -> Any:
        logger.info(f"evaluate: {side}: loading {checkpoint}")
        return load_stock(checkpoint, task.device)

    answered = _each(
        batches_of(task.questions, settings.batch_size),
        lambda batch: {**common, **generation, "filmed": filmed, "asked": [[question.id, question.tokens] for question in batch]},
        lambda batch: answer(model(), batch, task.tokenizer, settings, config.seed, filmed),
        journal,
        f"{side}: {{}} of {{}} rows answered",
    )
    denoised = _each(
        [task.examples[at : at + _EXAMPLES] for at in range(0, len(task.examples), _EXAMPLES)],
        lambda part: {**common, "levels": levels, "denoised": [[one.id, one.prefix_length, one.tokens.tolist()] for one in part]},
        lambda part: denoise(model(), part, levels),
        journal,
        f"{side}: {{}} of {{}} rows denoised",
    )
    tokens, seconds = sum(found["tokens"] for found in answered), sum(found["seconds"] for found in answered)
    figures = {
        f"tokens_{side}": tokens,
        f"seconds_{side}": seconds,
        f"tokens_per_second_{side}": tokens / seconds,
        f"tokens_per_forward_{side}": sum(found["tokens_per_forward"] for found in answered) / len(task.questions),
        **{f"validation_loss_{side}{level}": loss for level, loss in mean_losses(denoised, levels).items()},
    }
    texts = {name: text for found in answered for name, text in found["texts"].items()}
    return _Side(texts, next(found["film"] for found in answered if found["film"] is not None), figures)


def _each(
    parts: Sequence[list[Part]],
    name: Callable[[list[Part]], dict[str, Any]],
    work: Callable[[list[Part]], dict[str, Any]],
    journal: AnswerCache,
    said: str,
) -> list[dict[str, Any]]:
    """The result of each part of the work, from the journal or made now and written there; says how far it is, with the time left."""
    results = []
    total, done, seconds, shown = sum(map(len, parts)), 0, 0.0, time.monotonic()
    for part in parts:
        found = journal.find(name(part))
        if found is None:
            found = work(part)
            journal.keep(name(part), found)
        results.append(found)
        done, seconds, now = done + len(part), seconds + found["seconds"], time.monotonic()
        if now - shown > _PROGRESS_SECONDS or done == total:
            shown, left = now, round(seconds / done * (total - done))
            logger.info(f"evaluate: {said.format(done, total)}, {left // 60}:{left % 60:02d} left")
    return results


def _row(question: Question, sides: Mapping[str, _Side], pattern: re.Pattern[str], reference: str | None) -> dict[str, Any]:
    """A line of answers.jsonl."""
    texts = {side: said.texts[question.id] for side, said in sides.items()}
    right = {f"correct_{side}": is_right(pattern, text, reference) for side, text in texts.items()}
    return {"id": question.id, "prompt": question.text, "reference": question.reference, **texts, **right}


def _in_words(result: Mapping[str, Any]) -> str:
    shares = [
        f"{result[f'exact_match_{side}']:.1%} [{result[f'exact_match_{side}_low']:.1%}, {result[f'exact_match_{side}_high']:.1%}] {side}"
        for side in SIDES
    ]
    paired = f"{result['gained']} gained, {result['lost']} lost, p = {result['p_value']:.2g}: {result['verdict']}"
    losses = f"validation loss {result['validation_loss_before']:.3f} before, {result['validation_loss_after']:.3f} after"
    return f"exact match {', '.join(shares)}, {result['scored']} rows; {paired}; {losses}"


def _short(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}..."

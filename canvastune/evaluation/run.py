"""Evaluate the base and the tuned model on held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig
from canvastune.data.files import FORGETTING
from canvastune.data.packing import Example
from canvastune.errors import UserError
from canvastune.evaluation.base_results import BaseResults
from canvastune.evaluation.degenerate import describe_degenerate
from canvastune.evaluation.denoising_trace import longest_trace
from canvastune.evaluation.figures import (
    JudgedRow,
    compared,
    describe_slices,
    forgetting_figures,
    judge_rows,
    measure,
    side_scores,
    slices,
    summarize,
    write_answers,
)
from canvastune.evaluation.generation import (
    Answering,
    Question,
    answer_seeds,
    answering,
    hash_questions,
    response_ends,
    select_questions,
    software_versions,
)
from canvastune.evaluation.judges import Judging
from canvastune.evaluation.model_run import (
    Checkpoint,
    Conditions,
    ModelRun,
    Store,
    find_device,
)
from canvastune.evaluation.ranks import Ranks
from canvastune.evaluation.result import (
    ANSWERS,
    FORGETTING_ANSWERS,
    SIDES,
    EvaluationResult,
    ModelFigures,
)
from canvastune.evaluation.validation_loss import held_out_examples, mean_losses
from canvastune.io.atomic import atomic_directory, check_writable
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import write_json
from canvastune.io.provenance import write_provenance
from canvastune.preparation.tokenizer import load_transformers_tokenizer

_LOGGED_ANSWERS = 3  # at the end; the report has all of them
_TRACED = 8  # answers whose denoising is recorded: the report has the one that took longest to form

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """What both models are given."""

    config: RunConfig
    questions: list[Question]
    others: list[Question]  # of evaluate.forgetting
    how: Answering
    examples: list[Example]
    conditions: Conditions
    canvas: int  # tokens that are denoised together


@dataclass(frozen=True)
class _ModelOutput:
    """What one model produced."""

    texts: dict[str, list[str]]  # answers by question id, one of each repeat
    traces: dict[str, list[dict[str, Any]]]  # by question id, of the answers to the first ones
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
    """Evaluate only in this process, as `evaluate_on_ranks`."""
    result = evaluate_on_ranks(config, dataset, base, tuned, out, Ranks(), cache_path, base_results)
    assert result is not None, "this is the first rank"
    return result


def evaluate_on_ranks(
    config: RunConfig,
    dataset: Path,
    base: Path,
    tuned: Path,
    out: Path,
    ranks: Ranks,
    cache_path: Path | None = None,
    base_results: Path | None = None,
) -> EvaluationResult | None:
    """Ask both models the same held-out questions, measure their losses, and write the result.

    `evaluation.json` has the figures, `answers.jsonl` each answer, `forgetting.jsonl` those to the
    rows of `evaluate.forgetting`, `film.json` the denoising trace of one answer. Both models are given
    the same noise, which depends on the seed and the question only. The prompts are the tokens that
    training put before the responses.
    The judges of `evaluate.judge` and `evaluate.judges` compare an answer with its reference; rows
    that none of them can judge by are answered but not scored. With `evaluate.repeats`, each row is
    answered with several seeds. The validation loss is training's, of the checkpoints as stored.
    One model at a time is in memory. Several ranks take the questions from one queue, and the first
    one writes the result.

    An evaluation that was killed resumes, on any number of ranks, with the same result.

    Args:
        dataset: a prepared dataset; `evaluate.rows` rows of its validation split are asked, chosen
            by their content hash.
        base: checkpoint folder; its tokenizer and chat template serve both models.
        tuned: checkpoint folder of the merged or fully tuned model.
        cache_path: file that saves partial results, deleted at the end; None: a file next to `out`.
        base_results: folder where results of bases, and scores of a judging model, are kept for
            later evaluations, and used if they depend on the same; None: nowhere.

    Returns:
        The result; None on other ranks than the first.

    Raises:
        UserError: no prepared dataset, a checkpoint or a judge that cannot be loaded, an `out` that
            is not empty, a batch too large for the device, another process that evaluates into the
            same place.
    """
    out = out.absolute()
    settings = config.evaluate
    ranks.on_first(lambda: check_writable(out))
    tokenizer = load_transformers_tokenizer(base)
    questions = select_questions(dataset, tokenizer, settings.rows, settings.slices)
    others = select_others(config, dataset, tokenizer)
    judges: list[Judging] = []  # the first rank's

    def find_judges() -> None:
        judges.append(judging_of(config, questions, base_results))
        references = [(question.source, question.reference) for question in others]
        judges.append(Judging(settings, references, base_results))

    ranks.on_first(find_judges)  # before the models answer: a judge may be refused
    device = find_device()
    model_config = read_model_config(base)
    examples = held_out_examples(dataset, config.train, model_config)
    how = answering(base, model_config, settings, response_ends(dataset))
    hashes = ranks.on_first(lambda: {path: hash_path(path) for path in (base, tuned)})
    common = {"base": hashes[base], "device": device.type, **software_versions()}
    canvas = model_config.canvas_length
    traced = tuple(question.id for question in questions[:_TRACED])
    conditions = Conditions(config, tokenizer, common, device, traced)
    task = _Task(config, questions, others, how, examples, conditions, canvas)
    kept = BaseResults(base_results if ranks.is_first else None, hashes[base])
    with ranks.open_cache(cache_path or out.with_name(f".{out.name}.unfinished.jsonl")) as cache:
        if len(cache):
            logger.info(f"evaluate: resuming from {cache.path}")
        checkpoints = zip(SIDES, (base, tuned), strict=True)
        outputs = {
            side: _run_model(
                Checkpoint(side, path, hashes[path]),
                task,
                ranks,
                Store(cache, kept if side == SIDES[0] else None),
            )
            for side, path in checkpoints
        }
        ranks.on_first(lambda: None)  # until it has saved the last results of the others
        result = _write_result(task, judges, outputs, out, dataset, base, tuned) if judges else None
        cache.delete()
    return result


def _write_result(
    task: _Task,
    judges: Sequence[Judging],
    outputs: Mapping[str, _ModelOutput],
    out: Path,
    dataset: Path,
    base: Path,
    tuned: Path,
) -> EvaluationResult:
    """Judge the answers, and write everything to `out`."""
    config, (judging, other_judging) = task.config, judges
    rows = [_answer_row(config, question, outputs) for question in task.questions]
    judged = judge_rows(judging, rows)
    other_rows = [_answer_row(config, question, outputs) for question in task.others]
    other_judged = judge_rows(other_judging, other_rows)
    result = replace(
        _result(task, judging, judged, outputs),
        forgetting=forgetting_figures(config.evaluate, other_judged),
    )
    name = longest_trace(*(outputs[side].traces for side in reversed(SIDES)))
    shown = next(question for question in task.questions if question.id == name)
    film: dict[str, Any] = {"id": name, "prompt": shown.text, "reference": shown.reference}
    film |= {side: output.traces[name] for side, output in outputs.items()}
    with atomic_directory(out) as folder:
        result.write(folder)
        write_json(folder / "film.json", film, indent=None, ensure_ascii=False)
        write_answers(folder / ANSWERS, rows, judged)
        if task.others:
            write_answers(folder / FORGETTING_ANSWERS, other_rows, other_judged)
        write_provenance(
            folder, "evaluate", config, {"data": dataset, "base": base, "tuned": tuned}
        )
    for row in rows[:_LOGGED_ANSWERS]:
        prompt, before, after = (_shorten(row[key]) for key in ("prompt", *SIDES))
        logger.info(f"evaluate: asked {prompt}, before {before}, after {after}")
    for line in [*describe_slices(result), f"{summarize(result)}: {out}"]:
        logger.info(f"evaluate: {line}")
    for line in describe_degenerate(rows):
        logger.warning(f"evaluate: {line}")
    return result


def _run_model(checkpoint: Checkpoint, task: _Task, ranks: Ranks, store: Store) -> _ModelOutput:
    """Generate one model's answers and measure its loss, reusing what the store has."""
    run = ModelRun(checkpoint, task.conditions, ranks, store)
    seeds, asked = answer_seeds(task.config), {one.id for one in task.questions}
    others = [one for one in task.others if one.id not in asked]
    answers = run.answer(task.questions, task.how)
    reused = store.reused
    answers |= run.answer(others, task.how)
    losses = run.losses(task.examples)
    if ranks.is_first:
        store.save()
    each = [answers[one.id, seed] for seed in seeds for one in task.questions]
    if reused:
        logger.info(
            f"evaluate: {checkpoint.side}: {reused} of {len(each)} answers were taken from an "
            "earlier run with the same model, questions and settings"
        )
    loss, by_level = mean_losses(losses, task.config.train.validation_levels)
    return _ModelOutput(
        texts={
            one.id: [answers[one.id, seed]["text"] for seed in seeds]
            for one in [*task.questions, *others]
        },
        traces={name: answers[name, seeds[0]]["trace"] for name in task.conditions.traced},
        tokens=sum(answer["tokens"] for answer in each),
        seconds=sum(answer["seconds"] for answer in each),
        tokens_per_forward=sum(answer["tokens"] / answer["forwards"] for answer in each)
        / len(each),
        cut=sum(answer["cut"] for answer in each),
        reused=reused,
        validation_loss=loss,
        validation_loss_by_level=by_level,
    )


def select_others(
    config: RunConfig, dataset: Path, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """Return the questions of `evaluate.forgetting`, as `select_questions`; none without it."""
    settings = config.evaluate.forgetting
    if settings.source is None:
        return []
    questions = select_questions(dataset / FORGETTING, tokenizer, settings.rows)
    return [replace(question, source=settings.source) for question in questions]


def judging_of(
    config: RunConfig, questions: Sequence[Question], kept: Path | None = None
) -> Judging:
    """Return the judges of a recipe for the questions.

    Args:
        kept: folder where the scores of a judging model are kept.

    Raises:
        UserError: a judge that cannot be loaded, or judges of sources that the data does not know.
    """
    named = bool(config.data.source) or any(question.source for question in questions)
    if config.evaluate.judges and not named:
        raise UserError(
            "evaluate.judges: the prepared data does not record the source of each row",
            hint="Prepare the data again: it was written by an earlier version.",
        )
    return Judging(
        config.evaluate,
        [(question.source or config.data.source, question.reference) for question in questions],
        kept,
    )


def _answer_row(
    config: RunConfig, question: Question, outputs: Mapping[str, _ModelOutput]
) -> dict[str, Any]:
    """Return what a line of answers.jsonl has before it is judged."""
    texts = {side: output.texts[question.id] for side, output in outputs.items()}
    shown, *repeats = (
        dict(zip(texts, each, strict=True)) for each in zip(*texts.values(), strict=True)
    )
    return {
        "id": question.id,
        "source": question.source or config.data.source,
        "origin": question.origin,
        **({"columns": dict(question.columns)} if question.columns else {}),
        "prompt": question.text,
        "reference": question.reference,
        "reference_tokens": question.reference_tokens,
        **shown,
        **({"repeats": repeats} if repeats else {}),
    }


def _result(
    task: _Task,
    judging: Judging,
    judged: Sequence[JudgedRow],
    outputs: Mapping[str, _ModelOutput],
) -> EvaluationResult:
    def figures(side: str) -> ModelFigures:
        output = outputs[side]
        return ModelFigures(
            **side_scores(judged, side),
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
        rows=len(judged),
        scored=sum(row.scored for row in judged),
        before=figures("before"),
        after=figures("after"),
        **compared(judged),
        validation_rows=len(task.examples),
        answer_pattern=settings.answer_pattern,
        asked=hash_questions(task.questions),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        max_denoising_steps=task.how.sampler.steps,
        seed=task.config.seed,
        device=task.conditions.device.type,
        base_reused=outputs["before"].reused,
        sampler=asdict(task.how.sampler),
        measure=measure(judged),
        judges=tuple(judging.names),
        repeats=settings.repeats,
        slices=slices(judged, task.canvas),
    )
    return EvaluationResult.from_json(result.to_json())  # as it is read: finite numbers


def _shorten(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}..."

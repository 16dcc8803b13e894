"""Evaluate the base and the tuned model on held-out rows."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig
from canvastune.data.files import FORGETTING
from canvastune.data.packing import Example
from canvastune.errors import UserError
from canvastune.evaluation.answer_cache import AnswerCache
from canvastune.evaluation.base_results import BaseResults
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
    generate_answers,
    hash_questions,
    response_ends,
    select_questions,
    software_versions,
)
from canvastune.evaluation.judges import Judging
from canvastune.evaluation.ranks import Ranks
from canvastune.evaluation.result import (
    ANSWERS,
    FORGETTING_ANSWERS,
    SIDES,
    EvaluationResult,
    ModelFigures,
)
from canvastune.evaluation.validation_loss import denoising_loss, held_out_examples, mean_losses
from canvastune.io.atomic import atomic_directory, check_writable
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import to_json_text
from canvastune.io.provenance import write_provenance
from canvastune.preparation.tokenizer import load_tokenizer

_PROGRESS_SECONDS = 2.0
_LOGGED_ANSWERS = 3  # at the end; the report has all of them
_TRACED = 8  # answers whose denoising is recorded: the report has the one that took longest to form
_EXAMPLES_PER_PART = 32  # held-out examples whose loss is saved at once

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Task:
    """What both models are given."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    others: list[Question]  # of evaluate.forgetting
    how: Answering
    examples: list[Example]
    common: dict[str, str]  # what every result depends on
    device: torch.device
    canvas: int  # tokens that are denoised together

    @property
    def traced(self) -> list[str]:
        """Ids of the questions whose denoising is recorded."""
        return [question.id for question in self.questions[:_TRACED]]


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
    tokenizer = load_tokenizer(base).tokenizer
    questions = select_questions(dataset, tokenizer, settings.rows, settings.slices)
    others = select_others(config, dataset, tokenizer)
    judges: list[Judging] = []  # the first rank's

    def find_judges() -> None:
        judges.append(judging_of(config, questions, base_results))
        references = [(question.source, question.reference) for question in others]
        judges.append(Judging(settings, references, base_results))

    ranks.on_first(find_judges)  # before the models answer: a judge may be refused
    device = _device()
    model_config = read_model_config(base)
    examples = held_out_examples(dataset, config.train, model_config)
    how = answering(base, model_config, settings, response_ends(dataset))
    hashes = ranks.on_first(lambda: {path: hash_path(path) for path in (base, tuned)})
    common = {"base": hashes[base], "device": device.type, **software_versions()}
    canvas = model_config.canvas_length
    task = _Task(config, tokenizer, questions, others, how, examples, common, device, canvas)
    kept = BaseResults(base_results if ranks.is_first else None, hashes[base])
    with ranks.open_cache(cache_path or out.with_name(f".{out.name}.unfinished.jsonl")) as cache:
        if len(cache):
            logger.info(f"evaluate: resuming from {cache.path}")
        checkpoints = zip(SIDES, (base, tuned), strict=True)
        outputs = {
            side: _run_model(
                _Checkpoint(side, path, hashes[path]),
                task,
                ranks,
                _Store(cache, kept if side == SIDES[0] else None),
            )
            for side, path in checkpoints
        }
        ranks.on_first(lambda: None)  # until it has saved the last results of the others
        result = _write_result(task, judges, outputs, out, dataset, base, tuned) if judges else None
        cache.delete()
    return result


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


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
        (folder / "film.json").write_text(to_json_text(film, ensure_ascii=False), encoding="utf-8")
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
    return result


@dataclass(frozen=True)
class _Checkpoint:
    """One of the two models."""

    side: str
    path: Path
    hash: str


def _run_model(checkpoint: _Checkpoint, task: _Task, ranks: Ranks, store: _Store) -> _ModelOutput:
    """Generate one model's answers and measure its loss, reusing what the store has."""
    run = _ModelRun(checkpoint, task, ranks, store)
    seeds, others = answer_seeds(task.config), run.other_questions()
    answers = run.answer(task.questions)
    reused = store.reused
    answers |= run.answer(others)
    losses = run.losses()
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
        traces={name: answers[name, seeds[0]]["trace"] for name in task.traced},
        tokens=sum(answer["tokens"] for answer in each),
        seconds=sum(answer["seconds"] for answer in each),
        tokens_per_forward=sum(answer["tokens"] / answer["forwards"] for answer in each)
        / len(each),
        cut=sum(answer["cut"] for answer in each),
        reused=reused,
        validation_loss=loss,
        validation_loss_by_level=by_level,
    )


class _ModelRun:
    """What is asked of one model. All ranks make the same calls, and share the work."""

    def __init__(self, checkpoint: _Checkpoint, task: _Task, ranks: Ranks, store: _Store) -> None:
        self.checkpoint, self.task, self.ranks, self.store = checkpoint, task, ranks, store
        self.seeds = answer_seeds(task.config)
        self.common = {**task.common, "side": checkpoint.side, "model": checkpoint.hash}

    @functools.cached_property
    def model(self) -> Any:
        """The stock model, loaded when something is asked that the store does not have."""
        logger.info(f"evaluate: {self.checkpoint.side}: loading {self.checkpoint.path}")
        return self.ranks.load(self.checkpoint.path, self.task.device)

    def other_questions(self) -> list[Question]:
        """Return the questions of `evaluate.forgetting` that are not asked anyway."""
        known = {one.id for one in self.task.questions}
        return [one for one in self.task.others if one.id not in known]

    def answer(self, questions: Sequence[Question]) -> dict[tuple[str, int], Any]:
        """Return the answers by question id and seed."""
        task = self.task
        keys = {
            (one.id, seed): self._answer_key(one, seed) for seed in self.seeds for one in questions
        }
        answers = self._known(keys)
        line = f"{self.checkpoint.side}: {{}} of {{}} {_answered(self.seeds)}"
        progress = _Progress(line, len(keys))
        progress.add(sum(answer is not None for answer in answers.values()), 0.0)
        for seed in self.seeds:
            left = [one for one in questions if answers[one.id, seed] is None]
            # No rank takes more than its share at first.
            rows = min(task.config.evaluate.batch_size, -(-len(left) // self.ranks.count))
            traced = task.traced if seed == self.seeds[0] else ()
            work = functools.partial(self._generate, seed=seed, rows=rows, traced=traced)
            answers |= self._share_out(left, work, _Saved(self.store, keys, progress))
        return answers

    def losses(self) -> list[dict[str, Any]]:
        """Return the held-out losses, in parts."""
        count = len(self.task.examples)
        parts = {
            at: self.task.examples[at : at + _EXAMPLES_PER_PART]
            for at in range(0, count, _EXAMPLES_PER_PART)
        }
        sizes = {at: len(part) for at, part in parts.items()}
        keys = {at: self._loss_key(part) for at, part in parts.items()}
        losses = self._known(keys)
        progress = _Progress(f"{self.checkpoint.side}: {{}} of {{}} rows denoised", count)
        progress.add(sum(sizes[at] for at in parts if losses[at] is not None), 0.0)
        left = [at for at in parts if losses[at] is None]
        work = functools.partial(self._denoise, parts)
        losses |= self._share_out(left, work, _Saved(self.store, keys, progress, sizes))
        return list(losses.values())

    def _known(self, keys: Mapping[Any, dict[str, Any]]) -> dict[Any, Any]:
        """Return what the first rank's store has, or None, by the name of the key."""
        return self.ranks.on_first(
            lambda: {name: self.store.get(key) for name, key in keys.items()}
        )

    def _share_out(
        self,
        left: Sequence[Item],
        work: Callable[[Iterator[Item]], Iterator[tuple[Any, Any]]],
        saved: _Saved,
    ) -> dict[Any, Any]:
        if not left:
            return {}
        found = dict(self.ranks.share_out(left, work, saved))
        if self.ranks.is_first:  # it has its own already, and keeps those of the others too
            for name, result in found.items():
                self.store.put(saved.keys[name], result)
        return found

    def _generate(
        self, taken: Iterator[Question], *, seed: int, rows: int, traced: Collection[str]
    ) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
        task = self.task
        settings = (task.tokenizer, task.how, seed, rows, traced)
        for name, answer in generate_answers(self.model, taken, *settings):
            yield (name, seed), answer

    def _denoise(
        self, parts: Mapping[int, list[Example]], taken: Iterator[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        model = self.model  # also where this rank takes none: others may need its experts
        train = self.task.config.train
        for at in taken:
            loss = denoising_loss(
                model, parts[at], train.validation_levels, train.validation_blocks
            )
            yield at, loss

    def _answer_key(self, question: Question, seed: int) -> dict[str, Any]:
        traced = question.id in self.task.traced and seed == self.seeds[0]
        asked = {"id": question.id, "asked": question.tokens, "traced": traced}
        return {**self.common, "seed": seed, **asdict(self.task.how), **asked}

    def _loss_key(self, part: list[Example]) -> dict[str, Any]:
        train = self.task.config.train
        denoised = [[one.id, one.prefix_length, one.tokens.tolist()] for one in part]
        # With one block of each answer, the key is that of results from before there were more.
        blocks = {} if train.validation_blocks == 1 else {"blocks": train.validation_blocks}
        levels = {"levels": train.validation_levels}
        return {**self.common, **levels, **blocks, "denoised": denoised}


def select_others(
    config: RunConfig, dataset: Path, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """Return the questions of `evaluate.forgetting`, as `select_questions`; none without it."""
    settings = config.evaluate.forgetting
    if settings.source is None:
        return []
    questions = select_questions(dataset / FORGETTING, tokenizer, settings.rows)
    return [replace(question, source=settings.source) for question in questions]


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
        if self.cache.get(key) is None:
            self.cache.put(key, result)
        if self.kept is not None:
            self.kept.put(key, result)

    def save(self) -> None:
        """Write what later evaluations may use."""
        if self.kept is not None:
            self.kept.save()


@dataclass(frozen=True)
class _Saved:
    """What a rank does with each result: save it, and log the progress of all."""

    store: _Store
    keys: Mapping[Any, dict[str, Any]]
    progress: _Progress
    sizes: Mapping[Any, int] | None = None  # rows of a result, if not one

    def __call__(self, named: tuple[Any, Any], ended: int) -> None:
        name, result = named
        self.store.put(self.keys[name], result)
        rows = 1 if self.sizes is None else self.sizes[name]
        self.progress.add(ended * rows, result["seconds"])


class _Progress:
    """Logs how much is done, and how long the rest takes."""

    def __init__(self, line: str, total: int) -> None:
        self.line, self.total = line, total
        self.done, self.timed, self.seconds = 0, 0, 0.0
        self.logged = time.monotonic()

    def add(self, rows: int, seconds: float) -> None:
        self.done = min(self.done + rows, self.total)
        if seconds:
            self.timed, self.seconds = self.timed + rows, self.seconds + seconds
        now = time.monotonic()
        if not rows or not (now - self.logged > _PROGRESS_SECONDS or self.done == self.total):
            return
        self.logged = now
        left = round(self.seconds / max(1, self.timed) * (self.total - self.done))
        line = self.line.format(self.done, self.total)
        logger.info(f"evaluate: {line}, {left // 60}:{left % 60:02d} left")


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
            "evaluate.judges: the prepared data does not say which source a row is from",
            hint="Prepare the data again: an earlier version did not write it.",
        )
    return Judging(
        config.evaluate,
        [(question.source or config.data.source, question.reference) for question in questions],
        kept,
    )


def _answered(seeds: Sequence[int]) -> str:
    return "rows answered" if len(seeds) == 1 else f"rows answered, each with {len(seeds)} seeds"


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
        device=task.device.type,
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

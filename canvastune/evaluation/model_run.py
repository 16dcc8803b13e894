"""What is asked of one model of an evaluation: ranks share the work, and each result is saved."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from canvastune.config import RunConfig
from canvastune.data.packing import Example
from canvastune.evaluation.answer_cache import AnswerCache
from canvastune.evaluation.base_results import BaseResults
from canvastune.evaluation.generation import (
    Answering,
    Question,
    answer_seeds,
    generate_answers,
)
from canvastune.evaluation.ranks import Ranks
from canvastune.evaluation.validation_loss import denoising_loss

_PROGRESS_SECONDS = 2.0
_EXAMPLES_PER_PART = 32  # held-out examples whose loss is saved at once

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Checkpoint:
    """A model, and what it is called here."""

    side: str
    path: Path
    hash: str


@dataclass(frozen=True)
class Conditions:
    """What all models are asked under."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    common: dict[str, str]  # what every result depends on
    device: torch.device
    traced: tuple[str, ...] = ()  # ids of the questions whose denoising is recorded


class ModelRun:
    """What is asked of one model. All ranks make the same calls, and share the work."""

    def __init__(
        self, checkpoint: Checkpoint, conditions: Conditions, ranks: Ranks, store: Store
    ) -> None:
        self.checkpoint, self.conditions = checkpoint, conditions
        self.ranks, self.store = ranks, store
        self.seeds = answer_seeds(conditions.config)
        self.common = {**conditions.common, "side": checkpoint.side, "model": checkpoint.hash}

    @functools.cached_property
    def model(self) -> Any:
        """The stock model, loaded when something is asked that the store does not have."""
        logger.info(f"evaluate: {self.checkpoint.side}: loading {self.checkpoint.path}")
        return self.ranks.load(self.checkpoint.path, self.conditions.device)

    def answer(
        self, questions: Sequence[Question], how: Answering
    ) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the answers by question id and seed."""
        conditions = self.conditions
        keys = {
            (one.id, seed): self._answer_key(one, seed, how)
            for seed in self.seeds
            for one in questions
        }
        answers = self._known(keys)
        line = f"{self.checkpoint.side}: {{}} of {{}} {_answered(self.seeds)}"
        progress = _Progress(line, len(keys))
        progress.add(sum(answer is not None for answer in answers.values()), 0.0)
        for seed in self.seeds:
            left = [one for one in questions if answers[one.id, seed] is None]
            # No rank takes more than its share at first.
            rows = min(conditions.config.evaluate.batch_size, -(-len(left) // self.ranks.count))
            traced = conditions.traced if seed == self.seeds[0] else ()
            work = functools.partial(self._generate, how=how, seed=seed, rows=rows, traced=traced)
            answers |= self._share_out(left, work, _Saved(self.store, keys, progress))
        return answers

    def losses(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Return the losses of held-out examples, in parts."""
        count = len(examples)
        parts = {
            at: list(examples[at : at + _EXAMPLES_PER_PART])
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
        self,
        taken: Iterator[Question],
        *,
        how: Answering,
        seed: int,
        rows: int,
        traced: Collection[str],
    ) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
        settings = (self.conditions.tokenizer, how, seed, rows, traced)
        for name, answer in generate_answers(self.model, taken, *settings):
            yield (name, seed), answer

    def _denoise(
        self, parts: Mapping[int, list[Example]], taken: Iterator[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        model = self.model  # also where this rank takes none: others may need its experts
        train = self.conditions.config.train
        for at in taken:
            loss = denoising_loss(
                model, parts[at], train.validation_levels, train.validation_blocks
            )
            yield at, loss

    def _answer_key(self, question: Question, seed: int, how: Answering) -> dict[str, Any]:
        traced = question.id in self.conditions.traced and seed == self.seeds[0]
        asked = {"id": question.id, "asked": question.tokens, "traced": traced}
        return {**self.common, "seed": seed, **asdict(how), **asked}

    def _loss_key(self, part: list[Example]) -> dict[str, Any]:
        train = self.conditions.config.train
        denoised = [[one.id, one.prefix_length, one.tokens.tolist()] for one in part]
        # With one block of each answer, the key is that of results from before there were more.
        blocks = {} if train.validation_blocks == 1 else {"blocks": train.validation_blocks}
        levels = {"levels": train.validation_levels}
        return {**self.common, **levels, **blocks, "denoised": denoised}


class Store:
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

    store: Store
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


def _answered(seeds: Sequence[int]) -> str:
    return "rows answered" if len(seeds) == 1 else f"rows answered, each with {len(seeds)} seeds"


def find_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

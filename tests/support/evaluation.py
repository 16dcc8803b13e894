"""A recipe of an evaluation that takes seconds, and stand-ins for the models that it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import RunConfig, parse_config
from canvastune.config.schema import Blocks
from canvastune.evaluation import model_run, ranks
from canvastune.evaluation.generation import Question


def recipe(problems: Path, **evaluation: Any) -> RunConfig:
    """Six rows of `problems`, in batches of four; `evaluation` changes keys of its section."""
    settings = {
        "rows": 6,
        "batch_size": 4,
        "max_new_tokens": 16,
        "sampler": {"steps": 2},
    } | evaluation
    data = {"source": str(problems), "seq_length": 96, "validation_fraction": 0.3}
    return parse_config({"name": "test", "data": data, "evaluate": settings})


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[Question, str], str],
    interrupted_at: int | None = None,
) -> list[str]:
    """Replace both models by given answers and losses; return the requests, in order."""
    asked: list[str] = []
    monkeypatch.setattr(ranks, "load_stock", lambda checkpoint, _: checkpoint.name)

    def generate_answers(
        model: str, questions: Sequence[Question], *_: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for question in questions:
            if len(asked) == interrupted_at:
                raise KeyboardInterrupt
            asked.append(f"{model} {question.id}")
            answer = {"text": answers(question, model), "tokens": 10, "seconds": 0.25}
            yield question.id, answer | {"forwards": 4, "cut": model == "tuned", "trace": []}

    def denoising_loss(
        model: str, examples: Sequence[Any], levels: Sequence[float], blocks: Blocks
    ) -> dict[str, Any]:
        assert len(levels) == 5
        assert blocks == 1
        asked.append(f"{model} denoises")
        return {
            "sums": [10.0, 20.0, 30.0, 40.0, 50.0],
            "tokens": 10 if model == "base" else 20,
            "seconds": 0.5,
        }

    monkeypatch.setattr(model_run, "generate_answers", generate_answers)
    monkeypatch.setattr(model_run, "denoising_loss", denoising_loss)
    return asked

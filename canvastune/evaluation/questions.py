"""Which held-out rows are asked, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from canvastune.errors import UserError


@dataclass(frozen=True)
class Question:
    """One held-out row as the model is asked."""

    id: str
    text: str  # the prompt, as a person reads it
    tokens: list[int]  # the prompt through the chat template, header of the answer's turn included
    reference: str


def choose_questions(dataset: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Question]:
    """The first `count` held-out rows in the order of their content hash: the first rows of a file may be all of one kind.

    Raises:
        UserError: no prepared data set.
    """
    folder = dataset / "validation"
    if not (folder / "state.json").is_file():
        raise UserError(f"{dataset}: no prepared data set: expected a folder `validation` in it. Give the output of `prepare_data`")
    rows: Any = load_from_disk(str(folder))
    chosen = sorted(range(len(rows)), key=rows["id"].__getitem__)[:count]
    picked = rows.select(chosen)
    prompts = [json.loads(prompt) for prompt in picked["prompt"]]
    encoded: Any = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [
        Question(id=row["id"], text=_readable(prompt), tokens=list(tokens), reference=row["answer"])
        for row, prompt, tokens in zip(picked, prompts, encoded["input_ids"], strict=True)
    ]


def batches_of(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions of like length together: padding is computed like any other token."""
    ordered = sorted(questions, key=lambda question: (len(question.tokens), question.id))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def digest_of(questions: Sequence[Question]) -> str:
    """What two evaluations that asked the same, and expected the same, have in common."""
    asked = sorted((question.id, question.text, question.reference) for question in questions)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _readable(prompt: list[dict[str, str]]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)

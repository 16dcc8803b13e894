"""Select held-out questions and generate answers to them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from canvastune import __version__
from canvastune.checkpoint.generation_config import (
    SamplerSettings,
    read_generation_file,
    sampler_settings,
)
from canvastune.config import RunConfig
from canvastune.config.schema import EvaluateConfig
from canvastune.data.row_columns import read_columns
from canvastune.data.row_sources import read_sources
from canvastune.errors import UserError
from canvastune.evaluation.denoising_trace import select_frames
from canvastune.evaluation.held_out import open_validation, select_rows
from canvastune.evaluation.sampler import Sampler
from canvastune.evaluation.scoring import THINKING, THINKING_END
from canvastune.noise import AnswerNoise

# Special tokens that stay in an answer's text; all others are left out of it.
_VISIBLE = (THINKING, THINKING_END, "<|tool_call>", "<tool_call|>", '<|"|>')


@dataclass(frozen=True)
class Question:
    """One held-out row as the model is asked."""

    id: str
    text: str  # the prompt as plain text
    tokens: list[int]  # the prompt in the chat template, including the header of the answer's turn
    reference: str
    opening: str = ""  # what the prompt already has of the answer: the start of its thinking
    reference_tokens: int = 0  # of the prepared response, which `data.seq_length` may have cut
    source: str | None = None  # of a mixture, as the recipe names it; None: there is one source
    columns: Mapping[str, str] = field(default_factory=dict)  # values of evaluate.slices
    origin: str = ""  # file and row that it was read from: `rows.jsonl:12`


def select_questions(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, count: int, columns: Sequence[str] = ()
) -> list[Question]:
    """Return the first `count` held-out rows in `sample_order`.

    The first rows of a file may all be of one kind. A prompt's tokens are those of the prepared
    row: what training put before the response, with the row's tools and settings.

    Args:
        columns: of the data, whose values a question gets too.

    Raises:
        UserError: no prepared dataset, or one that was prepared without these columns.
    """
    rows = select_rows(dataset, count)
    sources = read_sources(dataset / "validation")
    values = read_columns(dataset / "validation", columns)
    markers = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    return [
        Question(
            id=row["id"],
            text=plain_text(json.loads(row["prompt"])),
            tokens=(tokens := list(row["input_ids"][: row["prefix_length"]])),
            reference=row["answer"],
            opening=_open_thinking(tokens, markers, tokenizer),
            reference_tokens=len(row["input_ids"]) - row["prefix_length"],
            source=sources.get(row["id"]),
            columns=values.get(row["id"], {}),
            origin=row["origin"],
        )
        for row in rows
    ]


def response_ends(dataset: Path) -> list[int]:
    """Return the last tokens of the held-out responses, at which generation has to stop.

    They end a turn, or hand over to a tool. A response that was cut does not count.

    Raises:
        UserError: as `select_questions`.
    """
    table: Any = open_validation(dataset).with_format("arrow")[:]
    complete = table["complete"].to_numpy()
    tokens = table["input_ids"].combine_chunks()
    last = tokens.values.to_numpy()[tokens.offsets.to_numpy()[1:] - 1]
    return [int(token) for token in np.unique(last[complete])]


def _open_thinking(
    tokens: list[int], markers: Mapping[int, str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the thinking that a prompt begins and leaves open; "" if there is none."""
    for place in range(len(tokens) - 1, -1, -1):
        marker = markers.get(tokens[place])
        if marker == THINKING:
            return str(tokenizer.decode(tokens[place:]))
        if marker is not None:  # the end of thinking, or of another turn
            break
    return ""


def hash_questions(questions: Sequence[Question]) -> str:
    """Return a hash that two evaluations share if their questions and references are the same."""
    asked = sorted((question.id, question.text, question.reference) for question in questions)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def plain_text(prompt: Sequence[Mapping[str, Any]]) -> str:
    """Return the messages of a prompt as text: a single user turn as it is, others with roles."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _content_text(prompt[0].get("content"))
    return "\n".join(map(_message_text, prompt))


def _message_text(message: Mapping[str, Any]) -> str:
    """Return one message: thinking and calls of a model's turn come before its content."""
    thinking = message.get("reasoning") or message.get("reasoning_content")
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    parts = [f"(thinking) {thinking}"] if thinking else []
    parts += [f"(call) {call.get('name')}({_compact(call.get('arguments'))})" for call in calls]
    if content := _content_text(message.get("content")):
        parts.append(content)
    name = f" {message['name']}" if message.get("name") else ""
    return f"{message['role']}{name}: " + "\n".join(parts)


def _content_text(content: Any) -> str:
    """Return a message's content: text, or a list of text parts; a tool's may be any value."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    return _compact(content)


def _compact(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Answering:
    """What an answer depends on apart from model, question and seed."""

    sampler: SamplerSettings
    max_new_tokens: int
    stops: tuple[int, ...]  # tokens that end an answer


def answering(base: Path, model: Any, config: EvaluateConfig, ends: Collection[int]) -> Answering:
    """Read how the base and a model tuned from it are asked.

    Args:
        base: folder of the base, whose generation_config.json counts where the recipe says nothing.
        model: its configuration, which names the token that ends an answer if the file does not.
        ends: tokens that end an answer, in addition to those that the checkpoint names.

    Raises:
        UserError: as `sampler_settings`.
    """
    stops = read_generation_file(base).stops
    if not stops:
        named = model.text_config.eos_token_id
        stops = tuple(named) if isinstance(named, list) else (named,)
    return Answering(
        sampler_settings(base, config.sampler),
        config.max_new_tokens,
        tuple(sorted({*stops, *ends})),
    )


def answer_seeds(config: RunConfig) -> list[int]:
    """Return the seeds with which each question is answered, one for each repeat."""
    return [(config.seed + repeat) % 2**63 for repeat in range(config.evaluate.repeats)]


def software_versions() -> dict[str, str]:
    """Return the versions that an answer depends on."""
    return {
        "canvastune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def generate_answers(
    model: Any,
    questions: Iterable[Question],
    tokenizer: PreTrainedTokenizerBase,
    how: Answering,
    seed: int,
    rows: int,
    traced: Collection[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each question's id and answer, in the order in which the answers end.

    An answer depends on the seed and its question, not on what is asked with it or was before.

    Args:
        questions: taken one at a time, whenever a place is free.
        rows: questions that are answered at once.
        traced: ids of the questions whose denoising is recorded.

    Yields:
        id, {"text": with the markers of thinking and of tool calls,
        "tokens": generated, including the one that ends the answer,
        "forwards": denoising steps,
        "cut": whether the answer was cut at the limit of tokens,
        "seconds": since the answer before; they add up to the time of all,
        "trace": frames, or None if the question is not traced}

    Raises:
        UserError: the device has too little memory for so many rows.
    """
    hidden = _hidden_tokens(tokenizer)
    text_config = model.config.text_config
    noise = AnswerNoise(seed, model.config.canvas_length, text_config.vocab_size)
    sampler = Sampler(
        model,
        how.sampler,
        noise,
        rows=rows,
        max_new_tokens=how.max_new_tokens,
        stops=how.stops,
        traced=traced,
    )
    by_id: dict[str, Question] = {}

    def taken() -> Iterator[Question]:
        for question in questions:
            by_id[question.id] = question
            yield question

    started = time.perf_counter()
    try:
        for answer in sampler.answer(taken()):
            question, tokens = by_id[answer.question], answer.tokens
            shown = [token for token in tokens if token not in hidden and token not in how.stops]
            now = time.perf_counter()
            trace = None
            if question.id in traced:
                trace = select_frames(answer.drafts, len(tokens), tokenizer)
            yield (
                question.id,
                {
                    "text": f"{question.opening}{tokenizer.decode(shown)}".strip(),
                    "tokens": len(tokens),
                    "forwards": answer.forwards,
                    "cut": answer.cut,
                    "seconds": now - started,
                    "trace": trace,
                },
            )
            started = now
    except torch.OutOfMemoryError:
        raise UserError(
            f"evaluate.batch_size: out of device memory with {min(rows, len(by_id))} rows",
            hint="Lower evaluate.batch_size.",
        ) from None


def _hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens that are not part of an answer's text."""
    return {
        id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in _VISIBLE
    }

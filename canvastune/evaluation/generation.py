"""Select held-out questions and generate answers to them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.denoising_trace import DenoisingTrace, select_frames

# Special tokens that stay in an answer's text; all others are left out of it.
_THINKING, _THINKING_END = "<|channel>", "<channel|>"
_VISIBLE = (_THINKING, _THINKING_END, "<|tool_call>", "<tool_call|>", '<|"|>')


@dataclass(frozen=True)
class Question:
    """One held-out row as the model is asked."""

    id: str
    text: str  # the prompt as plain text
    tokens: list[int]  # the prompt in the chat template, including the header of the answer's turn
    reference: str
    opening: str = ""  # what the prompt already has of the answer: the start of its thinking


def select_questions(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    """Return the first `count` held-out rows in the order of their content hash.

    The first rows of a file may all be of one kind. A prompt's tokens are those of the prepared
    row: what training put before the response, with the row's tools and settings.

    Raises:
        UserError: no prepared dataset.
    """
    rows = select_rows(dataset, count)
    markers = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    return [
        Question(
            id=row["id"],
            text=plain_text(json.loads(row["prompt"])),
            tokens=(tokens := list(row["input_ids"][: row["prefix_length"]])),
            reference=row["answer"],
            opening=_open_thinking(tokens, markers, tokenizer),
        )
        for row in rows
    ]


def select_rows(dataset: Path, count: int) -> Any:
    """Return the prepared rows of the questions, in their order. Raises: as `select_questions`."""
    rows = open_validation(dataset)
    return rows.select(sorted(range(len(rows)), key=rows["id"].__getitem__)[:count])


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


def open_validation(dataset: Path) -> Any:
    """Open the held-out rows of a prepared dataset. Raises: UserError, there is none."""
    folder = dataset / "validation"
    if not (folder / "state.json").is_file():
        raise UserError(
            f"{dataset}: no prepared dataset, expected a folder `validation` in it",
            hint="Use the output folder of `canvastune prepare`.",
        )
    return load_from_disk(str(folder))


def _open_thinking(
    tokens: list[int], markers: Mapping[int, str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the thinking that a prompt begins and leaves open; "" if there is none."""
    for place in range(len(tokens) - 1, -1, -1):
        marker = markers.get(tokens[place])
        if marker == _THINKING:
            return str(tokenizer.decode(tokens[place:]))
        if marker is not None:  # the end of thinking, or of another turn
            break
    return ""


def batch_questions(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Group questions of similar length into batches: padding is computed like any other token."""
    ordered = sorted(questions, key=lambda question: (len(question.tokens), question.id))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


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


def generate_answers(
    model: Any,
    batch: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    seed: int,
    traced: str | None,
    ends: Collection[int] = (),
) -> dict[str, Any]:
    """Generate answers to a batch of questions with a stock model.

    Prompts are padded on the left, which stock `generate` masks exactly, sliding layers included (a
    test compares). Generation stops when every answer of the batch has ended.

    Args:
        seed: the run's seed. The batch's own seed is derived from it and the rows of the batch, so
            it is the same before and after, whatever was generated earlier. In another batch a row
            is denoised from other noise.
        traced: id of the question whose denoising is recorded.
        ends: tokens that end an answer, in addition to those that the checkpoint names.

    Returns:
        {"texts": by question id, with the markers of thinking and of tool calls,
        "tokens": generated, including those that end an answer,
        "seconds", "tokens_per_forward": `generate`'s own figure, summed over the questions,
        "trace": frames, or None if the question is not in the batch}

    Raises:
        UserError: the device has too little memory for the batch.
    """
    stops, pad = _end_tokens(model)
    stops = sorted({*stops, *ends})
    hidden = _hidden_tokens(tokenizer)
    device = model.lm_head.weight.device
    width = max(len(question.tokens) for question in batch)
    ids = torch.tensor(
        [[pad] * (width - len(question.tokens)) + question.tokens for question in batch]
    )
    mask = torch.tensor(
        [[0] * (width - len(question.tokens)) + [1] * len(question.tokens) for question in batch]
    )
    trace = next(
        (DenoisingTrace(row) for row, question in enumerate(batch) if question.id == traced), None
    )
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(
                _batch_seed(seed, batch)
            )  # `generate` draws from the global generators
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                streamer=trace,
                max_new_tokens=config.max_new_tokens,
                max_denoising_steps=config.max_denoising_steps,
                eos_token_id=stops,
                pad_token_id=pad,
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"evaluate.batch_size: out of device memory with a batch of {len(batch)} rows",
            hint="Lower evaluate.batch_size.",
        ) from None
    texts, lengths = {}, []
    for question, generated in zip(batch, output.sequences[:, width:].tolist(), strict=True):
        end = next(
            (position for position, token in enumerate(generated) if token in stops), len(generated)
        )
        shown = [token for token in generated[:end] if token not in hidden]
        texts[question.id] = f"{question.opening}{tokenizer.decode(shown)}".strip()
        lengths.append(min(end + 1, len(generated)))
    return {
        "texts": texts,
        "tokens": sum(lengths),
        "seconds": time.perf_counter() - started,
        "tokens_per_forward": float(output.tokens_per_forward.sum()),
        "trace": None if trace is None else select_frames(trace, lengths[trace.row], tokenizer),
    }


def _hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens that are not part of an answer's text."""
    return {
        id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in _VISIBLE
    }


def _end_tokens(model: Any) -> tuple[list[int], int]:
    """Return the tokens that end an answer and the padding token.

    They are the generation config's or, where it has none, the model configuration's.
    """
    stops, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    text = model.config.text_config
    stops = text.eos_token_id if stops is None else stops
    pad = text.pad_token_id if pad is None else pad
    return stops if isinstance(stops, list) else [stops], pad or 0


def _batch_seed(seed: int, batch: Sequence[Question]) -> int:
    # 32 bits: torch's CPU generator ignores the rest.
    text = "\0".join([str(seed), *(question.id for question in batch)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

"""Select held-out questions and generate answers to them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.denoising_trace import DenoisingTrace, select_frames


@dataclass(frozen=True)
class Question:
    """One held-out row as the model is asked."""

    id: str
    text: str  # the prompt as plain text
    tokens: list[int]  # the prompt in the chat template, including the header of the answer's turn
    reference: str


def select_questions(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    """Return the first `count` held-out rows in the order of their content hash.

    The first rows of a file may all be of one kind.

    Raises:
        UserError: no prepared dataset.
    """
    folder = dataset / "validation"
    if not (folder / "state.json").is_file():
        raise UserError(
            f"{dataset}: no prepared dataset, expected a folder `validation` in it",
            hint="Use the output folder of `canvastune prepare`.",
        )
    rows: Any = load_from_disk(str(folder))
    chosen = sorted(range(len(rows)), key=rows["id"].__getitem__)[:count]
    picked = rows.select(chosen)
    prompts = [json.loads(prompt) for prompt in picked["prompt"]]
    encoded: Any = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return [
        Question(
            id=row["id"], text=_plain_text(prompt), tokens=list(tokens), reference=row["answer"]
        )
        for row, prompt, tokens in zip(picked, prompts, encoded["input_ids"], strict=True)
    ]


def batch_questions(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Group questions of similar length into batches: padding is computed like any other token."""
    ordered = sorted(questions, key=lambda question: (len(question.tokens), question.id))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def hash_questions(questions: Sequence[Question]) -> str:
    """Return a hash that two evaluations share if their questions and references are the same."""
    asked = sorted((question.id, question.text, question.reference) for question in questions)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _plain_text(prompt: list[dict[str, str]]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def generate_answers(
    model: Any,
    batch: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    seed: int,
    traced: str | None,
) -> dict[str, Any]:
    """Generate answers to a batch of questions with a stock model.

    Prompts are padded on the left, which stock `generate` masks exactly, sliding layers included (a
    test compares). Generation stops when every answer of the batch has ended.

    Args:
        seed: the run's seed. The batch's own seed is derived from it and the rows of the batch, so
            it is the same before and after, whatever was generated earlier. In another batch a row
            is denoised from other noise.
        traced: id of the question whose denoising is recorded.

    Returns:
        {"texts": by question id, "tokens": generated, including those that end an answer,
        "seconds", "tokens_per_forward": `generate`'s own figure, summed over the questions,
        "trace": frames, or None if the question is not in the batch}

    Raises:
        UserError: the device has too little memory for the batch.
    """
    stops, pad = _end_tokens(model)
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
        texts[question.id] = str(
            tokenizer.decode(generated[:end], skip_special_tokens=True)
        ).strip()
        lengths.append(min(end + 1, len(generated)))
    return {
        "texts": texts,
        "tokens": sum(lengths),
        "seconds": time.perf_counter() - started,
        "tokens_per_forward": float(output.tokens_per_forward.sum()),
        "trace": None if trace is None else select_frames(trace, lengths[trace.row], tokenizer),
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

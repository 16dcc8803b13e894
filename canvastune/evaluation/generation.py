"""Which held-out rows are asked, and how."""

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
from canvastune.evaluation.denoising_trace import DenoisingTrace, frames_of


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


def answer(
    model: Any, batch: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, seed: int, filmed: str | None
) -> dict[str, Any]:
    """Answer a batch of questions with a stock model.

    Prompts are padded on the left, which stock `generate` masks exactly, sliding layers included (a test compares). It stops when
    every answer of the batch has ended.

    Args:
        seed: the run's. The batch is denoised from a seed made of it and of the batch's rows: the same before and after, and whatever
            was answered earlier. In another batch a row is denoised from other noise.
        filmed: id of the question whose denoising is kept.

    Returns:
        {"texts": by the question's id, "tokens": generated, those that end an answer included, "seconds",
        "tokens_per_forward": sum over the questions, of `generate`'s own count, "film": frames, or None where it is not in the batch}

    Raises:
        UserError: the device has too little memory for the batch.
    """
    stops, pad = _end_tokens(model)
    device = model.lm_head.weight.device
    width = max(len(question.tokens) for question in batch)
    ids = torch.tensor([[pad] * (width - len(question.tokens)) + question.tokens for question in batch])
    mask = torch.tensor([[0] * (width - len(question.tokens)) + [1] * len(question.tokens) for question in batch])
    drafts = next((DenoisingTrace(row) for row, question in enumerate(batch) if question.id == filmed), None)
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(seed, batch))  # `generate` draws from the global generators
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                streamer=drafts,
                max_new_tokens=config.max_new_tokens,
                max_denoising_steps=config.max_denoising_steps,
                eos_token_id=stops,
                pad_token_id=pad,
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"evaluate.batch_size: {len(batch)} rows at once do not fit beside the model in the device's memory. Lower evaluate.batch_size"
        ) from None
    texts, lengths = {}, []
    for question, generated in zip(batch, output.sequences[:, width:].tolist(), strict=True):
        end = next((position for position, token in enumerate(generated) if token in stops), len(generated))
        texts[question.id] = str(tokenizer.decode(generated[:end], skip_special_tokens=True)).strip()
        lengths.append(min(end + 1, len(generated)))
    return {
        "texts": texts,
        "tokens": sum(lengths),
        "seconds": time.perf_counter() - started,
        "tokens_per_forward": float(output.tokens_per_forward.sum()),
        "film": None if drafts is None else frames_of(drafts, lengths[drafts.row], tokenizer),
    }


def _end_tokens(model: Any) -> tuple[list[int], int]:
    """(tokens that end an answer, the padding token) of a checkpoint: its generation config's, else its configuration's."""
    stops, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    text = model.config.text_config
    stops = text.eos_token_id if stops is None else stops
    pad = text.pad_token_id if pad is None else pad
    return stops if isinstance(stops, list) else [stops], pad or 0


def _seed(seed: int, batch: Sequence[Question]) -> int:
    # 32 bits: torch's CPU generator ignores the rest.
    digest = hashlib.blake2b("\0".join([str(seed), *(question.id for question in batch)]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")

"""A batch of questions answered by a stock model, with stock `generate()`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from canvastune.config import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.film import Drafts, frames_of
from canvastune.evaluation.questions import Question


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
    drafts = next((Drafts(row) for row, question in enumerate(batch) if question.id == filmed), None)
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

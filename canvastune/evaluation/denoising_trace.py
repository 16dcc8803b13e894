"""The denoising trace: what the canvas holds after each denoising step of one answer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_MAX_FRAMES, _MAX_BLOCKS = 8, 4  # frames of a block, blocks of an answer: what fits on a page


class DenoisingTrace:
    """A streamer for stock `generate` that records the drafts of one row of the batch.

    A draft is the most likely token at each position: the canvas if denoising ended there.
    """

    def __init__(self, row: int) -> None:
        self.row = row
        self.blocks: list[list[list[int]]] = []  # token ids, by block, step and position
        # Drafts of the block that is being denoised; None until the prompt has been streamed.
        self._current: list[list[int]] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then each finished block."""
        if self._current is not None:
            self.blocks.append(self._current)
        self._current = []

    def put_draft(self, value: torch.Tensor) -> None:
        """Record the canvas after a denoising step, int64[B, C]."""
        assert self._current is not None
        self._current.append(value[self.row].tolist())

    def end(self) -> None:
        """Do nothing: the last block came through `put`."""


def select_frames(
    trace: DenoisingTrace, length: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return the frames to keep: {"block", "step", "tokens": [[text, changed], ...]}.

    `changed` is 1 if the token differs from the frame before, otherwise 0; all tokens of a block's
    first frame are new. The last frame of a block is the block's part of the answer and stops where
    the answer ends; the others show the whole canvas.

    Args:
        length: tokens of the answer, including the one that ends it.
    """
    frames = []
    for block, steps in enumerate(trace.blocks[:_MAX_BLOCKS]):
        if length <= 0:
            break
        before: list[int] = []
        kept = _select_steps(steps)
        for step in kept:
            tokens = steps[step][:length] if step == kept[-1] else steps[step]
            changed = [
                int(not before or token != before[place]) for place, token in enumerate(tokens)
            ]
            texts = [str(tokenizer.decode([token])) for token in tokens]
            pairs = [list(pair) for pair in zip(texts, changed, strict=True)]
            frames.append({"block": block, "step": step, "tokens": pairs})
            before = tokens
        length -= len(steps[-1])
    return frames


def _select_steps(steps: list[list[int]]) -> list[int]:
    """Return the first step, the first with the block's last state, and evenly spaced ones."""
    last = len(steps) - 1
    while last and steps[last - 1] == steps[-1]:  # other rows of the batch took more steps
        last -= 1
    count = min(_MAX_FRAMES, last + 1)
    return [round(index * last / max(1, count - 1)) for index in range(count)]

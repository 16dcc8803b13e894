"""How one answer forms: what the canvas holds after each denoising step, few enough frames for a page."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_FRAMES, _BLOCKS = 8, 4  # at most: frames of a block, blocks of an answer


class DenoisingTrace:
    """A streamer for stock `generate`, which keeps the drafts of one row of the batch.

    A draft is the likeliest token of each place: what the canvas would be if denoising ended there.
    """

    def __init__(self, row: int) -> None:
        self.row = row
        self.blocks: list[list[list[int]]] = []  # token ids, by block, step and place
        self._begun: list[list[int]] | None = None  # of the block that is being denoised; None before the prompt has come by

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then each block when it is done."""
        if self._begun is not None:
            self.blocks.append(self._begun)
        self._begun = []

    def put_draft(self, value: torch.Tensor) -> None:
        """int64[B, C]: the canvas after a denoising step."""
        assert self._begun is not None
        self._begun.append(value[self.row].tolist())

    def end(self) -> None:
        """Nothing is left to be done."""


def frames_of(drafts: DenoisingTrace, length: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The frames that are kept: {"block", "step", "tokens": [[text, 1 if it differs from the frame before, else 0], ...]}.

    The last frame of a block is the block's part of the answer, and ends with it; the others show the whole canvas. In the first frame of
    a block all is new.

    Args:
        length: tokens of the answer, the one that ends it included.
    """
    frames = []
    for block, steps in enumerate(drafts.blocks[:_BLOCKS]):
        if length <= 0:
            break
        before: list[int] = []
        kept = _spread(steps)
        for step in kept:
            tokens = steps[step][:length] if step == kept[-1] else steps[step]
            changed = [int(not before or token != before[place]) for place, token in enumerate(tokens)]
            texts = [str(tokenizer.decode([token])) for token in tokens]
            frames.append({"block": block, "step": step, "tokens": [list(pair) for pair in zip(texts, changed, strict=True)]})
            before = tokens
        length -= len(steps[-1])
    return frames


def _spread(steps: list[list[int]]) -> list[int]:
    """The first step, the one that reaches the block's end state, and evenly spread ones between."""
    last = len(steps) - 1
    while last and steps[last - 1] == steps[-1]:  # other rows of the batch went on
        last -= 1
    count = min(_FRAMES, last + 1)
    return [round(index * last / max(1, count - 1)) for index in range(count)]

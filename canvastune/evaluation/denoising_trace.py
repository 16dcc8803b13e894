"""The denoising trace: what the canvas holds after each denoising step of one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_MAX_FRAMES, _MAX_BLOCKS = 8, 4  # frames of a block, blocks of an answer: what fits on a page


def select_frames(
    drafts: Sequence[Sequence[list[int]]], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return the frames to keep: {"block", "step", "tokens": [[text, changed], ...]}.

    `changed` is 1 if the token differs from the frame before, otherwise 0; all tokens of a block's
    first frame are new. The last frame of a block is the block's part of the answer and stops where
    the answer ends; the others show the whole canvas.

    Args:
        drafts: the likeliest token of each place, by block and denoising step.
        length: tokens of the answer, including the one that ends it.
    """
    frames = []
    for block, steps in enumerate(drafts[:_MAX_BLOCKS]):
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


def longest_trace(*models: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Return the id of the answer that took longest to form: of many, most hardly change.

    Args:
        models: each model's frames by answer; the first model decides, the next one of equals.
    """

    def changes(frames: Sequence[dict[str, Any]]) -> tuple[int, int]:
        later = [frame for frame in frames if frame["step"] > 0]
        return len(later), sum(changed for frame in later for _, changed in frame["tokens"])

    return max(models[0], key=lambda name: [changes(frames[name]) for frames in models])


def _select_steps(steps: Sequence[list[int]]) -> list[int]:
    """Return the first step, the first with the block's last state, and evenly spaced ones."""
    last = len(steps) - 1
    while last and steps[last - 1] == steps[-1]:  # until the block was stable long enough
        last -= 1
    count = min(_MAX_FRAMES, last + 1)
    return [round(index * last / max(1, count - 1)) for index in range(count)]

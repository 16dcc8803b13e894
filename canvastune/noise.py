"""Every random draw of a step, from (run seed, position of the example in the stream) alone (objective.md section 3)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Draws:
    """What chance decides for one example. C is the canvas length; the last block of a cut response uses fewer of the C draws."""

    block: int  # index of the denoised response block
    level: float  # corruption level t, in float32
    corrupted: torch.Tensor  # bool[C]: positions whose token is replaced
    replacement: torch.Tensor  # int64[C]: uniform over the whole vocabulary
    self_condition: bool  # whether the example is denoised twice


def training_draws(
    seed: int,
    position: int,
    *,
    blocks: int,
    canvas_length: int,
    vocab_size: int,
    min_corruption: float,
    self_conditioning_probability: float,
) -> Draws:
    """Draw the noise of the example at `position` of the global shuffled stream, the same on any number of ranks."""
    generator = _generator("train", seed, position)
    block, uniform, coin = generator.random(3, dtype=np.float32)
    level = np.float32(min_corruption) + np.float32(1 - min_corruption) * uniform
    return Draws(
        block=_index(block, blocks),
        level=float(level),
        corrupted=torch.from_numpy(generator.random(canvas_length, dtype=np.float32) < level),
        replacement=torch.from_numpy(generator.integers(0, vocab_size, canvas_length)),
        self_condition=bool(coin < self_conditioning_probability),
    )


def self_conditioning_coin(seed: int, position: int, probability: float) -> bool:
    """The coin of `training_draws` alone: every rank knows every example's coin without asking, so ranks agree on running pass 1."""
    return bool(_generator("train", seed, position).random(3, dtype=np.float32)[2] < probability)


def validation_draws(example_id: str, level: float, *, blocks: int, canvas_length: int, vocab_size: int) -> Draws:
    """Draw fixed noise for a held-out example, from its id alone: the same block and the same uniform variates at every level.

    A position corrupted at one level is corrupted at every higher one, so the curves differ by the level and not by luck.
    Never self-conditioned: validation measures the first denoising pass.
    """
    generator = _generator("validation", example_id)
    block = np.float32(generator.random(dtype=np.float32))
    return Draws(
        block=_index(block, blocks),
        level=float(np.float32(level)),
        corrupted=torch.from_numpy(generator.random(canvas_length, dtype=np.float32) < np.float32(level)),
        replacement=torch.from_numpy(generator.integers(0, vocab_size, canvas_length)),
        self_condition=False,
    )


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """int64[rows]: the order in which an epoch visits the rows."""
    return _generator("order", seed, epoch).permutation(rows)


def weight_generator(seed: int, name: str) -> torch.Generator:
    """A generator for the initial value of one new weight (an adapter's factor), independent of ranks and of other weights."""
    return torch.Generator().manual_seed(int.from_bytes(_digest("weight", seed, name)[:4], "little"))


def _index(uniform: np.float32, count: int) -> int:
    # A float32 below 1 times a count can round up to the count itself.
    return min(int(uniform * np.float32(count)), count - 1)


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(str(part) for part in parts).encode(), digest_size=16).digest()


def _generator(*parts: object) -> np.random.Generator:
    # Philox takes the whole 128-bit key. torch's CPU generator ignores the high bits of a seed, which couples the draws of
    # different examples: in the reference recipe that tied the self-conditioning coin to the block index.
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(*parts), "little")))

"""Every random draw of a step, from only the run seed and the example's position in the stream
(objective.md section 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

# 2^64 and 2^32 over the golden ratio, as signed integers.
_GOLDEN, _GOLDEN_32 = 0x9E3779B97F4A7C15 - 2**64, 0x9E3779B9 - 2**32


@dataclass(frozen=True)
class NoiseSample:
    """The random draws of one block of an example. C is the canvas length; the last block of a cut
    response uses fewer of the C draws.
    """

    block: int  # index of the denoised response block
    level: float  # corruption level t, in float32
    corrupted: torch.Tensor  # bool[C]: positions whose token is replaced
    replacement: torch.Tensor  # int64[C]: uniform over the whole vocabulary
    self_condition: bool  # whether the block is denoised twice
    dropout_key: int | None  # of the adapters' dropout, 64 bits, of the example; None: no dropout
    order: int = 0  # how many blocks of the example were drawn before this one


def training_block_draws(
    seed: int,
    position: int,
    count: int,
    *,
    blocks: int,
    canvas_length: int,
    vocab_size: int,
    min_corruption: float,
    self_conditioning_probability: float,
) -> tuple[NoiseSample, ...]:
    """Draw `count` distinct blocks of an example, or all of them if it has fewer, each with its own
    noise; in the order of the blocks.

    A larger count adds blocks to those of a smaller one, and changes no draw of theirs.
    """

    def draw(order: int, block: int, coin: np.float32) -> NoiseSample:
        # The first block's noise continues the stream that its block and coin were drawn from.
        generator = _generator("train", seed, position, *((block,) if order else ()))
        uniform = generator.random(3, dtype=np.float32)[1]
        level = np.float32(min_corruption) + np.float32(1 - min_corruption) * uniform
        return NoiseSample(
            block=block,
            level=float(level),
            corrupted=torch.from_numpy(generator.random(canvas_length, dtype=np.float32) < level),
            replacement=torch.from_numpy(generator.integers(0, vocab_size, canvas_length)),
            self_condition=bool(coin < self_conditioning_probability),
            dropout_key=_key("dropout", seed, position),
            order=order,
        )

    chosen = _draw_blocks(seed, position, blocks, count)
    samples = [draw(order, block, coin) for order, (block, coin) in enumerate(chosen)]
    return tuple(sorted(samples, key=lambda sample: sample.block))


def drawn_blocks(
    seed: int, position: int, count: int, *, blocks: int, probability: float
) -> list[tuple[int, bool]]:
    """Return each block of `training_block_draws`, and whether it is denoised twice."""
    chosen = sorted(_draw_blocks(seed, position, blocks, count))
    return [(block, bool(coin < probability)) for block, coin in chosen]


def validation_block_draws(
    example_id: str,
    level: float,
    count: int,
    *,
    blocks: int,
    canvas_length: int,
    vocab_size: int,
) -> tuple[NoiseSample, ...]:
    """Draw fixed noise for `count` distinct blocks of a held-out example from its id, or for all of
    them if it has fewer; in the order of the blocks.

    The blocks and the uniform variates are the same at every level. A position corrupted at one
    level is corrupted at every higher one, so curves differ by the level only. Never
    self-conditioned: validation measures the first denoising pass. No dropout either. A larger count
    adds blocks to those of a smaller one, and changes no draw of theirs.
    """

    def draw(order: int, block: int) -> NoiseSample:
        # The first block's noise continues the stream that the block was drawn from.
        generator = _generator("validation", example_id, *((block,) if order else ()))
        generator.random(dtype=np.float32)
        return NoiseSample(
            block=block,
            level=float(np.float32(level)),
            corrupted=torch.from_numpy(
                generator.random(canvas_length, dtype=np.float32) < np.float32(level)
            ),
            replacement=torch.from_numpy(generator.integers(0, vocab_size, canvas_length)),
            self_condition=False,
            dropout_key=None,
            order=order,
        )

    first = _index(
        np.float32(_generator("validation", example_id).random(dtype=np.float32)), blocks
    )
    others: list[int] = []
    if min(count, blocks) > 1:
        places = _generator("validation blocks", example_id).permutation(blocks - 1)
        others = [int(place) + int(place >= first) for place in places[: count - 1]]
    samples = [draw(order, block) for order, block in enumerate((first, *others))]
    return tuple(sorted(samples, key=lambda sample: sample.block))


@dataclass(frozen=True)
class AnswerNoise:
    """What an answer is sampled with, by question, block and step; steps are counted from 1 in each
    block. It depends on nothing else: an answer is the same in any batch, on any number of devices.
    """

    seed: int
    canvas_length: int  # C
    vocab_size: int

    def start(self, question: str, block: int) -> torch.Tensor:
        """Return the canvas that a block starts from, int64[C]."""
        return self.renoise(question, block, 0)

    def uniforms(self, question: str, block: int, step: int) -> torch.Tensor:
        """Return what chooses each place's token by its cumulative probability, float64[C] in [0, 1)."""
        generator = _generator("answer", self.seed, question, block, step, "choice")
        return torch.from_numpy(generator.random(self.canvas_length))

    def renoise(self, question: str, block: int, step: int) -> torch.Tensor:
        """Return uniform tokens for places that the step does not accept, int64[C]."""
        generator = _generator("answer", self.seed, question, block, step, "canvas")
        return torch.from_numpy(generator.integers(0, self.vocab_size, self.canvas_length))


def epoch_order(seed: int, epoch: int, rows: int, source: int = 0) -> np.ndarray:
    """Return int64[rows]: the order in which an epoch of a source visits its rows."""
    parts = ("order", seed, epoch, source) if source else ("order", seed, epoch)
    return _generator(*parts).permutation(rows)


def weight_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator for the initial value of one new weight, independent of ranks and of
    other weights.
    """
    return torch.Generator().manual_seed(
        int.from_bytes(_digest("weight", seed, name)[:4], "little")
    )


def dropout_row_keys(
    dropout_key: int, clean: int, canvas: int, canvas_before: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a key for each row of one example: int64[clean] and int64[canvas], all different.

    Args:
        canvas_before: rows of the example's canvases that were drawn before this one.
    """
    clean_places = 2 * torch.arange(clean)
    canvas_places = 2 * torch.arange(canvas_before, canvas_before + canvas) + 1
    return _mix64(clean_places * _GOLDEN + dropout_key), _mix64(
        canvas_places * _GOLDEN + dropout_key
    )


def dropout_module_key(name: str) -> int:
    """Return the key of one module's dropout."""
    return _key("dropout", name)


def dropout_mask(
    row_keys: torch.Tensor, features: int, module_key: int, probability: float
) -> torch.Tensor:
    """Return bool[rows, features]: what a module drops of rows with these keys, int64[rows]; the
    same on every device.

    A counter-based generator: 32 bits of a hash of (row, module, feature). It has no state, so the
    order of calls does not matter.
    """
    keys = _mix64(row_keys ^ module_key)
    low, high = keys.view(torch.int32).view(-1, 2).split(1, dim=1)
    places = torch.arange(features, dtype=torch.int32, device=row_keys.device) * _GOLDEN_32
    bits = _mix32_(_mix32_(low + places).bitwise_xor_(high))
    return bits < round(probability * 2**32) - 2**31


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood, 2014), elementwise on int64 that
    wraps around.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ _shift_right(x, shift, 64)) * factor
    return x ^ _shift_right(x, 31, 64)


def _mix32_(x: torch.Tensor) -> torch.Tensor:
    """Apply a low-bias finalizer (C. Wellons, lowbias32), in place on int32 that wraps around."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_(_shift_right(x, shift, 32)).mul_(factor)
    return x.bitwise_xor_(_shift_right(x, 16, 32))


def _shift_right(x: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Return x >> count as for an unsigned integer."""
    return (x >> count).bitwise_and_(2 ** (bits - count) - 1)


def _draw_blocks(seed: int, position: int, blocks: int, count: int) -> list[tuple[int, np.float32]]:
    """Return `count` distinct blocks, or all, in the order in which they are drawn, each with the
    uniform variate of its self-conditioning coin.
    """
    uniform, _, coin = _generator("train", seed, position).random(3, dtype=np.float32)
    first = _index(uniform, blocks)
    drawn = [(first, coin)]
    if min(count, blocks) > 1:
        generator = _generator("blocks", seed, position)
        coins = generator.random(blocks, dtype=np.float32)
        for other in generator.permutation(blocks - 1)[: count - 1]:
            block = int(other) + int(other >= first)
            drawn.append((block, coins[block]))
    return drawn


def _index(uniform: np.float32, count: int) -> int:
    # A float32 below 1 times a count can round up to the count itself.
    return min(int(uniform * np.float32(count)), count - 1)


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(str(part) for part in parts).encode(), digest_size=16).digest()


def _key(*parts: object) -> int:
    return int.from_bytes(_digest(*parts)[:8], "little", signed=True)


def _generator(*parts: object) -> np.random.Generator:
    # Philox takes the whole 128-bit key. torch's CPU generator ignores the high bits of a seed,
    # which couples the draws of different examples: in the reference recipe, self-conditioning then
    # depends on the block index.
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(*parts), "little")))

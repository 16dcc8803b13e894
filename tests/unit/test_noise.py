"""objective.md section 3: the draws of a step, their independence, and what they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import torch

from canvastune.noise import (
    NoiseSample,
    drawn_blocks,
    epoch_order,
    training_block_draws,
    validation_block_draws,
)

COUNT, BLOCKS, CANVAS, VOCABULARY = 20_000, 8, 4, 64
SOME = 8_000


def draw(position: int, seed: int = 7, blocks: int = BLOCKS, canvas: int = CANVAS) -> NoiseSample:
    return training_block_draws(
        seed,
        position,
        1,
        blocks=blocks,
        canvas_length=canvas,
        vocab_size=VOCABULARY,
        min_corruption=0.001,
        self_conditioning_probability=0.5,
    )[0]


def draw_blocks(
    position: int, count: int, seed: int = 7, blocks: int = BLOCKS
) -> tuple[NoiseSample, ...]:
    return training_block_draws(
        seed,
        position,
        count,
        blocks=blocks,
        canvas_length=CANVAS,
        vocab_size=VOCABULARY,
        min_corruption=0.001,
        self_conditioning_probability=0.5,
    )


def same(one: NoiseSample, other: NoiseSample) -> bool:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def chi_square_is_plausible(observed: np.ndarray, expected: np.ndarray) -> bool:
    """Within five standard deviations of a chi-square with as many degrees of freedom as cells."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return abs(statistic - observed.size) < 5 * np.sqrt(2 * observed.size)


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draws = [draw(position) for position in range(COUNT)]
    block = np.array([d.block for d in draws])
    level = np.array([d.level for d in draws])
    coin = np.array([d.self_condition for d in draws])
    corrupted = np.stack([d.corrupted.numpy() for d in draws])
    replacement = np.stack([d.replacement.numpy() for d in draws])
    return block, level, coin, corrupted, replacement


def test_noise_depends_on_seed_and_position_alone() -> None:
    assert same(draw(123), draw(123))
    assert not same(draw(123), draw(124))
    assert not same(draw(123), draw(123, seed=8))
    assert not same(draw(123), draw(123, seed=7 + 2**32)), "the high bits of the seed do not count"


def test_the_coin_alone_is_the_coin_of_the_draws_whatever_the_example() -> None:
    for position in range(200):
        assert (
            drawn_blocks(7, position, 1, blocks=1, probability=0.5)[0][1]
            == draw(position).self_condition
            == draw(position, blocks=1, canvas=16).self_condition
        )


def test_the_four_draws_are_uniform_and_independent_of_each_other_and_between_examples() -> None:
    block, level, coin, corrupted, replacement = sample()
    assert chi_square_is_plausible(
        np.bincount(block, minlength=BLOCKS), np.full(BLOCKS, COUNT / BLOCKS)
    ), "blocks are not uniform"
    deciles = np.floor((level - 0.001) / 0.999 * 10).astype(int).clip(0, 9)
    assert level.min() >= 0.001
    assert level.max() <= 1
    assert chi_square_is_plausible(np.bincount(deciles, minlength=10), np.full(10, COUNT / 10)), (
        "levels are not uniform on (eps, 1)"
    )
    assert abs(coin.mean() - 0.5) < 5 * 0.5 / np.sqrt(COUNT)
    assert chi_square_is_plausible(
        np.bincount(replacement.ravel(), minlength=VOCABULARY),
        np.full(VOCABULARY, replacement.size / VOCABULARY),
    )
    # The reference recipe's flaw: the coin decided by the block.
    for name, factor in {
        "block": block,
        "level": deciles,
        "next example's block": np.roll(block, 1),
    }.items():
        table = np.zeros((factor.max() + 1, 2))
        np.add.at(table, (factor, coin.astype(int)), 1)
        assert chi_square_is_plausible(table, np.outer(table.sum(1), table.sum(0)) / COUNT), (
            f"the coin depends on the {name}"
        )
    table = np.zeros((BLOCKS, 10))
    np.add.at(table, (block, deciles), 1)
    assert chi_square_is_plausible(table, np.outer(table.sum(1), table.sum(0)) / COUNT), (
        "the level depends on the block"
    )
    for name, left, right in [
        ("neighboring levels", level[1:], level[:-1]),
        ("neighboring coins", coin[1:], coin[:-1]),
        (
            "neighboring positions' corruption given t",
            corrupted[:, 0] - level,
            corrupted[:, 1] - level,
        ),
    ]:
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(COUNT), f"{name} are correlated"


def test_one_block_is_drawn_as_before_there_were_several() -> None:
    """The digest is that of the draws of earlier versions: their runs must resume unchanged."""
    digest = hashlib.sha256()
    for position in range(64):
        d = draw(position, blocks=1 + position % 11, canvas=8)
        drawn = (d.block, d.level, d.corrupted.tolist(), d.replacement.tolist())
        digest.update(repr((*drawn, d.self_condition, d.dropout_key)).encode())
    assert digest.hexdigest() == "cbd4a3b2b19279e24d96a200eee7fee0dae1c39da2779dcf55fec997ae695dee"


def test_more_blocks_keep_the_draws_of_fewer() -> None:
    for position in range(200):
        everything = {d.block: d for d in draw_blocks(position, BLOCKS)}
        assert list(everything) == list(range(BLOCKS)), "not each block once, in their order"
        assert same(draw(position), draw_blocks(position, 1)[0])
        for count in range(1, BLOCKS):
            fewer = draw_blocks(position, count)
            assert [d.block for d in fewer] == sorted({d.block for d in fewer})
            assert len(fewer) == count
            assert sorted(d.order for d in fewer) == list(range(count))
            assert all(same(d, everything[d.block]) for d in fewer)
        assert len(draw_blocks(position, 99)) == BLOCKS, "an example with fewer blocks has them all"
        assert [d.block for d in draw_blocks(position, 3, blocks=1)] == [0]


def test_blocks_and_coins_are_known_without_the_noise() -> None:
    for position in range(200):
        for count in (1, 3, BLOCKS):
            found = drawn_blocks(7, position, count, blocks=BLOCKS, probability=0.5)
            assert found == [(d.block, d.self_condition) for d in draw_blocks(position, count)]


def test_blocks_are_drawn_without_replacement_uniformly_and_independent_of_their_noise() -> None:
    count = 3
    draws = [draw_blocks(position, count) for position in range(SOME)]
    chosen = Counter(tuple(d.block for d in own) for own in draws)
    sets = BLOCKS * (BLOCKS - 1) * (BLOCKS - 2) // 6
    assert len(chosen) == sets
    assert chi_square_is_plausible(np.array(list(chosen.values())), np.full(sets, SOME / sets)), (
        "sets of blocks are not equally likely"
    )
    by_order = [sorted(own, key=lambda d: d.order) for own in draws]
    ordered = Counter((own[1].block, own[2].block) for own in by_order)
    pairs = BLOCKS * (BLOCKS - 1)
    assert chi_square_is_plausible(
        np.array(list(ordered.values())), np.full(pairs, SOME / pairs)
    ), "later blocks are not drawn uniformly"
    level = np.array([[d.level for d in own] for own in by_order])
    deciles = np.floor((level - 0.001) / 0.999 * 10).astype(int).clip(0, 9)
    coin = np.array([[d.self_condition for d in own] for own in by_order]).astype(int)
    block = np.array([[d.block for d in own] for own in by_order])
    corrupted = np.array([[d.corrupted[0] for d in own] for own in by_order])
    replacement = np.array([[d.replacement[0] for d in own] for own in by_order])
    for order in range(count):
        assert chi_square_is_plausible(
            np.bincount(deciles[:, order], minlength=10), np.full(10, SOME / 10)
        ), f"levels of block {order} are not uniform"
        assert abs(coin[:, order].mean() - 0.5) < 5 * 0.5 / np.sqrt(SOME)
        assert abs((corrupted[:, order] - level[:, order]).mean()) < 5 * 0.5 / np.sqrt(SOME)
        for name, factor in {"block": block, "level": deciles}.items():
            table = np.zeros((factor.max() + 1, 2))
            np.add.at(table, (factor[:, order], coin[:, order]), 1)
            assert chi_square_is_plausible(table, np.outer(table.sum(1), table.sum(0)) / SOME), (
                f"the coin of block {order} depends on its {name}"
            )
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for name, values in (
            ("levels", level),
            ("coins", coin),
            ("corruption given t", corrupted - level),
            ("replacements", replacement),
        ):
            found = np.corrcoef(values[:, one], values[:, other])[0, 1]
            assert abs(found) < 5 / np.sqrt(SOME), f"{name} of two blocks are correlated"


def test_a_position_is_corrupted_with_probability_t() -> None:
    _, level, _, corrupted, _ = sample()
    assert abs((corrupted - level[:, None]).mean()) < 5 * 0.5 / np.sqrt(corrupted.size)
    low = corrupted[level < 0.2].mean()
    assert 0.08 < low < 0.12, "positions are not corrupted with probability t at low levels"


def test_a_replacement_may_equal_any_token_of_the_vocabulary() -> None:
    assert set(np.unique(sample()[4])) == set(range(VOCABULARY))


def test_validation_noise_depends_on_the_example_alone_and_grows_with_the_level() -> None:
    sizes = {"blocks": 3, "canvas_length": 64, "vocab_size": VOCABULARY}
    (low,), (high,) = (validation_block_draws("abc", level, 1, **sizes) for level in (0.3, 0.7))
    assert same(low, *validation_block_draws("abc", 0.3, 1, **sizes))
    assert not same(low, *validation_block_draws("abd", 0.3, 1, **sizes))
    assert low.block == high.block
    assert torch.equal(low.replacement, high.replacement)
    assert bool((high.corrupted | ~low.corrupted).all()), (
        "a position corrupted at t = 0.3 is clean at t = 0.7"
    )
    assert not low.self_condition
    assert low.dropout_key is None, "validation would drop inputs of the adapters"


def test_more_validation_blocks_add_to_fewer_and_change_none_of_them() -> None:
    sizes = {"blocks": 5, "canvas_length": 64, "vocab_size": VOCABULARY}

    def drawn(count: int, level: float = 0.3) -> dict[int, NoiseSample]:
        samples = validation_block_draws("abc", level, count, **sizes)
        assert [s.block for s in samples] == sorted({s.block for s in samples})
        return {sample.block: sample for sample in samples}

    for count in range(1, 7):
        fewer, more = drawn(count), drawn(count + 1)
        assert len(fewer) == min(count, 5)
        assert all(same(fewer[block], more[block]) for block in fewer)
    every = drawn(5)
    assert len({tuple(s.replacement.tolist()) for s in every.values()}) == 5, "blocks share noise"
    for block, high in drawn(5, 0.7).items():
        assert bool((high.corrupted | ~every[block].corrupted).all())
    first = {
        min(s for s in drawn_of)
        for drawn_of in (
            [d.block for d in validation_block_draws(str(i), 0.3, 2, **sizes)] for i in range(50)
        )
    }
    assert first == {0, 1, 2, 3}, "the second block is not drawn from all others"


def test_every_epoch_visits_every_row_once_in_its_own_order() -> None:
    first, second = epoch_order(1, 0, 100), epoch_order(1, 1, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert list(first) != list(second)
    assert list(first) == list(epoch_order(1, 0, 100))

"""objective.md section 2, and the order in which ranks see a prepared data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import torch
from datasets import Dataset

from canvastune.config.schema import ObjectiveConfig
from canvastune.data.dataset import TrainingDataset
from canvastune.data.packing import Example, Part, balance_microbatches, pack, step_cost
from canvastune.errors import UserError
from tests.support.small import (
    CANVAS,
    EOS,
    VOCABULARY,
    examples_and_blocks,
    examples_and_draws,
    noise,
)

ROWS = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set: row i has a prefix of 5 + i tokens and a response of 1 + 3 i, the last
    row's cut.
    """
    out = tmp_path_factory.mktemp("prepared")
    rows = [
        {
            "input_ids": [10 + i] * (5 + i) + [100 + i] * (1 + 3 * i),
            "prefix_length": 5 + i,
            "complete": i != ROWS - 1,
            "id": f"row-{i}",
        }
        for i in range(ROWS)
    ]
    Dataset.from_list(rows).save_to_disk(str(out / "train"))
    Dataset.from_list(rows[:3]).save_to_disk(str(out / "validation"))
    return out


def prepared(folder: Path, seed: int = 0, blocks: int | Literal["all"] = 1) -> TrainingDataset:
    return TrainingDataset(
        folder,
        canvas_length=CANVAS,
        vocab_size=VOCABULARY,
        eos_token_id=EOS,
        seed=seed,
        objective=ObjectiveConfig(blocks=blocks),
    )


def test_the_last_block_is_filled_with_eos_and_only_where_the_response_is_whole(
    folder: Path,
) -> None:
    for example in prepared(folder).train_examples(range(ROWS)):
        index = int(example.id.removeprefix("row-"))
        response = example.tokens[example.prefix_length :]
        own = 1 + 3 * index
        assert response[:own].tolist() == [100 + index] * own
        if index == ROWS - 1:
            assert len(response) == own, (
                "a response that was cut must not be taught to stop at the cut"
            )
        else:
            assert len(response) % CANVAS == 0
            assert response[own:].tolist() == [EOS] * (-own % CANVAS)
            assert len(response) - own < CANVAS
        assert example.blocks == -(-own // CANVAS), (
            "blocks are counted from the first response token"
        )


def test_every_position_of_the_chosen_block_is_scored_fill_included_and_nothing_else() -> None:
    examples, draws = examples_and_draws()
    batch = pack(examples, draws)
    blocks = [
        e.tokens[e.prefix_length + d.block * CANVAS :][:CANVAS]
        for e, d in zip(examples, draws, strict=True)
    ]
    assert torch.equal(batch.canvas_targets, torch.cat(blocks))
    assert len(batch.clean) == sum(len(e.tokens) for e in examples), (
        "a padding token reached the model"
    )
    assert len(batch.next_targets) == sum(len(e.tokens) - 1 for e in examples)
    starts = torch.tensor(
        [e.prefix_length + d.block * CANVAS for e, d in zip(examples, draws, strict=True)]
    )
    firsts = torch.tensor(batch.canvas_lengths).cumsum(0) - torch.tensor(batch.canvas_lengths)
    assert torch.equal(batch.canvas_positions[firsts], starts), (
        "the canvas's rotary positions disagree with the encoder's"
    )


def test_only_corrupted_positions_are_replaced() -> None:
    example = Example(torch.arange(50, 50 + 3 * CANVAS), CANVAS, CANVAS, "x")
    draw = noise(1, example.blocks)
    batch = pack([example], [draw])
    assert torch.equal(batch.canvas[~draw.corrupted], batch.canvas_targets[~draw.corrupted])
    assert torch.equal(batch.canvas[draw.corrupted], draw.replacement[draw.corrupted])


def test_the_autoregressive_pairs_stay_within_one_example() -> None:
    examples, draws = examples_and_draws()
    batch = pack(examples, draws)
    expected = torch.cat([e.tokens[1:] for e in examples])
    assert torch.equal(batch.next_targets, expected)
    assert torch.equal(batch.clean[batch.next_rows], torch.cat([e.tokens[:-1] for e in examples]))


def test_the_stream_is_a_new_order_of_every_row_each_epoch(folder: Path) -> None:
    data = prepared(folder)
    epochs = [
        [e.id for e in data.train_examples(range(k * ROWS, (k + 1) * ROWS))] for k in range(3)
    ]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [e.id for e in prepared(folder, seed=1).train_examples(range(ROWS))] != epochs[0]


def test_a_position_holds_the_same_example_however_it_is_reached(folder: Path) -> None:
    whole = [e.id for e in prepared(folder).train_examples(range(40))]
    data = prepared(folder)
    assert [data.train_examples(range(p, p + 1))[0].id for p in reversed(range(40))] == whole[::-1]


def test_a_folder_that_is_not_prepared_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "train"))) as error:
        prepared(tmp_path)
    assert "canvastune prepare" in error.value.hint


def test_selected_examples_keep_their_rows() -> None:
    examples, draws = examples_and_draws()
    batch = pack(examples, draws)
    keep = [False, True, False, False, True, False, False, True]
    part, rows = batch.select(keep)
    alone = pack(
        [e for e, k in zip(examples, keep, strict=True) if k],
        [d for d, k in zip(draws, keep, strict=True) if k],
    )
    assert torch.equal(part.clean, alone.clean)
    assert torch.equal(part.canvas, alone.canvas)
    assert torch.equal(part.canvas_positions, alone.canvas_positions)
    assert torch.equal(batch.canvas[rows], part.canvas)
    assert (part.clean_lengths, part.canvas_lengths, part.block_starts) == (
        alone.clean_lengths,
        alone.canvas_lengths,
        alone.block_starts,
    )


def test_before_its_block_a_canvas_keeps_its_past_alone_with_the_rows_own_keys() -> None:
    examples, draws = examples_and_draws()
    batch = pack(examples, draws)
    part = batch.before_blocks()
    starts = [e.prefix_length + d.block * CANVAS for e, d in zip(examples, draws, strict=True)]
    assert part.clean_lengths == part.block_starts == tuple(starts)
    assert torch.equal(
        part.clean, torch.cat([e.tokens[:start] for e, start in zip(examples, starts, strict=True)])
    )
    assert torch.equal(part.clean_positions, torch.cat([torch.arange(start) for start in starts]))
    assert torch.equal(part.canvas, batch.canvas)
    assert len(part.next_rows) == len(part.next_targets) == 0, (
        "rows would be scored that are no longer there"
    )
    assert batch.row_keys is not None
    assert part.row_keys is not None
    clean, canvas = (
        batch.row_keys[: len(batch.clean)].split(batch.clean_lengths),
        batch.row_keys[len(batch.clean) :],
    )
    own = [keys[:start] for keys, start in zip(clean, starts, strict=True)]
    assert torch.equal(part.row_keys, torch.cat([*own, canvas])), (
        "adapters would drop other features of a row than in the whole batch"
    )


LAYOUTS = [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)]  # ranks, examples of a rank and forward


@pytest.mark.parametrize(("ranks", "size"), LAYOUTS)
def test_every_rank_gets_as_many_examples_and_a_step_has_the_same_ones_on_any_number_of_ranks(
    folder: Path, ranks: int, size: int
) -> None:
    positions = range(16, 24)
    shares = prepared(folder).balance_microbatches(positions, ranks, size)
    assert [len(forward) for forward in shares] == [ranks] * (len(positions) // (ranks * size))
    assert all(len(own) == size and own == sorted(own) for forward in shares for own in forward)
    dealt = sorted(part for forward in shares for own in forward for part in own)
    assert dealt == [Part(position, 0, 1, True) for position in positions]
    assert prepared(folder).balance_microbatches(positions, ranks, size) == shares, (
        "ranks would not agree, or a resumed run"
    )


@pytest.mark.parametrize(("ranks", "size"), LAYOUTS)
def test_parts_of_examples_are_dealt_evenly_and_each_block_once(
    folder: Path, ranks: int, size: int
) -> None:
    data, positions, most = prepared(folder, blocks="all"), range(16, 24), 2
    shares = data.balance_microbatches(positions, ranks, size, most)
    assert all(len(forward) == ranks for forward in shares)
    assert all(len(own) <= size for forward in shares for own in forward)
    dealt = sorted(part for forward in shares for own in forward for part in own)
    assert dealt == data.parts(positions, most)
    assert len(shares) == -(-len(dealt) // (ranks * size)), "more forwards than needed"
    for example, position in zip(data.train_examples(positions), positions, strict=True):
        own = [part for part in dealt if part.position == position]
        assert [block for part in own for block in range(part.first, part.stop)] == list(
            range(example.blocks)
        )
        assert len(own) == -(-example.blocks // most)
        assert [part.is_last for part in own] == [False] * (len(own) - 1) + [True]
    sizes = [[sum(rows_of(data, part) for part in own) for own in forward] for forward in shares]
    even = sum(sum(forward) for forward in sizes) / ranks
    largest = max(rows_of(data, part) for part in dealt)
    assert sum(max(forward) for forward in sizes) <= even + largest * len(sizes), (
        "ranks would wait for one of them"
    )


def rows_of(data: TrainingDataset, part: Part) -> int:
    """Clean and canvas rows of a part, as it is packed."""
    (example,) = data.train_examples([part.position])
    draws = data.train_draws(example, part.position)[part.blocks]
    batch = pack([example], [draws], scored=[part.is_last])
    return len(batch.clean) + len(batch.canvas)


def test_a_part_has_the_clean_tokens_that_its_blocks_see_and_only_the_last_one_scores_them() -> (
    None
):
    examples, draws = examples_and_blocks(99)
    example, own = examples[4], draws[4]  # five blocks
    parts = [
        pack([example], [own[blocks]], scored=[is_last])
        for blocks, is_last in ((slice(0, 2), False), (slice(2, 5), True))
    ]
    whole = pack([example], [own])
    assert parts[0].clean_lengths == (example.prefix_length + CANVAS,)
    assert parts[1].clean_lengths == whole.clean_lengths
    assert len(parts[0].next_rows) == len(parts[0].next_targets) == 0
    assert torch.equal(parts[1].next_targets, whole.next_targets)
    assert torch.equal(torch.cat([part.canvas for part in parts]), whole.canvas)
    assert whole.row_keys is not None
    rows = len(whole.clean)
    for part, first in zip(parts, (0, 2 * CANVAS), strict=True):
        assert part.row_keys is not None
        clean, canvas = part.row_keys[: len(part.clean)], part.row_keys[len(part.clean) :]
        assert torch.equal(clean, whole.row_keys[: len(clean)]), "parts drop other features"
        assert torch.equal(canvas, whole.row_keys[rows + first :][: len(canvas)])


@pytest.mark.parametrize(("ranks", "size", "forwards"), [(8, 4, 1), (4, 2, 4), (2, 1, 8)])
def test_ranks_wait_far_less_than_if_they_took_examples_by_position(
    ranks: int, size: int, forwards: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    count, found, by_position = ranks * size * forwards, 0.0, 0.0
    starts = range(0, count, ranks * size)
    plain = [
        [list(range(start + rank * size, start + (rank + 1) * size)) for rank in range(ranks)]
        for start in starts
    ]
    for _ in range(100):
        tokens = (torch.randn(count, generator=generator).mul(0.5).exp() * 200 + 100).int().tolist()
        coins = (torch.rand(count, generator=generator) < 0.5).tolist()
        again = [count * coin for count, coin in zip(tokens, coins, strict=True)]
        even = (4 * sum(tokens) + sum(again)) / ranks
        found += (
            step_cost(balance_microbatches(tokens, again, ranks, size), tokens, again) / even - 1
        ) / 100
        by_position += (step_cost(plain, tokens, again) / even - 1) / 100
    assert found < by_position / 2, (
        f"ranks wait {found:.1%} of the time, {by_position:.1%} by position"
    )


def test_where_lengths_allow_it_no_rank_waits() -> None:
    tokens, coins = [400, 300, 200, 100] * 2, [True, True, False, False] * 2
    again = [count * coin for count, coin in zip(tokens, coins, strict=True)]
    shares = balance_microbatches(tokens, again, 4, 2)
    assert [[sum(tokens[at] for at in own) for own in forward] for forward in shares] == [[500] * 4]
    assert [[sum(coins[at] for at in own) for own in forward] for forward in shares] == [[1] * 4]

"""Several blocks of an example next to one clean pass, on ranks: the sum of single-block passes
(float32, gloo). `tests/unit/test_blocks.py` has one process, `test_cuts.py` the trainer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.data.packing import PackedBatch
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import shard_model
from tests.distributed.test_parallel import whole
from tests.distributed.test_precision import adapters_that_act
from tests.support.small import examples_and_blocks, run_config, worst_difference
from tests.unit.test_blocks import ALL, METHODS, Found, built, one_by_one, summed, together

CUTS = ((ALL, 1), (2, 2))  # blocks, forwards of a step
DEGREES = {2: (1, 2), 4: (1, 2, 4)}  # ranks -> expert-parallel degrees


def share(count: int, forwards: int) -> list[tuple[PackedBatch, tuple[float, float]]]:
    """This rank's batches, some without any self-conditioned canvas, all of other lengths."""
    examples, draws = examples_and_blocks(count)
    size = len(examples) // (dist.get_world_size() * forwards)
    batches = together(examples, draws, (size,) * (len(examples) // size))
    return batches[dist.get_rank() * forwards : (dist.get_rank() + 1) * forwards]


def blocks_on_ranks(folder: Path, checkpoint: Path) -> None:
    world_size = dist.get_world_size()
    for name, (method, lora) in METHODS.items():
        for ep in DEGREES[world_size]:
            config = run_config(method, ep, lora)
            model = build_model(config, read_model_config(checkpoint))
            shard_model(model, ParallelDims(world_size // ep, ep).build_meshes("cpu"), config)
            load_weights(model, CheckpointReader(checkpoint), torch.device("cpu"), config.seed)
            adapters_that_act(model)
            for count, forwards in CUTS:
                *totals, gradients = summed(
                    model, share(count, forwards), checkpointing=True, any_coin=True
                )
                sums = torch.tensor(totals)
                dist.all_reduce(sums)
                found = sums.tolist(), {n: whole(g) for n, g in gradients.items()}
                if dist.get_rank() == 0:
                    torch.save(found, folder / f"{name}-{ep}-{count}.pt")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[tuple[str, int], Found]:
    """The sums of single-block passes in one process, by method and blocks."""
    found = {}
    for name in METHODS:
        model = built(checkpoint, name)
        for count, _ in CUTS:
            found[name, count] = summed(model, one_by_one(*examples_and_blocks(count)))
    return found


@pytest.mark.parametrize("world_size", DEGREES)
def test_loss_and_every_gradient_are_the_sum_of_single_block_passes_on_ranks(
    world_size: int, checkpoint: Path, expected: dict[tuple[str, int], Found], tmp_path: Path
) -> None:
    run_ranks(blocks_on_ranks, world_size, tmp_path, checkpoint)
    for name in METHODS:
        for count, forwards in CUTS:
            *losses, gradients = expected[name, count]
            for ep in DEGREES[world_size]:
                case = f"{name}, EP {ep}, {count} blocks, {forwards} forwards"
                sums, found = torch.load(tmp_path / f"{name}-{ep}-{count}.pt", weights_only=True)
                assert sums == pytest.approx(losses, rel=1e-5), f"{case}: another loss"
                worst, which = worst_difference(found, gradients)
                assert worst < 1e-5, f"{case}: the gradient of {which} is off by {worst:.1e}"


def test_the_shares_of_ranks_hold_every_case_of_ragged_work() -> None:
    for count, _ in CUTS:
        draws = examples_and_blocks(count)[1]
        coins = [any(draw.self_condition for draw in own) for own in draws]
        assert any(coins), "no example has a self-conditioned canvas"
        assert not all(coins), "no rank passes without a self-conditioned canvas"
        assert len({len(own) for own in draws}) > 1, "every example has as many canvases"

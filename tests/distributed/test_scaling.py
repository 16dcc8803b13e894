"""The scaling benchmark: its lower bound against cases worked out by hand, and two real ranks whose
bytes are the planner's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.instruments.ranks import run_ranks
from benchmarks.scaling import (
    MODEL,
    Case,
    collect,
    lower_bound,
    make_ground,
    rank_steps,
    remote_ranks,
    weight_share,
)
from benchmarks.traffic import KINDS, SMALL
from canvastune.config.model_sizes import LayerShape
from canvastune.perf_model.architecture import Architecture, Weight, read_architecture
from canvastune.perf_model.flops import (
    EXCHANGE,
    EXPERTS_GATHER,
    EXPERTS_REDUCE,
    LAYERS_GATHER,
    REDUCE,
    ROOT_GATHER,
)
from canvastune.perf_model.memory import StepShape


def by_hand(compute_bytes: int) -> Architecture:
    """Two layers of 100 trained, 20 frozen and 8 x 40 trained expert elements; a root of 60; 2
    experts a token of width 10.
    """
    weights = [Weight("embed", "embedding", (60,), 4, True, None)]
    for layer in range(2):
        weights += [
            Weight("q", "attention", (100,), 4, True, layer),
            Weight("r", "router", (20,), 4, False, layer),
            Weight("e", "experts", (8, 40), 4, True, layer),
        ]
    shape = LayerShape(sliding=False, query_width=1, key_width=1, head_dim=1, own_values=True)
    return Architecture(
        hidden=10,
        intermediate=1,
        vocabulary=6,
        heads=1,
        layers=(shape, shape),
        experts=8,
        experts_per_token=2,
        expert_size=1,
        window=1,
        canvas=1,
        longest=1,
        token_ids={},
        full=True,
        rank=0,
        expert_rank=0,
        dropout=False,
        compute_bytes=compute_bytes,
        weights=tuple(weights),
        vision=0,
    )


def test_the_bound_of_plain_fsdp_is_three_passes_less_the_layer_at_hand() -> None:
    step = StepShape(4, 1, 1, 1, 5, 3, checkpointing=True, self_conditioning=0.5)
    bound = lower_bound(by_hand(2), step, pass_1=1.0)
    assert bound[LAYERS_GATHER] == 2 * 3 / 4 * 440 * (3 * 2 - 1)
    assert bound[ROOT_GATHER] == 2 * 3 / 4 * 60
    assert bound[REDUCE] == 4 * 3 / 4 * (60 + 2 * 420)
    assert bound[EXPERTS_GATHER] == bound[EXPERTS_REDUCE] == bound[EXCHANGE] == 0


def test_the_bound_under_expert_parallelism_shards_experts_over_the_rest_and_moves_rows() -> None:
    step = StepShape(4, 2, 3, 1, 5, 3, checkpointing=True, self_conditioning=0.5)
    bound = lower_bound(by_hand(4), step, pass_1=1.0)
    assert bound[LAYERS_GATHER] == 4 * 3 / 4 * 120 * 5
    assert bound[EXPERTS_GATHER] == 4 * 1 / 2 * 160 * 5, (
        "half of the experts, of which the other rank holds a half"
    )
    assert bound[EXPERTS_REDUCE] == 4 * 1 / 2 * 160 * 2
    rows = 24 * 2  # of 3 x 8 tokens, in each of two layers
    assert bound[EXCHANGE] == 4 * 10 * rows * 2 * (1 / 2) * 2 * (2 + 1 + 0.5 * 5 / 8), (
        "pass 1 takes 5 of 8 tokens"
    )


def test_a_single_rank_and_a_single_pass_need_no_more_than_they_must() -> None:
    alone = StepShape(1, 1, 1, 1, 5, 3, checkpointing=True, self_conditioning=0.5)
    assert not any(lower_bound(by_hand(4), alone, pass_1=1.0).values())
    once = StepShape(2, 1, 1, 2, 5, 3, checkpointing=False, self_conditioning=0)
    assert lower_bound(by_hand(4), once, pass_1=0.0)[LAYERS_GATHER] == 2 * 4 * 1 / 2 * 440 * 3, (
        "twice, for two forwards a step"
    )


def test_a_token_meets_no_more_ranks_than_there_are_and_one_where_all_of_its_experts_are_elsewhere() -> (
    None
):
    assert remote_ranks(8, 8, 4) == 3
    assert remote_ranks(4, 1, 4) == 3 / 4


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("scaling"))


def test_bytes_that_two_real_ranks_receive_are_the_planners(ground: Path, tmp_path: Path) -> None:
    case = Case("full", 2, 2)
    run_ranks(rank_steps, 2, tmp_path, ground, [case], 1.0)
    row = collect(tmp_path, case, read_architecture(case.config(1.0), ground / "model"), 1.0)
    for kind in set(KINDS) - {SMALL, EXCHANGE}:
        assert row["received"][kind] == row["planned"][kind], f"{kind}: the plan counts other bytes"
    rows = row["bound"][EXCHANGE] * (1 + weight_share(MODEL["hidden"], compute_bytes=4))
    assert row["received"][EXCHANGE] == rows, (
        "other rows were sent than the router asked for, with other than their weights"
    )
    assert row["planned"][EXCHANGE] == pytest.approx(row["bound"][EXCHANGE], rel=0.03), (
        "experts are far from evenly loaded"
    )
    assert row["ratio"] <= 1.1, "too much traffic"

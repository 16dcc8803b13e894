"""Twenty steps are the same on any number of ranks, at any expert-parallel degree, for every method
(float32, gloo).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.instruments.ranks import run_ranks
from tests.support.training import losses, make_ground, validations
from tests.unit.test_trainer import make_trainer

METHODS = {
    "full": ("train.method=full",),
    "lora": ("train.method=lora",),
    "lora with experts": ("train.method=lora", "lora.experts=true"),
}
# At the small run's own rate, 1e-2, float32's rounding by itself grows to 1e-4 within twenty steps.
COMMON = (
    "train.steps=20",
    "train.validate_every=10",
    "train.checkpoint_every=20",
    "optimizer.lr=2e-3",
)

Runs = tuple[tuple[str, int], ...]  # methods and expert-parallel degrees


def grid(*degrees: int) -> Runs:
    return tuple((method, ep) for method in METHODS for ep in degrees)


def train_all(folder: Path, ground: Path, runs: Runs) -> None:
    for method, ep in runs:
        assert make_trainer(
            ground, folder / f"{method}-{ep}", *COMMON, *METHODS[method], f"parallel.ep={ep}"
        ).run()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def one_rank(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(train_all, 1, folder, ground, grid(1))
    return folder


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        (2, (("full", 1), ("full", 2), ("lora", 2), ("lora with experts", 2))),
        pytest.param(2, grid(1, 2), marks=pytest.mark.slow),
        pytest.param(4, grid(1, 2, 4), marks=pytest.mark.slow),
        pytest.param(8, grid(1, 2, 4, 8), marks=pytest.mark.slow),
    ],
    ids=["2", "2, all", "4", "8"],
)
def test_metrics_do_not_depend_on_the_ranks(
    ranks: int, runs: Runs, one_rank: Path, ground: Path, tmp_path: Path
) -> None:
    run_ranks(train_all, ranks, tmp_path, ground, runs)
    for method, ep in runs:
        expected, found = one_rank / f"{method}-1", tmp_path / f"{method}-{ep}"
        where = f"{method}, {ranks} ranks, EP {ep}"
        assert losses(found) == pytest.approx(losses(expected), rel=1e-4), where
        for now, then in zip(validations(found), validations(expected), strict=True):
            assert now[1] == pytest.approx(then[1], rel=1e-4), where
            assert now[2] == pytest.approx(then[2], rel=1e-4), where
    first, last = (sum(losses(one_rank / "full-1")[start : start + 2]) for start in (0, -4))
    assert last < first, "nothing was learned: any two runs would be the same"

"""What the evaluation says of both models is what training's own validation said of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.load import read_model_config
from canvastune.config import load_config
from canvastune.evaluation.validation_loss import denoising_loss, held_out_examples, mean_losses
from canvastune.train import main
from tests.support.training import make_ground, validations

LEVELS = (0.2, 0.6, 1.0)
SETTINGS = (
    *(
        "train.method=full",
        "train.steps=2",
        "train.validate_every=2",
        "train.export=last",
        "parallel.ep=1",
    ),
    *(
        "train.validation_levels=[0.2, 0.6, 1.0]",
        "train.validation_batches=1",
        "train.global_batch_size=5",
    ),
)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the one process that torchrun starts; signals are this process's own again afterwards."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_validation_loss_is_trainings_own_before_and_after(tmp_path: Path, alone: None) -> None:
    """Five of six rows, several blocks, some longer than the window; the packed pass on one side,
    stock modules on the other.
    """
    make_ground(tmp_path)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    out = tmp_path / "out"
    assert (
        main(
            [
                "-c",
                str(tmp_path / "recipe.yaml"),
                "--data",
                str(tmp_path / "data"),
                "--output",
                str(out),
                *settings,
            ]
        )
        == 0
    )
    (_, first, _), (_, last, _) = validations(out)
    assert first != last
    config = load_config(tmp_path / "recipe.yaml", list(SETTINGS))
    examples = held_out_examples(
        tmp_path / "data", config.train, read_model_config(tmp_path / "base")
    )
    assert len(examples) == 5
    for checkpoint, trained in ((tmp_path / "base", first), (out / "model", last)):
        model = load_stock(checkpoint, torch.device("cpu"), torch.float32)
        parts = [
            denoising_loss(model, examples[:2], LEVELS),
            denoising_loss(model, examples[2:], LEVELS),
        ]
        mean, by_level = mean_losses(parts, LEVELS)
        assert mean == pytest.approx(sum(trained.values()) / 3, rel=1e-5)
        assert by_level == pytest.approx(
            {str(level): loss for level, loss in trained.items()}, rel=1e-5
        )

"""What the evaluation says of both models is what training's own validation said of them."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.load import read_model_config
from canvastune.config import load_config
from canvastune.config.schema import Blocks
from canvastune.evaluation import validation_loss
from canvastune.evaluation.validation_loss import denoising_loss, held_out_examples, mean_losses
from canvastune.noise import NoiseSample, validation_block_draws
from canvastune.train import main
from canvastune.training import trainer
from tests.support.small import VOCABULARY
from tests.support.training import make_ground, records, validations

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


@pytest.mark.parametrize(("blocks", "at_once"), [(1, False), ("all", False), (1, True)])
def test_validation_loss_is_trainings_own_before_and_after(
    tmp_path: Path, alone: None, blocks: Blocks, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of six rows, several blocks, some longer than the window; the packed pass, with a level
    or with all levels in a forward, on one side, stock modules on the other.
    """
    if at_once:
        assert trainer.levels_at_once(torch.device("cuda"), 3, blocks) == [[0, 1, 2]]
        monkeypatch.setattr(trainer, "levels_at_once", lambda *_: [[0, 1, 2]])
    make_ground(tmp_path)
    longer_answers(tmp_path / "data" / "validation")
    chosen = (*SETTINGS, f"train.validation_blocks={blocks}")
    settings = [part for setting in chosen for part in ("--set", setting)]
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
            denoising_loss(model, examples[:2], LEVELS, blocks),
            denoising_loss(model, examples[2:], LEVELS, blocks),
        ]
        mean, by_level = mean_losses(parts, LEVELS)
        assert mean == pytest.approx(sum(trained.values()) / 3, rel=1e-5)
        assert by_level == pytest.approx(
            {str(level): loss for level, loss in trained.items()}, rel=1e-5
        )
    *_, record = records(out, "validation")
    if blocks == 1:
        assert "blocks" not in record
        return
    most = max(example.blocks for example in examples)
    assert most > 2
    for block in range(most):
        only = functools.partial(drawn_of_block, block)
        monkeypatch.setattr(validation_loss, "validation_block_draws", only)
        found = denoising_loss(model, examples, LEVELS, blocks)
        for level, total in zip(LEVELS, found["sums"], strict=True):
            assert record["blocks"][str(level)][block] == pytest.approx(
                total / found["tokens"], rel=1e-5
            ), f"block {block} at t = {level}"


def longer_answers(folder: Path) -> None:
    """Replace the held-out rows by six with one to four blocks, the last one cut."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "input_ids": torch.randint(
                5, VOCABULARY, (prefix + response,), generator=generator
            ).tolist(),
            "prefix_length": prefix,
            "complete": response != 27,
            "id": f"long {prefix}",
        }
        for prefix, response in ((4, 5), (20, 30), (7, 16), (9, 27), (33, 9), (5, 8))
    ]
    shutil.rmtree(folder)
    Dataset.from_list(rows).save_to_disk(str(folder))


def drawn_of_block(block: int, *args: Any, **sizes: Any) -> tuple[NoiseSample, ...]:
    """Draw all blocks, and return one of them, if the example has it."""
    return tuple(d for d in validation_block_draws(*args, **sizes) if d.block == block)

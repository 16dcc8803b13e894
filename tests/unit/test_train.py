"""`torchrun -m canvastune.train`.

The same curve on any number of ranks, resume, and what is refused.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from canvastune.checkpoint.hf_format import CheckpointReader
from tests.support.training import losses, make_ground, records, start, train


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def one_rank(ground: Path) -> Path:
    done = train(ground, ground / "one", 1, "parallel.ep=1", "train.method=full")
    assert done.returncode == 0, done.stderr
    return ground / "one"


@pytest.mark.parametrize(("ranks", "ep"), [(2, 2)])
def test_the_loss_curve_does_not_depend_on_the_number_of_processes(
    one_rank: Path, ground: Path, tmp_path: Path, ranks: int, ep: int
) -> None:
    done = train(ground, tmp_path / "run", ranks, f"parallel.ep={ep}", "train.method=full")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=1e-4)
    assert (
        records(tmp_path / "run", "event")[0].items()
        >= {"event": "started", "ranks": 2, "device": "cpu", "threads": 1}.items()
    )
    for found, expected in zip(
        records(tmp_path / "run", "validation"), records(one_rank, "validation"), strict=True
    ):
        assert found["levels"] == pytest.approx(expected["levels"], rel=1e-4)


def test_the_losses_fall(one_rank: Path) -> None:
    steps = records(one_rank, "train")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    validations = records(one_rank, "validation")
    assert [v["step"] for v in validations] == [0, 10, 20]


def test_the_exported_model_is_complete_and_loads_in_stock_transformers(
    one_rank: Path, ground: Path
) -> None:
    model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
        one_rank / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base, tuned = CheckpointReader(ground / "base"), CheckpointReader(one_rank / "model")
    assert set(base.names()) == set(tuned.names())
    for name in base.names():
        changed = not torch.equal(base.get(name), tuned.get(name))
        frozen = ".router." in name or "vision" in name or "layer_scalar" in name
        assert changed != frozen, f"{name} {'changed' if changed else 'did not change'}"
    assert (one_rank / "model" / "config.json").read_bytes() == (
        ground / "base" / "config.json"
    ).read_bytes()
    assert (
        model.generate(
            torch.tensor([[2, 7, 8]]), max_new_tokens=8, max_denoising_steps=2
        ).sequences.shape[1]
        > 3
    )


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(ground: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = (
        "parallel.ep=1",
        "train.method=lora",
        "train.steps=5000",
        "train.checkpoint_every=5000",
    )
    process = start(ground, output, 1, *settings)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not records(output, "train"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "the state is saved" in errors, errors
    assert list(output.glob("checkpoints/step-*/complete.json")), "nothing was saved"


def test_bad_input_is_one_line_on_one_rank(ground: Path, tmp_path: Path) -> None:
    done = train(ground, tmp_path / "run", 2, "parallel.ep=2", "train.global_batch_size=3")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("canvastune: error")]
    assert len(lines) == 1
    assert "train.global_batch_size: found 3" in lines[0]

"""`torchrun -m canvastune.train`.

What a run leaves behind, how it is stopped, and what is refused. test_curves.py and test_golden.py
compare its losses on several ranks.
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
from tests.support.training import make_ground, records, start
from tools.loss_compare.side import Side


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


def train(commands: Side, ground: Path, output: Path, *settings: str) -> tuple[int, str]:
    """Train on two ranks; return the exit code and what they print."""
    arguments = ["-c", str(ground / "recipe.yaml"), "--data", str(ground / "data")]
    changed = [part for setting in settings for part in ("--set", setting)]
    return commands.run(
        "canvastune.train",
        *arguments,
        "--output",
        str(output),
        *changed,
        ranks=2,
        expect=None,
        folder=ground,
    )


@pytest.fixture(scope="module")
def trained(commands: Side, ground: Path) -> Path:
    code, said = train(commands, ground, ground / "trained", "parallel.ep=2", "train.method=full")
    assert code == 0, said
    return ground / "trained"


def test_a_run_begins_with_what_it_runs_on(trained: Path) -> None:
    (started, *_) = records(trained, "event")
    expected = {"event": "started", "ranks": 2, "device": "cpu", "threads": 1}
    assert started.items() >= expected.items()


def test_the_losses_fall(trained: Path) -> None:
    steps = records(trained, "train")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    validations = records(trained, "validation")
    assert [v["step"] for v in validations] == [0, 10, 20]


def test_the_exported_model_is_complete_and_loads_in_stock_transformers(
    trained: Path, ground: Path
) -> None:
    model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
        trained / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base, tuned = CheckpointReader(ground / "base"), CheckpointReader(trained / "model")
    assert set(base.names()) == set(tuned.names())
    for name in base.names():
        changed = not torch.equal(base.get(name), tuned.get(name))
        frozen = ".router." in name or "vision" in name or "layer_scalar" in name
        assert changed != frozen, f"{name} {'changed' if changed else 'did not change'}"
    assert (trained / "model" / "config.json").read_bytes() == (
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
    assert f"resume: {output}\n" in errors, errors
    assert list(output.glob("checkpoints/step-*/complete.json")), "nothing was saved"


def test_bad_input_is_one_line_on_one_rank(commands: Side, ground: Path, tmp_path: Path) -> None:
    code, said = train(
        commands, ground, tmp_path / "run", "parallel.ep=2", "train.global_batch_size=3"
    )
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith("canvastune: error")]
    assert len(lines) == 1
    assert "train.global_batch_size: found 3" in lines[0]

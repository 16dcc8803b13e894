"""`torchrun -m canvastune.train`: the same curve on any number of ranks, resume, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import DiffusionGemmaForBlockDiffusion

from canvastune.model.checkpoint_files import CheckpointReader
from tests.small import VOCABULARY, write_checkpoint

STEPS = 20


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a prepared data set and a recipe."""
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "base")
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, offset: int) -> Dataset:
        made = []
        for index in range(count):
            prefix, response = 4 + index % 9, 3 + index % 20
            tokens = torch.randint(5, VOCABULARY, (prefix + response,), generator=generator).tolist()
            made.append({"input_ids": tokens, "prefix_length": prefix, "complete": True, "id": f"{offset + index}"})
        return Dataset.from_list(made)

    rows(40, 0).save_to_disk(str(folder / "data" / "train"))
    rows(6, 100).save_to_disk(str(folder / "data" / "validation"))
    recipe = {
        "name": "small",
        "model": {"id": str(folder / "base")},
        "data": {"source": "unused"},
        "train": {"steps": STEPS, "global_batch_size": 8, "precision": "float32", "validate_every": 10, "checkpoint_every": 5},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 4},
        "lora": {"rank": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def command(ground: Path, output: Path, ranks: int, *settings: str) -> list[str]:
    changed = [part for setting in settings for part in ("--set", setting)]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "canvastune.train"),
        *("-c", str(ground / "recipe.yaml"), "--data", str(ground / "data"), "--output", str(output), *changed),
    ]


def train(ground: Path, output: Path, ranks: int, *settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(ground, output, ranks, *settings), env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def start(ground: Path, output: Path, ranks: int, *settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(ground, output, ranks, *settings), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(output: Path) -> list[float]:
    steps = records(output, "train")
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1)), "each step stands once in metrics.jsonl"
    return [record[key] for record in steps for key in ("diffusion_loss", "autoregressive_loss", "grad_norm")]


@pytest.fixture(scope="module")
def one_rank(ground: Path) -> Path:
    done = train(ground, ground / "one", 1, "parallel.ep=1", "train.method=full")
    assert done.returncode == 0, done.stderr
    return ground / "one"


@pytest.mark.parametrize(("ranks", "ep"), [(2, 2), (4, 2)])
def test_the_loss_curve_does_not_depend_on_the_number_of_processes(
    one_rank: Path, ground: Path, tmp_path: Path, ranks: int, ep: int
) -> None:
    done = train(ground, tmp_path / "run", ranks, f"parallel.ep={ep}", "train.method=full")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=1e-4)
    for found, expected in zip(records(tmp_path / "run", "validation"), records(one_rank, "validation"), strict=True):
        assert found["levels"] == pytest.approx(expected["levels"], rel=1e-4)


def test_the_losses_fall(one_rank: Path) -> None:
    steps = records(one_rank, "train")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    validations = records(one_rank, "validation")
    assert [v["step"] for v in validations] == [0, 10, 20]


def test_the_exported_model_is_complete_and_loads_in_stock_transformers(one_rank: Path, ground: Path) -> None:
    model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(one_rank / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base, tuned = CheckpointReader(ground / "base"), CheckpointReader(one_rank / "model")
    assert set(base.names()) == set(tuned.names())
    for name in base.names():
        changed = not torch.equal(base.get(name), tuned.get(name))
        frozen = ".router." in name or "vision" in name or "layer_scalar" in name
        assert changed != frozen, f"{name} {'changed' if changed else 'did not change'}"
    assert (one_rank / "model" / "config.json").read_bytes() == (ground / "base" / "config.json").read_bytes()
    assert model.generate(torch.tensor([[2, 7, 8]]), max_new_tokens=8, max_denoising_steps=2).sequences.shape[1] > 3


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bits(ground: Path, tmp_path: Path) -> None:
    settings = ("parallel.ep=2", "train.method=lora", "train.checkpoint_every=7", "train.steps=60")
    assert train(ground, tmp_path / "whole", 2, *settings).returncode == 0
    output = tmp_path / "stopped"
    process = start(ground, output, 2, *settings)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/step-*/complete.json")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for rank in ranks:
        rank.kill()
    process.communicate()
    assert not (output / "result.json").exists()
    again = train(ground, output, 2, *settings)
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stderr
    assert losses(output) == losses(tmp_path / "whole"), "the metrics are not those of a run that was never stopped"
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), "the weights are not bit-identical"

    finished = train(ground, output, 2, *settings)
    assert finished.returncode == 0
    assert "already finished" in finished.stderr
    (output / "result.json").unlink()
    other = train(ground, output, 2, *settings, "optimizer.lr=0.02")
    assert other.returncode != 0
    assert "checkpoint of another run: optimizer.lr was 0.01 and is now 0.02" in other.stderr


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(ground: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ("parallel.ep=1", "train.method=lora", "train.steps=5000", "train.checkpoint_every=5000")
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
    assert "train.global_batch_size: 3 does not divide over 2 ranks" in lines[0]

"""A small training run as its user starts it: torchrun, a recipe, a prepared data set, and the
files that it writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from datasets import Dataset

from tests.support import warm
from tests.support.small import VOCABULARY, write_checkpoint

# What starts a run. tools/faults.py, which measures whole runs, puts subprocess's own here.
Popen: type[subprocess.Popen[str]] = warm.Popen

STEPS = 20
ADAPTER = "adapter/adapter_model.safetensors"


def make_ground(folder: Path) -> Path:
    """A folder with a checkpoint, a prepared data set and a recipe."""
    write_checkpoint(folder / "base", sliding=1)
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, offset: int) -> Dataset:
        made = []
        for index in range(count):
            prefix, response = 4 + index % 9, 3 + index % 20
            tokens = torch.randint(
                5, VOCABULARY, (prefix + response,), generator=generator
            ).tolist()
            made.append(
                {
                    "input_ids": tokens,
                    "prefix_length": prefix,
                    "complete": True,
                    "id": f"{offset + index}",
                    "origin": f"rows.jsonl:{offset + index + 1}",
                }
            )
        return Dataset.from_list(made)

    rows(40, 0).save_to_disk(str(folder / "data" / "train"))
    rows(6, 100).save_to_disk(str(folder / "data" / "validation"))
    recipe = {
        "name": "small",
        "model": {"id": str(folder / "base")},
        "data": {"source": "unused"},
        "train": {
            "steps": STEPS,
            "global_batch_size": 8,
            "precision": "float32",
            "validate_every": 10,
            "validation_levels": [0.5],
            "checkpoint_every": 5,
        },
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 4},
        "lora": {"rank": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def command(
    ground: Path,
    output: Path,
    ranks: int,
    *settings: str,
    torchrun: tuple[str, ...] = ("--standalone",),
) -> list[str]:
    """The command line; settings are `key=value`, `torchrun` its options."""
    changed = [part for setting in settings for part in ("--set", setting)]
    return [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            *torchrun,
            f"--nproc-per-node={ranks}",
            "-m",
            "canvastune.train",
        ),
        *(
            "-c",
            str(ground / "recipe.yaml"),
            "--data",
            str(ground / "data"),
            "--output",
            str(output),
            *changed,
        ),
    ]


def train(
    ground: Path,
    output: Path,
    ranks: int,
    *settings: str,
    torchrun: tuple[str, ...] = ("--standalone",),
) -> subprocess.CompletedProcess[str]:
    """Run it until it exits."""
    return finished(command(ground, output, ranks, *settings, torchrun=torchrun))


def finished(line: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command line until it exits."""
    pipe = subprocess.PIPE
    with Popen(line, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said, errors = process.communicate(timeout=200)
        except BaseException:
            kill_all(process)
            raise
    return subprocess.CompletedProcess(line, process.returncode, said, errors)


def start(
    ground: Path,
    output: Path,
    ranks: int,
    *settings: str,
    torchrun: tuple[str, ...] = ("--standalone",),
) -> subprocess.Popen[str]:
    """Start it in a new session."""
    line = command(ground, output, ranks, *settings, torchrun=torchrun)
    return Popen(line, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def rank_processes(torchrun: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The training processes of this machine, by local rank."""
    found = {}
    for process in psutil.Process(torchrun.pid).children(recursive=True):
        rank = process.environ().get("LOCAL_RANK")
        if rank is not None and "canvastune.train" in process.cmdline():
            found[int(rank)] = process
    return found


def kill_all(torchrun: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun and everything below it, as when a node is lost; nothing where it has
    ended.
    """
    if torchrun.poll() is not None:
        torchrun.communicate()
        return
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it ends in this moment
        processes += psutil.Process(torchrun.pid).children(recursive=True)
        processes.insert(0, psutil.Process(torchrun.pid))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes[1:])
    torchrun.communicate()


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in metrics.jsonl."""
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [
        record
        for record in (json.loads(line) for line in lines if line.endswith("\n"))
        if record["kind"] == kind
    ]


def losses(output: Path) -> list[float]:
    """Losses and gradient norm of every step, each step standing once."""
    steps = records(output, "train")
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1)), (
        "each step is once in metrics.jsonl"
    )
    return [
        record[key]
        for record in steps
        for key in ("diffusion_loss", "autoregressive_loss", "grad_norm", "lr")
    ]


def validations(output: Path) -> list[tuple[int, dict[str, float], float]]:
    """(step, loss by level, autoregressive loss) of every validation."""
    return [
        (record["step"], record["levels"], record["autoregressive_loss"])
        for record in records(output, "validation")
    ]

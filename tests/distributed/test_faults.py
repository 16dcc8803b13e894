"""What a training run survives, and how it ends where it does not.

The long form is `make test-faults`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from tests.support import training
from tests.support.training import (
    ADAPTER,
    command,
    environment,
    finished,
    kill_all,
    losses,
    make_ground,
    rank_processes,
    records,
    start,
    train,
    validations,
)
from tools import faults
from tools.faults import LONG, RANKS, complete, wait_for

STEPS = 12
# One example a rank and step, its activations kept: these tests are about what surrounds a step.
RUN = (
    *faults.settings(STEPS),
    "train.global_batch_size=2",
    "train.activation_checkpointing=false",
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def whole(ground: Path) -> Path:
    faults.untouched(ground, ground / "whole", RUN)
    return ground / "whole"


def same(output: Path, whole: Path) -> None:
    assert losses(output) == losses(whole), "other metrics"
    assert validations(output) == validations(whole), "other validation losses"
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes(), "other weights"


def test_a_run_killed_while_saving_and_while_training_ends_with_the_same_bits(
    ground: Path, whole: Path, tmp_path: Path
) -> None:
    kills = faults.kill_test(ground, whole, tmp_path, [None, None], RUN)
    assert all(kill.phase == "saving" for kill in kills), kills


def test_a_finished_run_is_not_trained_again_and_a_checkpoint_is_only_for_its_own_run(
    ground: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "checkpoints").rename(tmp_path / "checkpoints")  # as a user does who needs disk space
    finished = train(ground, output, RANKS, *RUN)
    assert finished.returncode == 0
    assert "already finished" in finished.stderr
    other = train(ground, output, RANKS, *RUN, "optimizer.lr=0.02")
    assert other.returncode != 0
    assert re.search(r"optimizer\.lr\b.* 0\.01 .* 0\.02\b", other.stderr)
    (tmp_path / "checkpoints").rename(output / "checkpoints")
    (output / "result.json").unlink()
    other = train(ground, output, RANKS, *RUN, "optimizer.lr=0.02")
    assert other.returncode != 0
    assert re.search(r"optimizer\.lr\b.* 0\.01 .* 0\.02\b", other.stderr)
    assert (output / ADAPTER).exists(), "a refused run took away what was there"
    shutil.rmtree(output / "adapter")  # as if the export had failed, for want of its base
    again = train(ground, output, RANKS, *RUN)
    assert again.returncode == 0, again.stderr
    same(output, whole)


def test_an_adapter_that_is_of_no_run_here_is_refused_before_training_and_kept(
    ground: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").touch()
    done = train(ground, tmp_path, 1, *RUN, "parallel.ep=1")
    assert done.returncode != 0
    assert "adapter: already exists" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "adapter" / "mine").exists()


def test_torchrun_restarts_what_lost_a_rank(ground: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / ".adapter.partial-1").mkdir()  # of an attempt that was killed while it exported
    process = start(ground, tmp_path, RANKS, *RUN, torchrun=("--standalone", "--max-restarts=1"))
    wait_for(lambda: complete(tmp_path), "a checkpoint")
    rank_processes(process)[0].kill()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "resumed" in said
    assert not (tmp_path / ".adapter.partial-1").exists()
    same(tmp_path, whole)


def test_a_dead_rank_ends_the_run_and_is_named(ground: Path, tmp_path: Path) -> None:
    seconds, said = faults.signal_a_rank(ground, tmp_path, 1, signal.SIGKILL)
    assert seconds < 40, said
    errors = [line for line in said.splitlines() if line.startswith("canvastune: error")]
    assert len(errors) == 1, said
    assert "rank 1 died" in errors[0]
    assert "killed" in errors[0]
    assert "train.micro_batch_size" in said.splitlines()[said.splitlines().index(errors[0]) + 1]


def test_the_last_error_of_a_rank_is_told_by_the_others(ground: Path, tmp_path: Path) -> None:
    """A token that the model does not have, in one row.

    The rank that gets it fails inside its forward pass.
    """
    rows = load_from_disk(str(ground / "data" / "train")).to_list()
    rows[0]["input_ids"] = [*rows[0]["input_ids"][:-1], 10**6]
    shutil.copytree(ground / "data" / "validation", tmp_path / "data" / "validation")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data" / "train"))
    line = command(ground, tmp_path / "run", RANKS, *faults.settings(STEPS))
    line[line.index("--data") + 1] = str(tmp_path / "data")
    done = finished(line)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("canvastune: error")]
    assert len(errors) == 1, done.stderr
    assert re.search(r"rank [01] .* step [1-5]: IndexError: ", errors[0]), errors


@pytest.mark.slow  # torchrun gives a frozen process half a minute before it kills it
def test_a_hanging_rank_ends_the_run_and_is_named(ground: Path, tmp_path: Path) -> None:
    seconds, said = faults.signal_a_rank(ground, tmp_path, 0, signal.SIGSTOP)
    assert seconds < 10 + 5 + 40, said
    assert re.search(r"\brank 0\b.* respond\b", said), said


def test_sigterm_saves_within_the_grace_period_and_says_how_long_it_took(
    ground: Path, tmp_path: Path
) -> None:
    _, said = faults.preempt(ground, tmp_path)
    assert f"resume: {tmp_path}\n" in said, said
    (event,) = [record for record in records(tmp_path, "event") if record["event"] == "stopped"]
    assert re.search(r" \d+\.\d s .* 60 s$", event["detail"])
    assert complete(tmp_path) == [event["step"]]


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    ground: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "result.json").unlink()  # the adapter stays, as if the kill had come between the two
    before, newest = complete(output)[-2:]
    assert newest == STEPS
    faults.damage(output / "checkpoints" / f"step-{newest:06d}", "flip")
    done = train(ground, output, RANKS, *RUN)
    assert done.returncode == 0, done.stderr
    assert f"step-{newest:06d} is damaged" in done.stderr
    assert re.search(rf"\bresumed\b.* step {before}\b", done.stderr)
    assert [
        r["event"]
        for r in records(output, "event")
        if r["step"] == before and r["event"] == "damaged_checkpoint"
    ]
    same(output, whole)


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(
    ground: Path, whole: Path, tmp_path: Path
) -> None:
    """Train on a too small file system, which a namespace has, so that it needs no privileges."""
    folders = (whole / "checkpoints").iterdir()  # the last one has no optimizer state
    size = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in folders)
    tried = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
    if tried.returncode:
        pytest.skip("this machine gives no user namespaces, so there is no small disk to fill")
    mounted = tmp_path / "small"
    mounted.mkdir()
    script = f"mount -t tmpfs -o size={int(2.5 * size)} tmpfs {mounted} && echo there && exec cat"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script], stdin=pipe, stdout=pipe, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "there\n"
        disk = Path(f"/proc/{holder.pid}/root{mounted}")  # the same folder as that process sees it
        done = train(ground, disk / "run", RANKS, *RUN, "train.keep_checkpoints=9")
        shutil.copytree(disk / "run", tmp_path / "run")
    assert not list(mounted.iterdir()), "the run was not on the small file system"
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("canvastune: error")]
    assert len(errors) == 1, done.stderr
    full = rf"/step-\d+: .*\b(disk|{os.strerror(errno.ENOSPC)})\b"  # found out before, or while
    assert re.search(full, errors[0]), errors
    kept = complete(tmp_path / "run")
    assert kept
    assert kept[-1] < STEPS
    again = train(ground, tmp_path / "run", RANKS, *RUN)  # the same command, with enough space
    assert again.returncode == 0, again.stderr
    assert re.search(rf"\bresumed\b.* step {kept[-1]}\b", again.stderr)
    same(tmp_path / "run", whole)


def test_a_second_trainer_on_the_same_folder_is_refused(ground: Path, tmp_path: Path) -> None:
    first = start(ground, tmp_path, 1, *LONG, "parallel.ep=1")
    wait_for(lambda: faults.steps_done(tmp_path) >= 1, "a step")
    second = train(ground, tmp_path, 1, *LONG, "parallel.ep=1")
    kill_all(first)
    assert second.returncode != 0
    assert re.search(rf"{re.escape(str(tmp_path))}: locked\b", second.stderr)


def test_two_nodes_train_as_one_does(ground: Path, whole: Path, tmp_path: Path) -> None:
    """Two torchrun agents that meet over the loopback interface, one rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=test",
        "--local-addr=127.0.0.1",
    )
    nodes = [
        training.Popen(
            command(ground, tmp_path, 1, *RUN, torchrun=meeting),
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            cwd=os.getcwd(),
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    same(tmp_path, whole)
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 2

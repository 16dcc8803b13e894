"""Faults done to real training runs, and what became of them.

`make test-faults` does them all and writes docs/reliability.md.

The short form of each is in tests/distributed/test_faults.py, which CI runs.
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support import training
from tests.support.training import (
    ADAPTER,
    kill_all,
    losses,
    make_ground,
    rank_processes,
    records,
    start,
    train,
    validations,
)


def settings(steps: int, checkpoint_every: int = 3) -> tuple[str, ...]:
    """Return the settings of a run, which writes a checkpoint every three steps by default."""
    return (
        "train.method=lora",
        "parallel.ep=2",
        f"train.steps={steps}",
        f"train.checkpoint_every={checkpoint_every}",
        f"train.validate_every={steps // 4}",
    )


KILLS = settings(60)
LONG = settings(20_000, 20_000)  # stopped before its first checkpoint and validation
RANKS = 2
_PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
_BEGIN, _END = "<!-- written by make test-faults -->", "<!-- end -->"


@dataclass
class Kill:
    """One SIGKILL to a whole run."""

    after: float  # seconds after its start
    phase: str
    checkpoint: int | None  # step of the newest complete checkpoint at that moment
    reached: int  # last step in metrics.jsonl at that moment


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = 120.0, pause: float = 0.01
) -> None:
    """Poll a condition; an AssertionError names what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(pause)


def steps_done(output: Path) -> int:
    """Return the last step in metrics.jsonl."""
    if not (output / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in records(output, "train")), default=0)


def complete(output: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    return sorted(
        int(marker.parent.name.removeprefix("step-"))
        for marker in output.glob("checkpoints/step-*/complete.json")
    )


def unfinished(output: Path) -> list[tuple[Path, int]]:
    """Folders of checkpoints that are being written, with their inodes.

    One that is started again is another.
    """
    folders = [
        folder
        for folder in output.glob("checkpoints/step-*")
        if not (folder / "complete.json").exists()
    ]
    return [(folder, folder.stat().st_ino) for folder in folders if folder.exists()]


def phase_of(output: Path, before: set[tuple[Path, int]]) -> str:
    """Find out what a run was doing, from the files in its folder.

    `before`: the checkpoints that an earlier attempt left unfinished.
    """
    if (output / "result.json").exists():
        return "over"
    if list(output.glob(".adapter.partial-*")) or (output / "adapter").exists():
        return "exporting"
    if set(unfinished(output)) - before:
        return "saving"
    return "training"


def _mark_of(output: Path) -> tuple[int, int] | None:
    """Return a value that changes when an attempt writes its first record."""
    file = output / "metrics.jsonl"
    return (file.stat().st_ino, file.stat().st_size) if file.exists() else None


def kill_at(ground: Path, output: Path, moment: float | None, run: tuple[str, ...]) -> Kill:
    """Start the run, and kill all of it `moment` seconds later.

    None: while it writes a checkpoint.
    """
    old = set(unfinished(output))
    marks = _mark_of(output)
    started = time.monotonic()
    process = start(ground, output, RANKS, *run)
    if moment is None:
        wait_for(
            lambda: set(unfinished(output)) - old or process.poll() is not None,
            "a checkpoint is being written",
            pause=0.0005,
        )
    else:
        wait_for(
            lambda: time.monotonic() - started >= moment or process.poll() is not None, "the moment"
        )
    after = time.monotonic() - started
    kill_all(process)
    phase = (
        "starting"
        if _mark_of(output) == marks and not set(unfinished(output)) - old
        else phase_of(output, old)
    )
    return Kill(after, phase, max(complete(output), default=None), steps_done(output))


def kill_test(
    ground: Path,
    whole: Path,
    folder: Path,
    moments: list[float | None],
    run: tuple[str, ...] = KILLS,
) -> list[Kill]:
    """Kill one run at each moment, one attempt after the other.

    Then let it end, and compare it with one that was never touched.

    Returns:
        The kills that came before the run was over.

    Raises:
        AssertionError: the weights or the metrics differ in any bit.
    """
    output = folder / "killed"
    kills: list[Kill] = []
    for moment in moments:
        kill = kill_at(ground, output, moment, run)
        if kill.phase == "over":  # it ended before its moment came
            break
        kills.append(kill)
    done = train(ground, output, RANKS, *run)
    assert done.returncode == 0, done.stderr
    assert losses(output) == losses(whole), f"other metrics after {kills}"
    assert validations(output) == validations(whole), f"other validation losses after {kills}"
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes(), (
        f"other weights after {kills}"
    )
    left = [path.name for path in output.iterdir() if ".partial-" in path.name]
    assert not left, f"left behind: {left}"
    return kills


def untouched(ground: Path, output: Path, run: tuple[str, ...] = KILLS) -> float:
    """Train without a fault; return its seconds."""
    started = time.monotonic()
    done = train(ground, output, RANKS, *run)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started


def signal_a_rank(
    ground: Path, output: Path, victim: int, number: signal.Signals
) -> tuple[float, str]:
    """Send one rank SIGKILL, or SIGSTOP, which freezes it, during training.

    Returns:
        Seconds until all had exited, and the output.
    """
    process = start(ground, output, RANKS, *LONG, "train.hang_timeout=10")
    wait_for(lambda: steps_done(output) >= 3, "three steps")
    everyone = rank_processes(process)
    everyone[victim].send_signal(number)
    sent = time.monotonic()
    _, said = process.communicate(timeout=120)
    psutil.wait_procs(everyone.values(), timeout=10)
    assert not any(
        each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in everyone.values()
    ), "a rank outlived the run"
    return time.monotonic() - sent, said


def preempt(ground: Path, output: Path) -> tuple[float, str]:
    """SIGTERM to torchrun during training, as Kubernetes does.

    (seconds until it ended, the output).
    """
    process = start(ground, output, RANKS, *LONG)
    wait_for(lambda: steps_done(output) >= 3, "three steps")
    asked = time.monotonic()
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert complete(output), f"nothing was saved:\n{said}"
    return time.monotonic() - asked, said


def damage(folder: Path, how: str) -> None:
    """Damage a complete checkpoint.

    `cut` a file short, `flip` a bit, `remove` a file, or spoil the `marker`.
    """
    file = sorted(folder.glob("*.safetensors"))[-1]
    if how == "cut":
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1)
    elif how == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "remove":
        file.unlink()
    elif how == "marker":
        (folder / "complete.json").write_text("{")
    else:
        raise ValueError(how)


def main() -> int:
    """Do all of it, and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    options = parser.parse_args()
    training.Popen = subprocess.Popen
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        ground = make_ground(Path(scratch))
        whole = ground / "whole"
        seconds = untouched(ground, whole)
        print(f"untouched: {seconds:.1f} s", flush=True)
        kills: list[Kill] = []
        while len(kills) < options.kills:
            # A third of the kills waits for a checkpoint that is being written; the others come at
            # any moment of a run.
            some = [
                None if chance.random() < 1 / 3 else chance.uniform(0, seconds)
                for _ in range(min(5, options.kills - len(kills)))
            ]
            kills += kill_test(ground, whole, ground / f"chain-{chance.getrandbits(32):08x}", some)
            print(f"{len(kills)} kills: weights and metrics bit-identical", flush=True)
        rows = [_row(number, kill) for number, kill in enumerate(kills, 1)]
        lost, lost_words = signal_a_rank(ground, ground / "lost", 1, signal.SIGKILL)
        hung, hung_words = signal_a_rank(ground, ground / "hung", 1, signal.SIGSTOP)
        saved, _ = preempt(ground, ground / "preempted")
    table = [
        "| kill | seconds after the start | during | steps done | newest complete checkpoint |",
        "|---|---|---|---|---|",
        *rows,
    ]
    phases = ", ".join(
        f"{sum(kill.phase == phase for kill in kills)} while {phase}"
        for phase in sorted({kill.phase for kill in kills})
    )
    text = [
        f"A {seconds:.0f}-second run was killed {len(kills)} times ({phases}), up to five times in "
        "a row. Every run ended with the same weights",
        "and metrics, bit for bit, as a run without failures. The only work lost was the steps since "
        "the newest checkpoint, which were",
        f"computed again. The tests ran on {platform.system()} with {psutil.cpu_count()} cores, "
        f"{RANKS} ranks and gloo.",
        "",
        *table,
        "",
        f"After one rank was killed, all processes exited within {lost:.1f} s: `{_error(lost_words)}`",
        "",
        f"After one rank was frozen, with `train.hang_timeout` at 10 s, all processes exited within {hung:.1f} s: "
        f"`{_error(hung_words)}`",
        "",
        f"After SIGTERM, the state was saved and all processes exited within {saved:.1f} s.",
    ]
    before, mark, rest = _PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert end, f"{_PAGE} has no place for the table"
    _PAGE.write_text("\n".join([before + mark, *text, end + after]), encoding="utf-8")
    print(f"written: {_PAGE}")
    return 0


def _row(number: int, kill: Kill) -> str:
    newest = "none" if kill.checkpoint is None else kill.checkpoint
    return f"| {number} | {kill.after:.2f} | {kill.phase} | {kill.reached} | {newest} |"


def _error(said: str) -> str:
    prefix = "canvastune: error: "
    return next(line for line in said.splitlines() if line.startswith(prefix)).removeprefix(prefix)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.step_commits CHECKOUT [SHAPE ...]`: our step at this commit against another
one, such as the last release's: median seconds on the same weights, batch and draws, in turns.

Each side is a separate process with two threads, float32; while one computes, the other waits. The
shapes are those of `benchmarks.step`. Losses are compared bit by bit. Writes
benchmarks/results/step_commits.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks.measure import ROOT, alternate, say, write_result
from benchmarks.step import OURS, SHAPES
from benchmarks.synthetic_checkpoint import write_synthetic

WORKER = ROOT / "benchmarks" / "instruments" / "step_worker.py"
GOAL = 1.0  # times as fast
SIDES = ("this", "baseline")


def main() -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.step_commits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "baseline", type=Path, metavar="CHECKOUT", help="root of the other checkout"
    )
    parser.add_argument(
        "shapes", nargs="*", metavar="SHAPE", help=f"default: all of {', '.join(SHAPES)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    chosen = parser.parse_args()
    if unknown := set(chosen.shapes) - set(SHAPES):
        parser.error(f"no shape {sorted(unknown)}: there are {', '.join(SHAPES)}")
    roots = dict(zip(SIDES, (ROOT, chosen.baseline.resolve()), strict=True))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=roots["baseline"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    found = {name: measure(name, roots, chosen.rounds) for name in chosen.shapes or SHAPES}
    faster = {
        ours: math.exp(sum(math.log(row["faster"][ours]) for row in found.values()) / len(found))
        for ours in OURS
    }
    equal = all(row["equal_losses"] for row in found.values())
    shown = ", ".join(f"{ours} {ratio:.3f}" for ours, ratio in faster.items())
    say("step_commits", f"times as fast as {commit}: {shown}; losses equal: {equal}")
    if not chosen.shapes:
        write_result(
            "step_commits",
            {"baseline": commit, "rounds": chosen.rounds, "shapes": found, "faster": faster},
        )
    return int(not equal or min(faster.values()) < GOAL)


def measure(name: str, roots: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure a shape."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        write_synthetic(Path(scratch), SHAPES[name].config())
        workers = {
            side: stack.enter_context(_worker(root, Path(scratch), name))
            for side, root in roots.items()
        }
        losses = {
            ours: {side: workers[side](checkpointing) for side in SIDES}
            for ours, checkpointing in OURS.items()
        }
        seconds = {
            ours: alternate(
                {side: functools.partial(workers[side], checkpointing) for side in SIDES},
                rounds,
                settle=True,
            )
            for ours, checkpointing in OURS.items()
        }
    faster = {ours: each["baseline"] / each["this"] for ours, each in seconds.items()}
    shown = ", ".join(f"{ours} {ratio:.3f}" for ours, ratio in faster.items())
    say("step_commits", f"{name}: times as fast: {shown}")
    return {
        "seconds": seconds,
        "faster": faster,
        "equal_losses": all(len(set(each.values())) == 1 for each in losses.values()),
    }


@contextlib.contextmanager
def _worker(root: Path, weights: Path, shape: str) -> Iterator[Any]:
    """Start a process of a checkout, and yield a function that lets it do a step."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(WORKER), str(weights), shape],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked: IO[str] = process.stdin
    answered: IO[str] = process.stdout

    def step(checkpointing: object) -> float:
        asked.write(json.dumps(checkpointing) + "\n")
        asked.flush()
        line = answered.readline()
        if not line:
            raise RuntimeError(f"{root}: the process of {shape} ended with {process.wait()}")
        return float(line)

    try:
        yield step
    finally:
        asked.close()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())

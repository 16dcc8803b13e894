"""`python -m benchmarks.step_commits CHECKOUT [SHAPE ...]`: our step at this commit against another
one, such as the last release's, on the same weights, batch and draws.

Each side is a separate process with two threads, float32; while one computes, the other waits. They
take turns, and each of two neighboring turns gives a ratio: their median hardly depends on how fast
the machine is at the moment. The shapes are those of `benchmarks.step`. Losses may differ by
rounding only. Writes benchmarks/results/step_commits.json.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, command_parser, commit_of, say, timed, worker, write_result
from benchmarks.step import OURS, SHAPES, add_shapes
from benchmarks.synthetic_checkpoint import write_synthetic

WORKER = ROOT / "benchmarks" / "instruments" / "step_worker.py"
GOAL = 1.0  # times as fast
EXACT = 1e-6  # of the loss
SIDES = ("this", "baseline")


def main() -> int:
    parser = command_parser("benchmarks.step_commits", __doc__)
    parser.add_argument(
        "baseline", type=Path, metavar="CHECKOUT", help="root of the other checkout"
    )
    add_shapes(parser)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each process")
    chosen = parser.parse_args()
    roots = dict(zip(SIDES, (ROOT, chosen.baseline.resolve()), strict=True))
    commit = commit_of(roots["baseline"])
    found = {name: measure(name, roots, chosen.rounds) for name in chosen.shapes or SHAPES}
    faster = {
        ours: statistics.geometric_mean(row["faster"][ours] for row in found.values())
        for ours in OURS
    }
    apart = max(row["loss_difference"] for row in found.values())
    shown = ", ".join(f"{ours} {ratio:.3f}" for ours, ratio in faster.items())
    say("step_commits", f"times as fast as {commit}: {shown}; losses differ by {apart:.1e}")
    if not chosen.shapes:
        write_result(
            "step_commits",
            {"baseline": commit, "rounds": chosen.rounds, "shapes": found, "faster": faster},
        )
    return int(apart > EXACT or min(faster.values()) < GOAL)


def measure(name: str, roots: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure a shape, with two processes of each side one after another: what memory a process got
    makes a difference as well.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        ours: {side: [] for side in SIDES} for ours in OURS
    }
    apart = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch), SHAPES[name].config())
        for order in (SIDES, SIDES[::-1]):
            with contextlib.ExitStack() as stack:
                workers = {
                    side: stack.enter_context(worker([str(WORKER), scratch, name], roots[side], {}))
                    for side in order
                }
                for ours, checkpointing in OURS.items():
                    steps = {
                        side: functools.partial(workers[side], checkpointing) for side in order
                    }
                    one, other = (float(step()) for step in steps.values())
                    apart = max(apart, abs(one / other - 1))
                    for side, found in turns(steps, rounds).items():
                        seconds[ours][side] += found
    faster = {ours: ratio(each) for ours, each in seconds.items()}
    shown = ", ".join(f"{ours} {times:.3f}" for ours, times in faster.items())
    say("step_commits", f"{name}: times as fast: {shown}")
    return {
        "seconds": {
            ours: {side: statistics.median(found) for side, found in each.items()}
            for ours, each in seconds.items()
        },
        "faster": faster,
        "loss_difference": apart,
    }


def turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each turn of each side.

    At its turn a side runs twice and the second run counts: the first finds the caches as the other
    side left them. Every second round goes the other way around.
    """
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sorted(sides, reverse=bool(number % 2)):
            sides[side]()
            found[side].append(timed(sides[side]))
    return found


def ratio(seconds: dict[str, list[float]]) -> float:
    """Return how many times as fast this commit is: the median of the rounds' ratios."""
    pairs = zip(seconds["baseline"], seconds["this"], strict=True)
    return statistics.median(baseline / this for baseline, this in pairs)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.long_example CHECKOUT`: memory of a training step on one example of 16,384
tokens, half of them the answer, with activation checkpointing, against another checkout.

Each side is a process with one thread, float32, full fine-tuning, on the same weights and draws. A
process's peak memory during two steps above what it held before counts, so what its allocator keeps
does, too; CPU seconds are those of both. Writes benchmarks/results/long_example.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.instruments.long_example_worker import SHAPE
from benchmarks.measure import ROOT, command_parser, commit_of, say, worker, write_result
from benchmarks.synthetic_checkpoint import write_synthetic

WORKER = ROOT / "benchmarks" / "instruments" / "long_example_worker.py"
GOAL = 3.0  # times less memory
EXACT = 1e-6  # of the loss


def main() -> int:
    parser = command_parser("benchmarks.long_example", __doc__)
    parser.add_argument(
        "baseline", type=Path, metavar="CHECKOUT", help="root of the other checkout"
    )
    roots = {"ours": ROOT, "baseline": parser.parse_args().baseline.resolve()}
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch), SHAPE.config())
        for side, root in roots.items():
            with worker([str(WORKER), scratch], root, {"OMP_NUM_THREADS": "1"}) as step:
                found[side] = step(None)
            say(
                "long_example",
                f"{side}: {found[side]['extra_memory_bytes'] / 1e6:,.0f} MB,"
                f" {found[side]['cpu_seconds']:.1f} CPU seconds",
            )
    leaner = found["baseline"]["extra_memory_bytes"] / found["ours"]["extra_memory_bytes"]
    apart = abs(found["ours"]["loss"] / found["baseline"]["loss"] - 1)
    commit = commit_of(roots["baseline"])
    say("long_example", f"{leaner:.2f}x leaner than {commit}; losses differ by {apart:.1e}")
    write_result(
        "long_example",
        {
            "model": SHAPE.model,
            "examples": SHAPE.examples,
            "baseline": commit,
            "sides": found,
            "leaner": leaner,
            "loss_difference": apart,
        },
    )
    return int(leaner < GOAL or apart > EXACT)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.growth`: how a step's time and memory grow from 1 to 64 ragged examples in
one forward, checkpointed.

The n examples have lengths spread evenly over one range, so that their mean length is the same for
every n, and all are denoised twice.
One process, two threads, float32, full fine-tuning. Memory is what the step takes above weights and
gradients. Seconds are taken twice:
as it is, where glibc maps every tensor above 32 MiB again and the kernel clears its pages each
time, and with memory kept by the process
between uses, as CUDA's allocator keeps it. The second is the engine's own growth, and is judged.
Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import (
    allocate_gradients,
    bench_recipe,
    draw_noise,
    held_tensors,
    loaded_model,
)
from benchmarks.instruments.live_bytes import LiveBytes
from benchmarks.measure import alternate, extra_memory, say, write_result
from benchmarks.step import our_step
from benchmarks.synthetic_checkpoint import described, write_synthetic
from canvastune.checkpoint.load import read_model_config
from canvastune.data.packing import Example
from canvastune.noise import NoiseSample

MODEL = {"layers": 5, "hidden": 128, "experts": 16, "vocabulary": 8192, "canvas": 32}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SHORTEST, LONGEST = 32, 352  # tokens, of which half are the prefix
THREADS, ROUNDS, SEED = 2, 3, 5
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
# Times what fewer examples take, per token and per example: the measurement's own noise is a few
# percent.
LINEAR, FLAT = 1.05, 1.05


def main() -> int:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_synthetic(folder, described(**MODEL))
        model = loaded_model(bench_recipe(), read_model_config(folder), folder, SEED)
    allocate_gradients(model)
    batches = {n: ragged(n) for n in COUNTS}
    sides = {str(n): lambda n=n: our_step(model, *batches[n], True) for n in COUNTS}
    mapped = alternate(sides, ROUNDS)
    memory = {n: extra_memory(sides[str(n)]) for n in COUNTS}
    keep_memory()
    kept = alternate(sides, ROUNDS)
    rows = []
    for n, (examples, _) in batches.items():
        lengths = [len(example.tokens) + MODEL["canvas"] for example in examples]
        with LiveBytes(held_tensors(model)) as live:
            sides[str(n)]()
        rows.append(
            {
                "examples": n,
                "tokens": sum(lengths),
                "padded_tokens": n * max(lengths),
                "seconds": kept[str(n)],
                "seconds_mapped_anew": mapped[str(n)],
                "extra_memory_bytes": memory[n],
                "live_bytes": live.peak - live.held,
            }
        )
        say("growth", described_row(rows[-1]))
    verdict = judged(rows)
    write_result(
        "growth",
        {"model": MODEL, "lengths": [SHORTEST, LONGEST], "rounds": ROUNDS, "rows": rows, **verdict},
    )
    for name, value in verdict.items():
        say("growth", f"{name}: {value:.3f}")
    return int(
        verdict["worst_seconds_per_token"] > LINEAR
        or verdict["worst_live_bytes_per_example"] > FLAT
    )


def keep_memory() -> None:
    """Keep the C library from returning memory to the kernel from now on."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)):
        raise SystemExit("growth: this C library has no mallopt as glibc has")


def judged(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the exponents of seconds in tokens (least squares of logarithms), and the worst growth
    per unit.

    The growth is from any count to any larger one.
    """
    tokens = [math.log(row["tokens"]) for row in rows]
    found = {}
    for name in ("seconds", "seconds_mapped_anew"):
        found[f"exponent_of_{name}"] = statistics.linear_regression(
            tokens, [math.log(row[name]) for row in rows]
        ).slope
        found[f"worst_{name}_per_token"] = worst([row[name] / row["tokens"] for row in rows])
    for name in ("live_bytes", "extra_memory_bytes"):
        found[f"worst_{name}_per_example"] = worst([row[name] / row["examples"] for row in rows])
    return found


def worst(values: list[float]) -> float:
    """Return the largest ratio of a value to an earlier one."""
    return max(later / min(values[: index + 1]) for index, later in enumerate(values[1:]))


def ragged(count: int) -> tuple[list[Example], list[NoiseSample]]:
    """So many examples, in the middles of equal parts of the range of lengths, a random block of
    each chosen and denoised twice.
    """
    generator, canvas = torch.Generator().manual_seed(count), MODEL["canvas"]
    examples, draws = [], []
    for position in range(count):
        length = round(SHORTEST + (LONGEST - SHORTEST) * (position + 0.5) / count)
        tokens = torch.randint(5, MODEL["vocabulary"], (length,), generator=generator)
        fill = -(length - length // 2) % canvas
        examples.append(
            Example(
                torch.cat([tokens, tokens.new_full((fill,), 1)]), length // 2, canvas, str(position)
            )
        )
        (draw,) = draw_noise(SEED, examples[-1], MODEL["vocabulary"], coin=1.0)
        draws.append(dataclasses.replace(draw, dropout_key=None))
    return examples, draws


def described_row(row: dict[str, Any]) -> str:
    per_token, mapped, per_padded = (
        1e6 * row[name] / row[unit]
        for name, unit in (
            ("seconds", "tokens"),
            ("seconds_mapped_anew", "tokens"),
            ("seconds", "padded_tokens"),
        )
    )
    memory, live = (
        row[name] / row["examples"] / 1e6 for name in ("extra_memory_bytes", "live_bytes")
    )
    time = (
        f"{row['seconds']:.2f} s, {per_token:.0f} us per token ({mapped:.0f} with fresh mappings,"
        f" {per_padded:.0f} per padded token)"
    )
    return (
        f"{row['examples']} examples, {row['tokens']} tokens: {time}, {memory:.1f} MB an example,"
        f" live tensors {live:.2f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())

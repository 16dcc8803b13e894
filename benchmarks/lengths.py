"""`python -m benchmarks.lengths [TOKENS ...]`: a step on one long example at small width, with
activation checkpointing: memory, and seconds next to counted FLOPs, by length.

One process, two threads, float32, full fine-tuning, with pass 1. Attention is timed by itself too, by layer
type: a layer's seconds per counted FLOP grow where something other than arithmetic grows.
Writes benchmarks/results/lengths.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import allocate_gradients, bench_recipe, held_tensors, loaded_model
from benchmarks.instruments.live_bytes import LiveBytes, batch_of
from benchmarks.measure import say, timed, write_result
from benchmarks.synthetic_checkpoint import described, write_synthetic
from canvastune.checkpoint.load import read_model_config
from canvastune.data.packing import PackedBatch
from canvastune.model.attention import Packing
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.objective import losses
from canvastune.perf_model.architecture import describe
from canvastune.perf_model.flops import count_flops
from canvastune.perf_model.memory import StepShape

MODEL = {"layers": 6, "hidden": 64, "experts": 16, "vocabulary": 4096, "canvas": 256}
LENGTHS = (4096, 8192, 16384, 32768)
BLOCKS = (1, 4)  # objective.blocks
THREADS, SEED = 2, 5
LINEAR = 1.05  # times the bytes per token of the shortest length


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.lengths", description=__doc__)
    parser.add_argument("tokens", nargs="*", type=int, default=LENGTHS)
    lengths = parser.parse_args().tokens
    torch.set_num_threads(THREADS)
    config = bench_recipe()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_synthetic(folder, described(**MODEL))
        model = loaded_model(config, read_model_config(folder), folder, SEED)
    allocate_gradients(model)
    architecture = describe(model, config)
    rows = []
    for blocks in BLOCKS:
        for clean in lengths:
            step = StepShape(
                *(1, 1, 1, 1, clean, MODEL["canvas"]),
                checkpointing=True,
                self_conditioning=1,
                blocks=blocks,
            )
            batch = batch_of(step, MODEL["vocabulary"])
            live, seconds = measured_step(model, batch)
            flops = count_flops(architecture, step).total
            rows.append(
                {
                    "clean": clean,
                    "blocks": blocks,
                    "tokens": step.tokens,
                    "seconds": seconds,
                    "flops": flops,
                    "live_bytes": live,
                    "attention_seconds": attention_seconds(model, batch),
                }
            )
            say("lengths", described_row(rows[-1]))
    growth = {
        str(blocks): per_token[-1] / per_token[0]
        for blocks in BLOCKS
        for per_token in [
            [row["live_bytes"] / row["tokens"] for row in rows if row["blocks"] == blocks]
        ]
    }
    write_result("lengths", {"model": MODEL, "rows": rows, "growth_of_bytes_per_token": growth})
    say("lengths", f"bytes per token, longest over shortest, by blocks: {growth}")
    return int(max(growth.values()) > LINEAR)


def measured_step(model: WeightTiedDiffusionGemma, batch: PackedBatch) -> tuple[int, float]:
    """Return the bytes that a step holds above weights and gradients, and its seconds."""

    def step() -> None:
        loss, _, _ = losses(
            model, batch, (1e-3, 1e-3), any_self_conditioned=True, checkpointing=True
        )
        loss.backward()

    with LiveBytes(held_tensors(model)) as live:
        seconds = timed(step)
    return live.peak - live.held, seconds


def attention_seconds(model: WeightTiedDiffusionGemma, batch: PackedBatch) -> dict[str, float]:
    """Return the seconds of one layer's attention, forward and backward, by layer type."""
    packing, rows = model.packing(batch), len(batch.clean) + len(batch.canvas)
    assert isinstance(packing, Packing)
    found = {}
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        if attention.layer_type in found:
            continue
        size = attention.head_dim
        heads = model.config.text_config.num_attention_heads
        groups = attention.k_proj.out_features // size
        query, key, value = (
            torch.randn(1, count, rows, size, requires_grad=True)
            for count in (heads, groups, groups)
        )
        times = []
        for _ in range(2):
            started = time.perf_counter()
            packing.attend(attention.layer_type, query, key, value, 1.0).sum().backward()
            times.append(time.perf_counter() - started)
        found[attention.layer_type] = statistics.median_low(times)
    return found


def described_row(row: dict[str, Any]) -> str:
    attention = ", ".join(
        f"{kind} {seconds / row['tokens'] * 1e6:.1f} us"
        for kind, seconds in row["attention_seconds"].items()
    )
    return (
        f"{row['clean']:,} tokens, {row['blocks']} blocks: {row['seconds']:.1f} s,"
        f" {row['flops'] / row['seconds'] / 1e9:.1f} GFLOP/s,"
        f" {row['live_bytes'] / row['tokens'] / 1e3:.1f} kB per token; attention per token and layer:"
        f" {attention}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu [--small]`: one device: training against its plan, our step against the
plain one, and where its time goes.

The released model's layers at their real size, as many of them as fit, in bfloat16, with random
weights that are made in memory.

- 20 steps of LoRA and of full fine-tuning with the trainer: every loss and gradient norm must be
  finite, and the peak memory within 10% of the plan; two checkpoints of LoRA, the first of which
  pins the memory that it is copied to.
- Sequences of 512 to 4,096 tokens (`benchmarks/gpu_steps.py`): seconds, tokens/s, memory and
  utilization of our step, with both kinds of attention and without Triton kernels, and of the plain
  one, whose loss and gradients theirs must be; the backends of attention by the selector, by the
  profiler and by tools/attention_backends.py; the five largest costs of ours.

Writes benchmarks/results/gpu.json, a part as soon as it is measured; `--small` tries the same on a
small model (for a CPU), and writes nothing.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engine import make_trainer, sharded_model, write_random_rows
from benchmarks.gpu_steps import OURS, measured_steps
from benchmarks.made_model import SyntheticCheckpoint, largest_model
from benchmarks.measure import command_parser, say, write_result
from benchmarks.step import EFFICIENT
from canvastune.checkpoint.load import load_weights
from canvastune.config import RunConfig, parse_config
from canvastune.planner.plan import Plan
from canvastune.planner.planner import make_plan
from canvastune.training.trainer import Trainer

STEPS, WARM_UP, ROWS = 20, 5, 64
NEAR = 0.1  # how far the plan's memory may be off
LOSS_NEAR, GRADIENT_NEAR = 1e-2, 0.1  # how far ours may be from the plain step's, in bfloat16


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("benchmarks.gpu", __doc__)
    parser.add_argument(
        "--small", action="store_true", help="a small model, to try the command without a GPU"
    )
    parser.add_argument(
        "--seq-length", type=int, default=1024, help="of the 20 steps with the trainer"
    )
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.small:
        raise SystemExit("benchmarks.gpu: no CUDA device; --small tries the command on the CPU")
    kept = cuda and not options.small
    if (
        cuda
    ):  # steps of unlike sizes take turns: what one leaves in pieces must not be missing to another
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    memory = torch.cuda.mem_get_info()[1] if cuda else 12 * 10**9
    result: dict[str, Any] = {"cuda": torch.version.cuda, "memory_bytes": memory}
    with tempfile.TemporaryDirectory() as scratch:

        def keep(part: str, found: dict[str, Any]) -> None:
            result[part] = found
            if kept:
                write_result("gpu", result)  # what follows may take the process with it

        steps = measured_steps(
            Path(scratch) / "steps",
            device,
            memory,
            small=options.small,
            keep=partial(keep, "steps"),
        )
        trained(
            Path(scratch),
            device,
            memory,
            small=options.small,
            seq_length=options.seq_length,
            rate=steps["matmul_flops_per_second"],
            keep=partial(keep, "runs"),
        )
    print(json.dumps(result, indent=2))
    missed = list(shortcomings(result, goals=kept))
    for line in missed:
        say("gpu", line)
    return int(bool(missed))


def shortcomings(result: dict[str, Any], *, goals: bool) -> Iterator[str]:
    """List what failed and, with `goals`, what missed them."""
    for row in result["steps"]["lengths"]:
        found = [*_wrong_sides(row), *_wrong_attention(row, goals=goals)]
        best = max(
            (row["sides"][name].get("utilisation", 0.0) for name in OURS if name in row["sides"]),
            default=0.0,
        )
        if goals and best < EFFICIENT:
            found.append(f"{best:.0%} of the matmul rate at best, the goal is {EFFICIENT:.0%}")
        yield from (f"S {row['seq_length']}: {line}" for line in found)
    for method, run in result["runs"].items():
        if not run["finite"]:
            yield f"{method}: a loss or a gradient norm is not finite"
        if goals and abs(run["planned_over_measured"] - 1) > NEAR:
            yield (
                f"{method}: planned memory is {run['planned_over_measured']:.2f} of the measured,"
                f" the goal is within {NEAR:.0%}"
            )


def _wrong_sides(row: dict[str, Any]) -> Iterator[str]:
    """List the steps that failed, or compute something else than the plain one."""
    plain = row["sides"].get("chosen block", {}).get("loss")
    for name, side in row["sides"].items():
        if not side.get("failed", "out of memory").startswith("out of memory"):
            yield f"{name} failed"
        if plain is not None and not abs(side.get("loss", plain) / plain - 1) < LOSS_NEAR:
            yield f"{name}: loss {side['loss']:.4f}, the plain step's is {plain:.4f}"
        if not (apart := side.get("gradient_difference", 0.0)) < GRADIENT_NEAR:
            yield f"{name}: gradients differ by {apart:.1e} of the plain step's"


def _wrong_attention(row: dict[str, Any], *, goals: bool) -> Iterator[str]:
    """List the calls that run on another backend than expected."""
    chosen: Counter[str] = Counter()
    for call in row["attention"] or ():
        chosen[call["backend"]] += call["calls"]
        taken = f"attention of {call['query']} on {call['key']} runs on {call['backend']}"
        if goals and call["backend"] == "math":
            yield f"{taken}, not on a fused kernel"
        elif goals and call["table"] not in (None, call["backend"]):
            yield f"{taken}, tools/attention_backends.py says {call['table']}"
    if row["attention_seen"] not in (None, dict(chosen)):
        yield f"the profiler sees attention on {row['attention_seen']}, chosen was {dict(chosen)}"


def trained(
    folder: Path,
    device: torch.device,
    memory: int,
    *,
    small: bool,
    seq_length: int,
    rate: float,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run LoRA and full fine-tuning with the whole trainer, optimizer included, in a process group
    of one.

    Args:
        memory: bytes of the device.
        rate: FLOP/s of the device in a large matmul.
        keep: is given the result after each method.
    """
    found: dict[str, Any] = {}
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        for method in ("lora", "full"):
            found[method] = _run(method, folder / method, device, memory, small, seq_length, rate)
            keep(found)
    finally:
        dist.destroy_process_group()
    return found


def _run(
    method: str,
    folder: Path,
    device: torch.device,
    memory: int,
    small: bool,
    seq_length: int,
    rate: float,
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    config = parse_config(
        {
            "name": "gpu",
            "data": {"source": "made", "seq_length": 128 if small else seq_length},
            "train": {"method": method, "steps": STEPS, "global_batch_size": 1},
            "parallel": {"ep": 1, "nproc_per_node": 1},
            "hardware": {"gpu_memory": memory / 1e9, "accelerator": "h100" if cuda else "cpu"},
        }
    )
    model_config, plan = largest_model(folder, small, lambda found: _fitting(config, found))
    say(
        "gpu",
        f"{method}: {model_config.text_config.num_hidden_layers} layers, planned"
        f" {plan.memory_bytes / 1e9:.2f} GB",
    )
    length, vocabulary = config.data.seq_length, model_config.text_config.vocab_size
    write_random_rows(folder / "data", ROWS, vocabulary, tokens=length, prefix=length // 4)
    gc.collect()  # what the part before this one held
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = sharded_model(config, model_config, 1, device.type)
    load_weights(model, SyntheticCheckpoint(model_config), device, config.seed)
    trainer = make_trainer(config, model, model_config, folder / "data")
    records = []
    for _ in range(STEPS):
        records.append(trainer.train_step())
        say(
            "gpu",
            f"{method}: step {len(records)}, loss {records[-1]['loss']:.3f},"
            f" {records[-1]['seconds']:.2f} s",
        )
    seconds = mean(
        record["seconds"] for record in records[WARM_UP:]
    )  # about half of the steps run pass 1
    measured = records[-1]["memory_bytes"]
    # The first copy pins its memory. The state of a full run is larger than a disk may be.
    saves = [_saved(trainer) for _ in range(2)] if method == "lora" else []
    return {
        "layers": model_config.text_config.num_hidden_layers,
        "seq_length": length,
        "finite": all(math.isfinite(record["loss"] + record["grad_norm"]) for record in records),
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "step_seconds": seconds,
        "planned_step_seconds": plan.step_seconds,
        "tokens_per_second": records[-1]["tokens"] / seconds,
        "utilisation": plan.model_flops / seconds / rate,
        "planned_bytes": plan.memory_bytes,
        "planned_by_part": plan.memory,
        "measured_bytes": measured,
        "planned_over_measured": plan.memory_bytes / measured,
        "saves": saves,
    }


def _saved(trainer: Trainer) -> dict[str, float]:
    """Save a checkpoint; return its bytes, and the seconds until it was copied and written."""
    started, checkpoints = time.perf_counter(), trainer.checkpoints
    progress = asdict(trainer.progress)
    checkpoints.save(trainer.progress.step, trainer.trained, trainer.optimizer, progress)
    checkpoints.wait_staged()
    copied = time.perf_counter() - started
    checkpoints.wait()
    return {
        "bytes": 3 * sum(parameter.nbytes for parameter in trainer.trained.values()),
        "copied_seconds": copied,
        "written_seconds": time.perf_counter() - started,
    }


def _fitting(config: RunConfig, folder: Path) -> Plan | None:
    plan = make_plan(config, folder, 1)
    return plan if plan.fits else None


if __name__ == "__main__":
    sys.exit(main())

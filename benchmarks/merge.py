"""`python -m benchmarks.merge [--gb 2] [--work DIR]`: merging an adapter into a sharded checkpoint,
against copying the same bytes.

Makes a synthetic checkpoint and an adapter on every attention projection, every dense MLP and every
expert. Three runs, each in a
separate process: a plain read and write of every file, flushed to the disk; the merge without its
proof; and the whole step with the
proof weight by weight. Writes benchmarks/results/merge.json. Takes twice the checkpoint's size on
disk, which is freed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import command_parser, python_module, say, work_folder, write_result
from benchmarks.resident import one_thread, read_status, run_watched
from benchmarks.synthetic_checkpoint import SHARD_BYTES, described_by_size, write_synthetic
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.peft_adapter import write_adapter
from canvastune.config import RunConfig
from canvastune.io.atomic import fsync_tree
from canvastune.merge import merge_lora

RANK = 16
ADAPTED = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
PHASES = ("copy", "merge", "merge_and_proof")


def main() -> int:
    parser = command_parser("benchmarks.merge", __doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, 1e9 bytes")
    parser.add_argument(
        "--rounds", type=int, default=3, help="the phases take turns; the median round is reported"
    )
    parser.add_argument(
        "--work", type=Path, help="folder on the disk that is measured; default: a temporary one"
    )
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        _run_phase(options.phase, options.work)
        return 0
    with work_folder("merge", options.work, 2.2 * options.gb) as work:
        result = _measure(work, options.gb, options.rounds)
    write_result("merge", result)
    print(json.dumps(result, indent=2))
    return 0


def _measure(work: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    say("merge", "writing the checkpoint and its adapter")
    total = write_synthetic(work / "base", described_by_size(gigabytes))
    base = CheckpointReader(work / "base")
    _write_adapter(work, base)
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in base.specs().values()]
    found: dict[str, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    for number in range(rounds):
        for phase in PHASES:
            found[phase].append(_one_run(work, phase, total))
            say("merge", f"round {number + 1}, {phase}: {json.dumps(found[phase][-1])}")
    median = {
        phase: sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        for phase, runs in found.items()
    }
    adapter = (work / "adapter" / "adapter_model.safetensors").stat().st_size
    return {
        "checkpoint_bytes": total,
        "shard_bytes": SHARD_BYTES,
        "largest_tensor_bytes": max(sizes),
        "adapter_bytes": adapter,
        "rounds": rounds,
        **median,
        "merge_over_copy": median["copy"]["seconds"] / median["merge"]["seconds"],
        "memory_over_a_shard": median["merge_and_proof"]["extra_bytes"] / SHARD_BYTES,
    }


def _one_run(work: Path, phase: str, total: int) -> dict[str, float]:
    """Run one phase in a separate process: seconds of its work, GB/s of the checkpoint, anonymous
    memory above its start.
    """
    command = python_module("benchmarks.merge", "--work", work, "--phase", phase)
    peaks = run_watched(phase, command, one_thread())
    report = json.loads((work / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(work / "out")
    seconds = report["seconds"]
    return {
        "seconds": seconds,
        "gb_per_second": total / 1e9 / seconds,
        "extra_bytes": peaks[0].anonymous - report["start_bytes"],
    }


def _run_phase(phase: str, work: Path) -> None:
    config = RunConfig.model_validate(_tree(work))
    start, started = read_status(os.getpid())["RssAnon"], time.perf_counter()
    if phase == "copy":
        shutil.copytree(work / "base", work / "out", copy_function=_copy)
        fsync_tree(work / "out")
    elif phase == "merge":
        with mock.patch(
            "canvastune.merge.verify_merge",
            return_value={"passed": True, "method": "nothing: only the merge is measured"},
        ):
            merge_lora(config, work / "base", work / "adapter", work / "out")
    else:
        # The proof by logits loads the whole model if it fits: this measures the proof that is
        # always made.
        merge_lora(
            config, work / "base", work / "adapter", work / "out", find_device=lambda _: None
        )
    report = {"seconds": time.perf_counter() - started, "start_bytes": start}
    (work / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _copy(source: str, target: str) -> str:
    """Through this process's memory, as a merge must: not a copy within the kernel."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while piece := reading.read(16 * 2**20):
            writing.write(piece)
    return target


def _write_adapter(work: Path, base: CheckpointReader) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, (shape, _) in base.specs().items():
        if name.startswith("model.decoder.layers.") and (
            name.endswith(EXPERTS) or (name.endswith(ADAPTED) and len(shape) == 2)
        ):
            *experts, outputs, inputs = shape
            a = torch.randn(*experts, RANK, inputs, generator=generator) * inputs**-0.5
            factors[name] = (a, torch.randn(*experts, outputs, RANK, generator=generator) * 0.01)
    (work / "adapter").mkdir()
    write_adapter(work / "adapter", factors, RunConfig.model_validate(_tree(work)), work / "base")


def _tree(work: Path) -> dict[str, Any]:
    return {
        "name": "merge",
        "model": {"id": str(work / "base")},
        "data": {"source": "unused"},
        "lora": {"rank": RANK, "experts": True},
    }


if __name__ == "__main__":
    sys.exit(main())

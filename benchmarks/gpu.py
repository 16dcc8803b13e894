"""`python -m benchmarks.gpu [--small]`: 20 steps of LoRA and of full fine-tuning on one device, its memory against the plan.

The released model's layers at their real size, as many of them as the plan says will fit, in bfloat16, with random weights that are
made in memory. Every loss and gradient norm must be finite, and the peak memory within 10% of the plan. Writes
benchmarks/results/gpu.json; `--small` tries the same on a small model (for a CPU), and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import DiffusionGemmaConfig

from benchmarks.measure import say, write_result
from benchmarks.synthetic_checkpoint import checkpoint_specs, described, synthetic_value
from canvastune.checkpoints import Checkpoints
from canvastune.config import RunConfig, parse_config
from canvastune.data.batches import PreparedData
from canvastune.model.checkpoint_files import CheckpointReader
from canvastune.model.load import build_model, load_weights
from canvastune.parallel import build_meshes, shard_model
from canvastune.planner import SHIPPED, Plan, make_plan
from canvastune.trainer import Trainer

STEPS, ROWS = 20, 64
_BLOCK = 2**20  # random values that are repeated to fill a tensor: billions of fresh ones would take minutes
_SMALL_LAYERS = 6


class SyntheticCheckpoint(CheckpointReader):
    """A checkpoint that is nowhere: each tensor is made when it is read."""

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        self.folder = Path("synthetic")
        self._specs = checkpoint_specs(config)

    def names(self) -> list[str]:
        return list(self._specs)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name][1]

    def get(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        count = math.prod(shape)
        if count <= _BLOCK:
            return synthetic_value(name, shape, seed=0)
        return synthetic_value(name, (_BLOCK,), seed=0).repeat(-(-count // _BLOCK))[:count].view(shape)

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.get(name)[slices]


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, to try the command without a GPU")
    parser.add_argument("--seq-length", type=int, default=1024)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.small:
        raise SystemExit("benchmarks.gpu: no CUDA device; --small tries the command on the CPU")
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"file://{scratch}/meeting", rank=0, world_size=1)
        try:
            runs = {method: _run(method, Path(scratch) / method, options.small, options.seq_length) for method in ("lora", "full")}
        finally:
            dist.destroy_process_group()
    result = {"cuda": torch.version.cuda, "runs": runs}
    print(json.dumps(result, indent=2))
    if cuda and not options.small:
        write_result("gpu", result)
    return 0 if all(run["finite"] for run in runs.values()) else 1


def _run(method: str, folder: Path, small: bool, seq_length: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    memory = torch.cuda.mem_get_info()[1] if cuda else 12 * 10**9
    config = parse_config(
        {
            "name": "gpu",
            "data": {"source": "made", "seq_length": 128 if small else seq_length},
            "train": {"method": method, "steps": STEPS, "global_batch_size": 1},
            "parallel": {"ep": 1, "nproc_per_node": 1},
            "hardware": {"gpu_memory": memory / 1e9, "accelerator": "h100" if cuda else "cpu"},
        }
    )
    model_config, plan = _largest(config, folder, small)
    say("gpu", f"{method}: {model_config.text_config.num_hidden_layers} layers, planned {plan.memory_bytes / 1e9:.2f} GB")
    _make_data(folder / "data", config.data.seq_length, model_config.text_config.vocab_size)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = build_model(config, model_config)
    shard_model(model, build_meshes(1, 1, device.type), config)
    load_weights(model, SyntheticCheckpoint(model_config), device, config.seed)
    sizes = {"canvas_length": model_config.canvas_length, "vocab_size": model_config.text_config.vocab_size, "eos_token_id": 1}
    data = PreparedData(folder / "data", **sizes, seed=config.seed)
    trainer = Trainer(config, model, data, Checkpoints(folder / "checkpoints", config, "made"), None, None)
    records = []
    for _ in range(STEPS):
        records.append(trainer.train_step())
        say("gpu", f"{method}: step {len(records)}, loss {records[-1]['loss']:.3f}, {records[-1]['seconds']:.2f} s")
    seconds = sorted(record["seconds"] for record in records[5:])[(STEPS - 5) // 2]
    measured = records[-1]["memory_bytes"]
    return {
        "layers": model_config.text_config.num_hidden_layers,
        "seq_length": config.data.seq_length,
        "finite": all(math.isfinite(record["loss"] + record["grad_norm"]) for record in records),
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "step_seconds": seconds,
        "planned_step_seconds": plan.step_seconds,
        "tokens_per_second": records[-1]["tokens"] / seconds,
        "planned_bytes": plan.memory_bytes,
        "planned_by_part": plan.memory,
        "measured_bytes": measured,
        "planned_over_measured": plan.memory_bytes / measured,
    }


def _largest(config: RunConfig, folder: Path, small: bool) -> tuple[DiffusionGemmaConfig, Plan]:
    """The model with most layers whose plan fits."""
    released = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    most = _SMALL_LAYERS if small else released["text_config"]["num_hidden_layers"]
    for layers in range(most, 0, -1):
        if small:
            found = described(layers, hidden=128, experts=16, vocabulary=4096, canvas=32)
        else:
            text = released["text_config"] | {"num_hidden_layers": layers, "layer_types": released["text_config"]["layer_types"][-layers:]}
            found = DiffusionGemmaConfig.from_dict(released | {"text_config": text})
        folder.mkdir(parents=True, exist_ok=True)
        found.save_pretrained(folder)
        plan = make_plan(config, folder, 1)
        if plan.fits:
            return found, plan
    raise SystemExit("benchmarks.gpu: not even one layer fits this device")


def _make_data(folder: Path, length: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(5, vocabulary, (length,), generator=generator).tolist(),
            "prefix_length": length // 4,
            "complete": True,
            "id": str(row),
        }
        for row in range(ROWS)
    ]
    for split in ("train", "validation"):
        Dataset.from_list(rows).save_to_disk(str(folder / split))


if __name__ == "__main__":
    sys.exit(main())

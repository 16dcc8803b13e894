"""Training steps of the released model on 8 H100, without a GPU: `make test-gpu-dry`.

    python -m tools.gpu_dry_run [--layers N] [--case NAME ...] [--json FILE]

Rank 0 of 8 runs the engine's own trainer (build, shard, two train steps, of which the second is
measured) on fake CUDA tensors (`tools.fake_cuda`), at the released model's widths and, unless
`--layers` cuts it, depth. Exit code 1 if a bar is missed; the last line names it. `make test` runs
the same with two layers. Without options, writes benchmarks/results/gpu_dry_run.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LOCAL_RANK", "0")

from tools import fake_cuda  # before torch, which it has to come before

# isort: split
import torch
import torch.distributed as dist
from datasets.utils.logging import disable_progress_bar
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.engine import make_trainer, sharded_model, write_random_rows
from benchmarks.measure import machine, write_result
from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig, parse_config
from canvastune.perf_model.launches import LAUNCH_SECONDS, MOST_LAUNCHES
from canvastune.planner import make_plan
from canvastune.planner.planner import SHIPPED_CONFIG
from canvastune.training.devices import select_device
from canvastune.training.trainer import Trainer

WORLD, EP = fake_cuda.GPUS, fake_cuda.GPUS
CANVAS, WINDOW = 256, 1024  # of the released model
MEMORY_NEAR = 0.10  # how far the plan's peak may be from the live bytes
LAUNCHES_NEAR = 0.15  # how far the plan's launches may be from those counted
MOST_WAITS = 1  # of the host, per layer and pass
ENGINE = Path(__file__).parents[1] / "canvastune"


@dataclass(frozen=True)
class Case:
    """A step to run."""

    method: str
    tokens: int = 111  # of an example before its last block is filled, of which
    prefix: int = 110  # one more than a multiple of a block is left, so that the fill is longest
    experts: bool = False  # adapters on experts
    blocks: int = 1
    examples: int = 1  # per rank
    coin: bool = True  # whether this rank has a self-conditioned example; another one has
    recomputes: bool = False  # activation checkpointing
    kernels: bool = True  # `train.triton_kernels`
    most_launches: int = 0  # at full depth; 0: no bar

    @property
    def sequence(self) -> int:
        """Return the tokens of the sequence, which the plan's memory assumes for `tokens`."""
        return self.tokens + CANVAS - 1


CASES = {
    "lora": Case("lora", most_launches=MOST_LAUNCHES),
    "lora, not self-conditioned": Case("lora", coin=False, most_launches=MOST_LAUNCHES),
    "lora, checkpointed": Case("lora", recomputes=True),
    "lora, experts": Case("lora", experts=True),
    # A multiple of 16 rows, for which Triton compiles other kernels.
    "lora, 4 blocks": Case("lora", tokens=1025, prefix=256, blocks=4),
    "lora, 8 examples": Case("lora", examples=8, recomputes=True),
    "lora, longest": Case("lora", tokens=1024, prefix=255),
    "lora, no kernels": Case("lora", kernels=False),
    "full": Case("full", most_launches=MOST_LAUNCHES),
    "full, checkpointed": Case("full", recomputes=True),
    "full, longest": Case("full", tokens=1024, prefix=255),
    "full, 8,192 tokens": Case("full", tokens=7937, prefix=256, recomputes=True),
}


def recipe(case: Case) -> RunConfig:
    """Return the recipe of a case: the shipped one's values."""
    batch = case.examples * WORLD
    return parse_config(
        {
            "name": "dry-run",
            "seed": 42,
            "model": {"id": "google/diffusiongemma-26B-A4B-it"},
            "data": {"source": "made", "seq_length": case.tokens},
            "objective": {"blocks": case.blocks},
            "train": {
                "method": case.method,
                "steps": 800,
                "global_batch_size": batch,
                "activation_checkpointing": case.recomputes,
                "triton_kernels": case.kernels,
            },
            "lora": {"rank": 16, "alpha": 32, "experts": case.experts},
            "optimizer": {"lr": 1.5e-4, "warmup_steps": 25, "betas": [0.95, 0.99]},
            "parallel": {"nproc_per_node": WORLD, "ep": EP},
        }
    )


def measure(case: Case, layers: int | None, scratch: Path) -> dict[str, Any]:
    """Run two steps of a case; return the second one's account."""
    config = recipe(case)
    shipped = json.loads(SHIPPED_CONFIG.read_text(encoding="utf-8"))
    if layers is not None:  # the last ones: sliding layers, then a full one
        text = shipped["text_config"]
        text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][-layers:]}
    model_json = scratch / "config.json"
    model_json.write_text(json.dumps(shipped), encoding="utf-8")
    model_config = read_model_config(model_json)
    text_config = model_config.text_config
    disable_progress_bar()
    vocabulary = text_config.vocab_size
    write_random_rows(scratch / "data", 64, vocabulary, tokens=case.tokens, prefix=case.prefix)
    device = fake_cuda.FakeDevice(ENGINE, ep=EP)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    started = time.perf_counter()
    try:
        with device:
            cuda = select_device()
            model = sharded_model(config, model_config, WORLD, "cuda")
            model.to_empty(device=cuda)
            model.lm_head.weight = model.model.decoder.embed_tokens.weight
            checkpoints = types.SimpleNamespace(failed=False, wait_staged=lambda: None)
            trainer = make_trainer(config, model, model_config, scratch / "data", checkpoints)
            step = next(number for number in range(64) if _coins(trainer, number) == case.coin)
            weights = device.now
            for _ in range(2):  # the first step makes the optimizer's state
                trainer.progress.step = step
                device.reset()
                trainer.train_step()
            plan = make_plan(config, model_json, WORLD)
            result = {
                "layers": text_config.num_hidden_layers,
                "tokens": case.sequence,
                "passes": 2 + case.recomputes,  # self-conditioning, forward, recomputation
                "weights": weights,
                "peak": device.peak,
                "at_peak": device.at_peak,
                "planned": plan.memory_bytes,
                "planned_launches": round(plan.seconds.launches / LAUNCH_SECONDS),
                "launches": sum(device.kernels.values()),
                "by_kernel": dict(device.kernels.most_common(40)),
                "by_line": dict(device.places.most_common(60)),
                "waits": sum(device.waits.values()),
                "waits_by_line": dict(device.waits.most_common()),
                "uploads": dict(device.uploads),
                "attention": dict(device.attention),
                "compiled": dict(device.compiled),
                "broken": dict(device.broken),
                "triton": sorted(device.triton, key=repr),
                "received": dict(device.received),
            }
            del trainer, model
        return result | {"seconds": time.perf_counter() - started}
    finally:
        dist.destroy_process_group()
        gc.collect()


def missed(name: str, result: dict[str, Any]) -> list[str]:
    """Return a line per bar that a case's account misses."""
    case, found = CASES[name], [f"{name}: {what}" for what in result["broken"]]
    for slow, why in (("math", "unfused, in float32"), ("cudnn", "a plan compiled per shape")):
        calls = {what: n for what, n in result["attention"].items() if what.startswith(slow)}
        found += [f"{name}: {n} attention calls on {what}: {why}" for what, n in calls.items()]
    found += [f"{name}: {what} is compiled just in time" for what in result["compiled"]]
    most_waits = MOST_WAITS * result["passes"] * result["layers"] + 1
    if result["waits"] > most_waits:
        found.append(f"{name}: {result['waits']} host waits, expected {most_waits}")
    if case.most_launches and result["launches"] > case.most_launches:
        found.append(f"{name}: {result['launches']} launches, expected {case.most_launches}")
    # The plan counts launches with the kernels, and of examples whose last block is not filled.
    comparable = case.kernels and case.sequence <= WINDOW
    if comparable and abs(result["planned_launches"] / result["launches"] - 1) > LAUNCHES_NEAR:
        found.append(
            f"{name}: {result['launches']} launches, the plan has {result['planned_launches']}"
        )
    if abs(result["planned"] / result["peak"] - 1) > MEMORY_NEAR:
        planned, live = result["planned"] / 1e9, result["peak"] / 1e9
        found.append(f"{name}: planned {planned:.2f} GB, live bytes {live:.2f} GB")
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the cases as a Markdown table."""
    lines = [
        "| case | tokens | host waits | launches | attention calls | uploads | peak, GB | planned, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        attention = ", ".join(f"{calls} {backend}" for backend, calls in by_backend(found).items())
        lines.append(
            f"| {name} | {found['tokens']:,} | {found['waits']} | {found['launches']:,} |"
            f" {attention} | {sum(found['uploads'].values())} | {found['peak'] / 1e9:.2f} |"
            f" {found['planned'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def by_backend(result: dict[str, Any]) -> dict[str, int]:
    """Return the number of attention calls by backend."""
    backends: dict[str, int] = {}
    for what, calls in result["attention"].items():
        backend = what.partition(":")[0]
        backends[backend] = backends.get(backend, 0) + calls
    return backends


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the performance page shows of a case."""
    keys = ("layers", "tokens", "waits", "launches", "planned_launches", "peak", "planned")
    return {key: result[key] for key in keys} | {"attention": by_backend(result)}


def _coins(trainer: Trainer, step: int) -> bool | None:
    """Return whether this rank has a self-conditioned example in a step, None if no rank has."""
    first = step * trainer.config.train.global_batch_size
    (forward,) = trainer._shares(first)
    if not trainer.data.any_self_conditioned(position for own in forward for position in own):
        return None
    return trainer.data.any_self_conditioned(forward[trainer.rank])


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser("tools.gpu_dry_run", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, help="of the model, its last ones; default: all")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all of them")
    parser.add_argument("--json", type=Path, help="also gets the accounts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    here = machine()  # before it pretends to be another
    fake_cuda.pretend()
    results: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    for name in options.case or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = measure(CASES[name], options.layers, Path(scratch))
        lines += missed(name, results[name])
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.layers is None and options.case is None:
        cases = {name: summary(found) for name, found in results.items()}
        write_result("gpu_dry_run", {"machine": here, "cases": cases})
    print(table(results))
    print("\n".join(f"missed: {line}" for line in lines) or "every bar is met")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

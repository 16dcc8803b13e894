"""`python -m benchmarks.planner`: the plan against the engine, on models from tiny to mid-size and
1 to 8 ranks, without a GPU.

Runs the forwards and backwards of one rank's step for each case, with every collective's memory but
no other rank, and counts
the storages that are alive, the FLOPs of every operation, and the bytes that the collectives would
bring from other ranks.
Writes docs/planner.md and benchmarks/results/planner.json; with --page only the page.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from benchmarks.engine import bench_recipe
from benchmarks.instruments.live_bytes import CPU_FORMULAS, measure
from benchmarks.measure import RESULTS, ROOT, say, write_result
from benchmarks.synthetic_checkpoint import described
from canvastune.config import load_config
from canvastune.perf_model import flops
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.checkpoints import DISK_RATE, PIN_RATE
from canvastune.perf_model.hardware import (
    ACCELERATORS,
    BANDWIDTH_SHARE,
    LINK_SHARE,
    MATMUL_SHARE,
)
from canvastune.perf_model.launches import LAUNCH_SECONDS, WAIT_SECONDS
from canvastune.perf_model.memory import StepShape, memory_timeline, peak
from canvastune.planner.plan import Plan
from canvastune.planner.planner import SHIPPED_CONFIG, make_plan

PAGE = ROOT / "docs" / "planner.md"
BOUND = 0.10
QUANTITIES = ("memory", "flops", "bytes")
MODELS = {
    "tiny": {"layers": 4, "hidden": 128, "experts": 16, "vocabulary": 2048, "canvas": 32},
    "small": {"layers": 6, "hidden": 256, "experts": 32, "vocabulary": 8192, "canvas": 32},
    "mid": {"layers": 8, "hidden": 512, "experts": 64, "vocabulary": 32768, "canvas": 64},
}


@dataclass(frozen=True)
class Case:
    """A model and one rank's step; `seq_length` clean tokens an example."""

    model: str
    method: str
    precision: str
    ranks: int
    ep: int
    seq_length: int
    micro_batch: int = 1
    micro_steps: int = 1
    checkpointing: bool = True
    self_conditioned: bool = True

    def step(self) -> StepShape:
        return StepShape(
            world_size=self.ranks,
            ep=self.ep,
            micro_batch=self.micro_batch,
            micro_steps=self.micro_steps,
            clean=self.seq_length,
            canvas=MODELS[self.model]["canvas"],
            checkpointing=self.checkpointing,
            self_conditioning=float(self.self_conditioned),
        )

    def __str__(self) -> str:
        forwards = f"{self.micro_steps} x " if self.micro_steps > 1 else ""
        extras = ("checkpointed" if self.checkpointing else "all kept") + (
            "" if self.self_conditioned else ", one pass"
        )
        kind = f"{self.model}, {self.method}, {self.precision} | {self.ranks} / {self.ep}"
        return f"{kind} | {forwards}{self.micro_batch} x {self.seq_length}, {extras}"


CASES = [
    Case("tiny", "full", "float32", 1, 1, 128),
    Case("tiny", "full", "bfloat16", 1, 1, 128, micro_batch=4, checkpointing=False),
    Case("tiny", "lora", "bfloat16", 1, 1, 256, micro_batch=2),
    Case(
        "tiny",
        "full",
        "bfloat16",
        2,
        1,
        128,
        micro_batch=2,
        checkpointing=False,
        self_conditioned=False,
    ),
    Case("tiny", "lora", "float32", 2, 2, 128, micro_batch=2),
    Case("tiny", "full", "bfloat16", 4, 2, 128, micro_steps=2),
    Case("tiny", "lora", "bfloat16", 8, 8, 256, micro_batch=2),
    Case("tiny", "full", "float32", 8, 4, 128, micro_batch=4, checkpointing=False),
    Case("small", "full", "float32", 1, 1, 256),
    Case("small", "full", "bfloat16", 1, 1, 256, micro_batch=2, checkpointing=False),
    Case(
        "small",
        "lora",
        "bfloat16",
        1,
        1,
        512,
        micro_batch=2,
        checkpointing=False,
        self_conditioned=False,
    ),
    Case("small", "full", "bfloat16", 2, 2, 256, micro_batch=2),
    Case("small", "lora", "bfloat16", 2, 1, 256, micro_batch=4),
    Case("small", "full", "float32", 4, 4, 256, micro_batch=2, self_conditioned=False),
    Case("small", "lora", "bfloat16", 4, 2, 512, micro_batch=2, micro_steps=2),
    Case("small", "full", "bfloat16", 8, 8, 256, micro_batch=4, checkpointing=False),
    Case("mid", "full", "bfloat16", 1, 1, 512),
    Case("mid", "lora", "bfloat16", 1, 1, 512, micro_batch=2),
    Case("mid", "full", "bfloat16", 2, 2, 512, micro_batch=2),
    Case("mid", "lora", "float32", 2, 1, 512, checkpointing=False),
    Case("mid", "full", "bfloat16", 4, 2, 512, micro_batch=2, micro_steps=2),
    Case("mid", "lora", "bfloat16", 4, 4, 512, micro_batch=4),
    Case("mid", "full", "bfloat16", 8, 8, 1024),
    Case("mid", "lora", "bfloat16", 8, 4, 1024, micro_batch=2, checkpointing=False),
]


class Flops(TorchDispatchMode):
    """Only PyTorch's count of FLOPs: its `FlopCounterMode` also follows modules, and so keeps what
    checkpointing frees.
    """

    formulas = flop_registry | {
        operation: shape_wrapper(formula) for operation, formula in CPU_FORMULAS.items()
    }

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def compare(case: Case) -> dict[str, dict[str, float]]:
    """Return the predicted and measured value of each quantity: peak bytes, FLOPs and bytes
    received of a rank's step.
    """
    config = bench_recipe(
        case.ep,
        method=case.method,
        precision=case.precision,
        activation_checkpointing=case.checkpointing,
    )
    model, step = described(**MODELS[case.model]), case.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        architecture = read_architecture(config, Path(folder))
    found = memory_timeline(architecture, step)
    found.pop("update")  # what is measured ends with the last backward
    predicted = {
        "memory": sum(peak(found)[1].values()),
        "flops": flops.count_flops(architecture, step).total,
        "bytes": sum(flops.count_bytes(architecture, step).values()),
    }
    with Flops() as counter:
        live = measure(config, model, step)
    measured = {"memory": live.peak, "flops": counter.total, "bytes": sum(live.received.values())}
    return {
        name: {"predicted": float(predicted[name]), "measured": float(measured[name])}
        for name in QUANTITIES
    }


def ratio(values: dict[str, float]) -> float:
    """Predicted over measured; nothing predicted where nothing was measured is exact."""
    return (
        values["predicted"] / values["measured"]
        if values["measured"]
        else 1.0 + values["predicted"]
    )


def main(arguments: list[str]) -> int:
    if arguments == ["--page"]:
        kept = json.loads((RESULTS / "planner.json").read_text(encoding="utf-8"))
        PAGE.write_text(page(kept["cases"]), encoding="utf-8")
        return 0
    torch.set_num_threads(1)  # a second thread of autograd would not be counted
    rows: list[dict[str, Any]] = []
    for case in CASES:
        started = time.monotonic()
        found = compare(case)
        rows.append({"case": dataclasses.asdict(case), **found})
        ratios = ", ".join(f"{name} {ratio(values):.3f}" for name, values in found.items())
        say("planner", f"{case}: {ratios} ({time.monotonic() - started:.0f} s)")
    write_result("planner", {"models": MODELS, "cases": rows})
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")
    worst = {name: max(abs(ratio(row[name]) - 1) for row in rows) for name in QUANTITIES}
    say(
        "planner",
        f"the worst errors: {', '.join(f'{name} {error:.1%}' for name, error in worst.items())}",
    )
    return int(max(worst.values()) > BOUND)


def page(rows: list[dict[str, Any]]) -> str:
    """Return docs/planner.md."""
    worst = {name: max(abs(ratio(row[name]) - 1) for row in rows) for name in QUANTITIES}
    models = "\n".join(
        f"- **{name}**: {m['layers']} layers, hidden size {m['hidden']}, {m['experts']} experts of"
        f" {m['hidden'] // 4} (8 per token), vocabulary {m['vocabulary']}, canvas {m['canvas']}"
        for name, m in MODELS.items()
    )
    table = "\n".join(
        f"| {Case(**row['case'])} | "
        + " | ".join(_cells(row[name], 1e9 if name == "flops" else 1e6) for name in QUANTITIES)
        + " |"
        for row in rows
    )
    return f"""# The planner's accuracy

`canvastune plan` computes what a run needs from `config.json` alone. The first table on this page compares its formulas with the engine, as
predicted / measured and their ratio, for {len(rows)} steps. The largest errors are {worst["memory"]:.1%} for memory, {worst["flops"]:.1%} for FLOPs and {worst["bytes"]:.1%} for bytes.
`python -m benchmarks.planner` measures that table again.

**How it was measured.** One rank's step runs on a CPU, with all its forward and backward passes and with the optimizer state in memory.
The other ranks are simulated: collectives allocate the memory that they would need but transfer nothing, and the experts receive as
many rows as the rank sends. *Memory* is the peak of the sum of live storages, sampled after every operation. *FLOPs* are those
of all matmuls and attention calls that ran. *Bytes* are what all-gathers, reduce-scatters and all-to-alls would receive from other
ranks.

**What it does not show.** No GPU was used, so the plan contains allowances for the allocator's fragmentation, the buffers of the driver and
NCCL, and the kernels' workspace, and its times are estimates. Experts are assumed to be equally loaded. The models are
small compared with the released one, whose parameter counts and known sizes are tested separately.

{models}

The second column shows the number of ranks / the expert-parallel degree; the third shows a rank's forward passes x examples x tokens (two
numbers mean one forward pass). *One pass* is a step without self-conditioning. All numbers are for one rank; 1 MB is 1e6 bytes and 1 GFLOP
is 1e9 FLOPs.

| model, method, dtype | ranks / EP | step | memory, MB | | GFLOP | | received, MB | |
|---|---|---|---|---|---|---|---|---|
{table}

## Time

A step takes as long as the largest of these bounds, and the plan names it. None of them has been measured on a GPU. Nothing is assumed
to overlap with all-to-alls, the update, or the host's waits for the GPU: the time of these waits is included in every bound, and that of
all-to-alls and the update in every bound except kernel launches.

| bound | what is counted | rate |
|---|---|---|
| computation | FLOPs, and reading the weights | {MATMUL_SHARE:.0%} of the datasheet's, {BANDWIDTH_SHARE:.0%} of the memory's |
| all-gather and reduce-scatter | bytes received | {LINK_SHARE:.0%} of NVLink, or of the adapters between nodes |
| kernel launches | launches, about as many as a [run without a GPU](performance.md#simulated-gpus-waits-launches-and-memory) counts | {LAUNCH_SECONDS * 1e6:.0f} us |
| host waits for each grouped matmul | where PyTorch has no kernel for it (A100, L40S, float32), a wait, and then a matmul for each expert: launches and computation on the two sides of a wait do not overlap | {WAIT_SECONDS * 1e6:.0f} us per wait |

A step of two recipes on 8 GPUs of each type, with examples of 256 tokens (few of GSM8K's are longer):

| recipe | GPU | step, ms | bound by | launches | waits | loops over experts | their launches, ms | waits, ms |
|---|---|---|---|---|---|---|---|---|
{_steps()}

A checkpoint is copied to pinned host memory while the next step runs up to its update; the memory is pinned once, at {PIN_RATE / 1e9:.0f} GB/s per
process. Files are written at {DISK_RATE / 1e9:.0f} GB/s in the background. Copies of `gsm8k_sft`, with `train.checkpoint_every=100`:

| GPU | GB/s per GPU | copy, s | pinning, s | in a node's memory, GB |
|---|---|---|---|---|
{_copies()}
"""


def _steps() -> str:
    rows = []
    for name in ("gsm8k_lora", "gsm8k_sft"):
        for key in ("h100", "a100", "l40s"):
            plan = _plan(name, "data.seq_length=256", f"hardware.accelerator={key}")
            seconds = plan.seconds
            cells = (
                f"`{name}`",
                ACCELERATORS[key].title,
                f"{plan.step_seconds * 1e3:.0f}",
                seconds.bound,
                f"{plan.launches:,}",
                f"{plan.waits}",
                f"{plan.expert_loops}",
                f"{seconds.expert_launches * 1e3:.1f}",
                f"{seconds.waits * 1e3:.1f}",
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _copies() -> str:
    rows = []
    for key in ("h100", "a100"):
        settings = (f"hardware.accelerator={key}", "train.checkpoint_every=100")
        plan = _plan("gsm8k_sft", *settings)
        cells = (
            ACCELERATORS[key].title,
            f"{ACCELERATORS[key].host_link:g}",
            f"{plan.checkpoint_times.staging:.2f}",
            f"{plan.checkpoint_times.pinning:.1f}",
            f"{plan.host_bytes / 1e9:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _plan(recipe: str, *settings: str) -> Plan:
    config = load_config(ROOT / "pipelines" / "recipes" / f"{recipe}.yaml", list(settings))
    return make_plan(config, SHIPPED_CONFIG, config.world_size)


def _cells(values: dict[str, float], unit: float) -> str:
    return (
        f"{values['predicted'] / unit:,.1f} / {values['measured'] / unit:,.1f} |"
        f" {ratio(values):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

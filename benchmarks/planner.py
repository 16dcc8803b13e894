"""`python -m benchmarks.planner`: the plan against the engine, on models from tiny to mid-size and
1 to 8 ranks, without a GPU.

Runs the forwards and backwards of one rank's step for each case, with every collective's memory but
no other rank, and counts
the storages that are alive, the FLOPs of every operation, and the bytes that the collectives would
bring from other ranks.
Writes docs/planner.md and benchmarks/results/planner.json.
"""

from __future__ import annotations

import dataclasses
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
from benchmarks.measure import ROOT, say, write_result
from benchmarks.synthetic_checkpoint import described
from canvastune.perf_model import flops
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.memory import StepShape, memory_timeline, peak

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


def main() -> int:
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

`canvastune plan` computes what a run needs from `config.json` only. The table on this page compares its formulas with the engine, as
predicted / measured and their ratio, for {len(rows)} steps. The largest errors are {worst["memory"]:.1%} for memory, {worst["flops"]:.1%} for FLOPs and {worst["bytes"]:.1%} for bytes.
`python -m benchmarks.planner` measures the table again.

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
"""


def _cells(values: dict[str, float], unit: float) -> str:
    return (
        f"{values['predicted'] / unit:,.1f} / {values['measured'] / unit:,.1f} |"
        f" {ratio(values):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())

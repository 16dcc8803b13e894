"""What docs/performance.md says of GPUs: counted without one, and measured by `benchmarks.gpu`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from benchmarks.measure import ROOT
from canvastune.config.loading import load_config
from canvastune.perf_model.hardware import LINK_SHARE, MATMUL_SHARE, find_accelerator
from canvastune.perf_model.launches import MOST_LAUNCHES
from canvastune.planner import make_plan
from canvastune.planner.planner import SHIPPED_CONFIG

# recipes, and the tokens of an example in the cases of tools/gpu_dry_run.py, and those of a full one
EXCHANGING = ("gsm8k_lora", "gsm8k_sft", "gsm8k_lora_throughput", "gsm8k_sft_throughput")
LENGTHS = (366, 1024)

# host waits, launches and unfused attention calls at commit 80fd2ae, counted by tools/gpu_dry_run.py
BEFORE = {"lora": (451, 19_634, 180), "full": (451, 17_775, 180)}


def most_launches(cases: dict[str, Any]) -> str:
    """Say whether the goal of launches is met by the `gsm8k` recipes' steps."""
    most = max(cases[name]["launches"] for name in ("lora", "full"))
    return f"It is {'met' if most <= MOST_LAUNCHES else 'missed'}: {most:,}."


def dry_run_row(name: str, case: dict[str, Any]) -> str:
    """Return the table row of a case of `tools.gpu_dry_run`."""
    slow = sum(case["attention"].get(backend, 0) for backend in ("math", "cudnn"))
    fused = sum(case["attention"].values()) - slow
    waits, launches, unfused = (
        f"{now:,}{f' ({then:,})' if then else ''}"
        for now, then in zip(
            (case["waits"], case["launches"], slow), BEFORE.get(name, (0, 0, 0)), strict=True
        )
    )
    planned = f"{case['planned'] / 1e9:.2f}" if case["planned"] else "-"
    return (
        f"| {name} | {waits} | {launches} | {case['planned_launches']:,} | {unfused} | {fused} | {case['peak'] / 1e9:.2f} |"
        f" {planned} |"
    )


def way_back_section() -> str:
    """Return the section on what it could save to overlap the return of the experts' results."""
    recipes = ROOT / "pipelines" / "recipes"
    rows = []
    for name in EXCHANGING:
        for tokens in LENGTHS:
            config = load_config(recipes / f"{name}.yaml", [f"data.seq_length={tokens}"])
            plan = make_plan(config, SHIPPED_CONFIG, config.world_size)
            card = find_accelerator(config.hardware.accelerator)
            seconds, way = plan.seconds, plan.seconds.exchange / 2
            hidden = dataclasses.replace(seconds, exchange=way).total
            dense = plan.flops_by_part["dense MLP"] / (card.bfloat16 * 1e12 * MATMUL_SHARE)
            rows.append(
                f"| {config.name} | {tokens:,} | {seconds.total * 1e3:,.1f} | {seconds.bound} |"
                f" {way * card.link * LINK_SHARE:,.1f} | {way * 1e3:,.1f} | {dense * 1e3:,.1f} |"
                f" {1 - hidden / seconds.total:.0%} |"
            )
    return f"""
### Returning the experts' results

These figures are computed by `canvastune plan` for eight H100s at {LINK_SHARE:.0%} of NVLink's rate, not measured. The rows that a layer sends to the
experts' ranks are transferred while its dense MLP computes, but the results that return are not. *Each way* is the transfer in one direction
in all passes of a step, including gradients; *maximum saving* is the difference if returning the results took no time.

| recipe | tokens per example | step, ms | bound by | each way, GB | each way, ms | dense MLP, ms | maximum saving |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

A layer has no other work with which the return could overlap: sending the rows already takes longer than the dense MLP. That work would have
to come from another half of the batch, but in `gsm8k-lora` and `gsm8k-sft`, a rank has a single example. Splitting the batch also doubles
the launches. With the batches of the `throughput` recipes, it could still save time; this has not been tried.
"""


def gpu_section(result: dict[str, Any]) -> str:
    """Return the section on what `benchmarks.gpu` measured; its second part may be missing."""
    steps, machine = result["steps"], result["machine"]
    rows = []
    for row in steps["lengths"]:
        for name, side in row["sides"].items():
            apart = side.get("gradient_difference")
            figures = (
                f"{side['failed']} | | | | "
                if "failed" in side
                else f"{side['seconds']:.3f} | {side['tokens_per_second']:,.0f} |"
                f" {side['utilisation']:.0%} | {side['memory_bytes'] / 1e9:.2f} |"
                f" {'' if apart is None else f'{apart:.1e}'}"
            )
            rows.append(f"| {row['seq_length']:,} | {name} | {figures} |")
    kernels: dict[tuple[str, str], int] = {}
    seen: Counter[str] = Counter()
    for row in steps["lengths"]:
        seen.update(row["attention_seen"] or {})
        for call in row["attention"] or ():
            taken = call["backend"], call["table"] or "not known for this device"
            kernels[taken] = kernels.get(taken, 0) + call["calls"]
    runs = [
        f"| {method} | {run['layers']} | {run['tokens_per_second']:,.0f} | {run['step_seconds']:.2f} |"
        f" {run['planned_step_seconds']:.2f} | {run['measured_bytes'] / 1e9:.2f} |"
        f" {run['planned_bytes'] / 1e9:.2f} | {run['utilisation']:.0%} |"
        for method, run in result.get("runs", {}).items()
    ]
    return f"""
## On a GPU

`tools/gpu_day.sh` ({machine["commit"]}, {machine["date"]}) ran on {machine["device"]} with torch {machine["torch"]}: {steps["layers"]} layers of
the released model's size, in bfloat16, forward and backward, on {steps["examples"]} examples of the same length. Utilization is relative to the
{steps["matmul_flops_per_second"] / 1e12:.3g} TFLOP/s measured in a large matmul. Memory is in addition to weights and gradients.
FlexAttention compiled {steps["compiled_graphs"]} graphs.

| tokens per example | step | seconds | tokens per second | utilization | memory, GB | difference of gradients from *chosen block* |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

| attention calls | kernel | according to `tools/attention_backends.py` |
|---|---|---|
{chr(10).join(f"| {calls:,} | {taken} | {table} |" for (taken, table), calls in kernels.items())}

Seen by the profiler: {", ".join(f"{calls:,} {name}" for name, calls in sorted(seen.items()))}.

The trainer, with one example per step, including the optimizer:

| method | layers | tokens per second | seconds | planned | peak memory, GB | planned | utilization |
|---|---|---|---|---|---|---|---|
{chr(10).join(runs) or "| not finished | | | | | | | |"}
{_saves(result.get("runs", {}).get("lora", {}).get("saves", []))}"""


def _saves(saves: list[dict[str, float]]) -> str:
    """Return a sentence on the checkpoints that were saved, the first with memory to be pinned."""
    if not saves:
        return ""
    times = "; ".join(
        f"{saved['copied_seconds']:.2f} s until it was copied, {saved['written_seconds']:.1f} s until"
        " it was written"
        for saved in saves
    )
    return f"\nTwo checkpoints of LoRA, {saves[0]['bytes'] / 1e9:.2f} GB each: {times}.\n"

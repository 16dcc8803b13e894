"""`python -m benchmarks.page`: docs/performance.md, drawn from benchmarks/results/."""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.measure import RESULTS, ROOT, say
from benchmarks.step import EFFICIENT, EXACT, GOALS, OURS

PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    found = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("step", "data", "merge", "pipeline")}
    PAGE.write_text(page(**found), encoding="utf-8")
    say("page", f"{PAGE.relative_to(ROOT)} written")
    return 0


def page(step: dict[str, Any], data: dict[str, Any], merge: dict[str, Any], pipeline: dict[str, Any]) -> str:
    """docs/performance.md."""
    here, rate = step["machine"], step["matmul_flops_per_second"]
    worst = max(row["gradient_difference"] for row in step["shapes"].values())
    goals = "; ".join(f"against {plain}, {faster}x faster and {leaner}x leaner" for plain, (faster, leaner) in GOALS.items())
    return f"""# How fast, and how lean

Measured against a plain implementation in the same run, on a CPU ({here["cores"]} cores, {here["device"]}, {here["threads"]} threads,
torch {here["torch"]}, {here["date"]}, commit {here["commit"]}). **Nothing here was run on a GPU.**
`python -m benchmarks.page` draws this page from `benchmarks/results/`. What ranks send each other: [scaling](scaling.md); predicted
against counted FLOPs and memory: [the planner](planner.md).

## The step

`python -m benchmarks.step`, float32, one process. The plain step (`benchmarks/plain_step.py`) is Hugging Face's modules called twice, on a
right-padded batch with dense masks and whole float32 logits: *all blocks* decodes every response block and scores one, *chosen block*
decodes the scored one alone. Same weights, batch and draws. Our gradient differs from the plain one by at most {worst:.0e} of its norm
(goal: below {EXACT:.0e}). *Efficiency* is the FLOPs that the loss needs (scored rows, real tokens, nothing twice) over the seconds
times this machine's rate in a large matmul, {rate / 1e9:.0f} GFLOP/s; the goal is {EFFICIENT:.0%}. Memory is what the step takes above
weights and gradients.
*Checkpointed* recomputes each layer in the backward pass: a recipe's default.

| shape | step | seconds | memory, MB | efficiency | against all blocks | against the chosen block |
|---|---|---|---|---|---|---|
{chr(10).join(line for row in step["shapes"].values() for line in _step_rows(row))}

Geometric means (goals: {goals}):

| our step | against | faster | leaner |
|---|---|---|---|
{chr(10).join(line for line in _means(step["geometric_mean"]))}

{_verdict(step)}

## What made it so

- **No padded token, no mask.** Each example attends by itself; what a canvas sees is one stretch of keys, so neither call has a mask. On
  sliding layers longer than the window, a window of rows goes at a time.
- **The chosen block alone**, in one pass with the clean tokens; pass 1 for the examples with a coin alone.
- **Logits in chunks**, gradients formed beside them, in place: soft-capped logits are bounded, so no maximum has to be found and taken off.
- **One gradient for the embedding table.** Its uses (head, lookups, soft embedding) add to one buffer, where autograd would make a [V, H]
  tensor for each.
- **Expert rows are put back by their permutation**, not added to zeros one by one; deterministic on every device.
- **The last layer stays gathered** between its uses, and a rank without a coin takes part in pass 1 with two tokens.
- **Ranks finish together**: a step's examples are dealt by their tokens and coins (below). The examples of a step, their noise and its
  gradient stay what they were.

Not done: fused norms and activations, checkpointing that keeps some activations, reuse of the prefix's keys in pass 1,
`torch.compile`, FlexAttention.

## Data, merge, pipeline

| what | measured | goal |
|---|---|---|
| `benchmarks.data`: rows per second over `datasets.map`, a plain tokenizer call | {data["one_process"]["ratio"]:.2f}x | 1x |
| the same with the chat template on both sides | {_templated(data)} | |
| two processes over two | {data["two_processes"]["ratio"]:.2f}x | 1x |
| memory, 20,000 -> 100,000 rows, the largest process | {_largest(data, "20000")} -> {_largest(data, "100000")} MB | constant |
| `benchmarks.merge`: speed over a plain copy of the same bytes | {merge["merge_over_copy"]:.2f}x | 1x |
| its memory | {merge["merge"]["extra_bytes"] / 1e6:.0f} MB | a shard, 1,000 MB |
| `benchmarks.pipeline`: outside of the steps | {pipeline["outside"]:.1f} s | 5 s |

`map` renders no chat template and proves nothing; preparation renders each conversation twice, to prove the response's span. The busiest
rank's work over the mean, GSM8K's lengths, in tokens of both passes:

| ranks x examples x forwards | by position | dealt |
|---|---|---|
{chr(10).join(_balance(row) for row in data["balance"])}
"""


def _step_rows(row: dict[str, Any]) -> list[str]:
    lines = []
    for name in OURS:
        ratios = " | ".join(f"{row[name][plain]['faster']:.2f}x faster, {row[name][plain]['leaner']:.1f}x leaner" for plain in GOALS)
        memory = f"{row['extra_memory_bytes'][name] / 1e6:.0f}"
        lines.append(f"| {row['about']} | {name} | {row['seconds'][name]:.2f} | {memory} | {row[name]['efficiency']:.0%} | {ratios} |")
    for plain in GOALS:
        efficiency = f"{row['plain_efficiency']:.0%}" if plain == "chosen block" else ""
        lines.append(f"| | {plain} | {row['seconds'][plain]:.2f} | {row['extra_memory_bytes'][plain] / 1e6:.0f} | {efficiency} | | |")
    return lines


def _means(summary: dict[str, Any]) -> list[str]:
    return [
        f"| {ours} | {plain} | {ratios['faster']:.2f}x | {ratios['leaner']:.2f}x |"
        for ours, by_plain in summary.items()
        for plain, ratios in by_plain.items()
    ]


def _verdict(step: dict[str, Any]) -> str:
    """Which goals are missed, by which of our steps."""
    missed = [
        f"{ours}, {quantity} than {plain}"
        for ours, by_plain in step["geometric_mean"].items()
        for plain, ratios in by_plain.items()
        for quantity, goal in zip(("faster", "leaner"), GOALS[plain], strict=True)
        if ratios[quantity] < goal
    ]
    slow = [row["about"] for row in step["shapes"].values() if row["ours"]["efficiency"] < EFFICIENT]
    said = f"Goals missed: {'; '.join(missed)}." if missed else "Every ratio reaches its goal."
    return said + (f" Efficiency is below its goal in: {'; '.join(slow)}." if slow else "")


def _templated(data: dict[str, Any]) -> str:
    rates = data["one_process"]["rows_per_second"]
    return f"{rates['prepare_data'] / rates['map_chat_template']:.2f}x"


def _largest(data: dict[str, Any], rows: str) -> str:
    return f"{max(data['memory'][rows]['anonymous_bytes']) / 1e6:.0f}"


def _balance(row: dict[str, Any]) -> str:
    layout = f"{row['ranks']} x {row['micro_batch']} x {row['forwards']}"
    return f"| {layout} | {row['by_position']['step']:.2f} | {row['shared_out']['step']:.2f} |"


if __name__ == "__main__":
    sys.exit(main())

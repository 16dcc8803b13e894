"""`python -m benchmarks.page`: write docs/performance.md, scaling.md and planner.md from
benchmarks/results/.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from typing import Any

from benchmarks import blocks as several_blocks
from benchmarks import evaluation as answers
from benchmarks import peers as released_peers
from benchmarks import pipeline_plan as whole_pipeline
from benchmarks import planner, scaling
from benchmarks.gpu_page import dry_run_row, gpu_section, most_launches
from benchmarks.measure import RESULTS, ROOT, say
from benchmarks.startup import GOALS as start_goals
from benchmarks.startup import lines as startup_lines
from benchmarks.step import EFFICIENT, EXACT, GOALS, OURS
from canvastune.perf_model.launches import LAUNCH_SECONDS, MOST_LAUNCHES

FILES = (
    *("step", "first_pass", "growth", "lengths", "blocks", "blocks_learning"),
    *("data", "merge", "pipeline", "gpu_dry_run"),
)
PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    results = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in (*FILES, "scaling", "planner")
    }
    measured = results["scaling"]
    pages = {
        PAGE: page(
            **{name: results[name] for name in FILES},
            evaluation=_if_there("evaluation"),
            pipeline_plan=_if_there("pipeline_plan"),
            gpu=_if_there("gpu"),
            startup=_if_there("startup"),
            peers=_if_there("peers"),
            step_commits=_if_there("step_commits"),
        ),
        scaling.PAGE: scaling.page(measured["cases"], measured["released"], measured["machine"]),
        planner.PAGE: planner.page(results["planner"]["cases"]),
    }
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
        say("page", f"{path.relative_to(ROOT)} written")
    return 0


def _if_there(name: str) -> dict[str, Any] | None:
    """Return a result that may not have been measured: a GPU is only lent at times."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def page(
    step: dict[str, Any],
    first_pass: dict[str, Any],
    growth: dict[str, Any],
    lengths: dict[str, Any],
    blocks: dict[str, Any],
    blocks_learning: dict[str, Any],
    data: dict[str, Any],
    merge: dict[str, Any],
    pipeline: dict[str, Any],
    gpu_dry_run: dict[str, Any],
    evaluation: dict[str, Any] | None,
    pipeline_plan: dict[str, Any] | None,
    gpu: dict[str, Any] | None,
    startup: dict[str, Any] | None,
    peers: dict[str, Any] | None,
    step_commits: dict[str, Any] | None,
) -> str:
    """Return docs/performance.md."""
    here, rate = step["machine"], step["matmul_flops_per_second"]
    at = functools.partial(_at, usual=here["device"])
    worst = max(row["gradient_difference"] for row in step["shapes"].values())
    goals = "; ".join(
        f"against {plain}, {faster}x faster and {leaner}x less memory"
        for plain, (faster, leaner) in GOALS.items()
    )
    return f"""# Speed and memory

Measured against a plain implementation in the same run, on a CPU ({here["cores"]} cores, {here["device"]} unless another is named,
{here["threads"]} threads, torch {here["torch"]}). **{"Nothing but [the section on it](#on-a-gpu)" if gpu else "None of this"} has been run on a GPU.** Each section names the commit it was measured at.
`python -m benchmarks.page` generates this page from `benchmarks/results/`. Communication between ranks: [scaling](scaling.md); predicted
versus counted FLOPs and memory: [the planner](planner.md).

## The step

`python -m benchmarks.step`{at(step)}, float32, one process. The plain step (`benchmarks/plain_step.py`) is Hugging Face's
modules called twice, on a right-padded batch with dense masks and whole float32 logits: *all blocks* decodes every response block and
scores one, *chosen block* decodes only the scored one. Same weights, batch and draws. Our gradient differs from the plain one by at most
{worst:.0e} of its norm
(goal: below {EXACT:.0e}). *Efficiency* is the FLOPs that the loss needs (scored rows, real tokens, no recomputation) divided by the seconds times this machine's rate
in a large matmul, {rate / 1e9:.0f} GFLOP/s; the goal is {EFFICIENT:.0%}. Memory is what the step needs in addition to weights and
gradients.
*Ours* keeps what the backward pass needs, as the plain step does (`train.activation_checkpointing: false`); *selective* recomputes every
second layer, *checkpointed* every layer, the default of a recipe. Each step is timed in its own steady state, after one warm-up run.
Timed runs per side, of which the median is shown: {_rounds(step)}.

| shape | step | seconds | memory, MB | efficiency | compared with all blocks | compared with the chosen block |
|---|---|---|---|---|---|---|
{chr(10).join(line for row in step["shapes"].values() for line in _step_rows(row))}

Geometric means (goals: {goals}):

| our step | compared with | faster | less memory |
|---|---|---|---|
{chr(10).join(line for line in _means(step["geometric_mean"]))}

{_verdict(step)} {_ceiling(step)}
{_since(step_commits, at(step_commits)) if step_commits else ""}
{_beside(peers, at(peers)) if peers else ""}
## What makes the difference

- **No padding, no mask.** Attention runs on each example separately; the keys that a canvas sees are contiguous, so neither call needs a mask. On
  sliding-window layers, if an example is longer than the window, attention runs on half a window of rows at a time.
- **Only the chosen block**, in one pass with the clean tokens; a self-conditioning pass (pass 1) only for self-conditioned examples.
- **Logits in chunks, on a CPU in tiles** that stay in its caches from the matmul to the gradient; gradients are computed with them, in
  place. Soft-capped logits are bounded, so no maximum has to be found and subtracted; factors that are constant over a row are applied to
  the row's other operand.
- **One gradient for the embedding table.** Its uses (head, lookups, soft embedding) add to one buffer, where autograd would allocate a
  [V, H] tensor for each.
- **Expert rows** are gathered again in the backward pass instead of kept, weighted where they are narrowest (before the last projection),
  and summed per token in one pass; this is deterministic on every device.
- **Norms and gated MLPs keep only their inputs**; transformers' norm keeps four tensors of its input's size.
- **On CUDA, few launches.** Norms with their residuals and scales, the heads' norms and rotation, gates, the choice of experts and the
  sorting of their rows are one Triton kernel each way (`train.triton_kernels`); without a C compiler or Triton, the norms are torch's fused
  one and the rest is PyTorch's operators. Adapters on one input share their first product, and are added inside of a matmul. The norm of
  all gradients is multi-tensor.
- **Dispatch overlaps with the dense MLP**: rows are sent to the ranks of their experts while it computes, and their gradients while its
  backward pass does; FSDP gathers the next layer meanwhile. Returning the results and their gradients is blocking. How much the overlap
  saves on CUDA has not been measured.
- **Pass 1 computes only the clean tokens before the chosen block**, which are all that its canvas sees (below).
- **The last layer stays gathered** between its uses, and a rank without a self-conditioned example joins pass 1 with two padding tokens.
- **The host waits for the device once per step**, where the losses and the norm are logged, and, under expert parallelism, where it must
  know how many rows each rank receives.
- **Ranks finish together**: a step's examples are balanced by their tokens and self-conditioning draws (below). The examples of a step,
  their noise and the gradient do not change.

`train.attention: flex` computes a whole batch in one FlexAttention kernel per layer on CUDA; on a CPU its gradients equal those of `sdpa`. It
has not been measured on a GPU, so it is not the default. `torch.compile` of the layers is not used: it could not be measured on its
target hardware. `tools/gpu_day.sh` is ready to run on a GPU, and is tested at small sizes. It covers sequence lengths of 512 to 4,096 with layers of the released model's size,
both kinds of attention and the plain step, the kernel that each attention call takes, utilization of the card's measured matmul rate, the five largest costs by name, and 20 steps of
the trainer against its plan.
{gpu_section(gpu) if gpu else ""}
## On a GPU, counted without one

`make test-gpu-dry`{at(gpu_dry_run)} runs training steps of the released model on eight H100 that are not there
([how](verification.md#cuda-without-a-gpu)), with the batch of the `gsm8k` recipes: per rank and step, an example of 240 tokens (*longest*:
1,024) or eight. *Before* is commit 80fd2ae, counted in the same way. Launches are an estimate; times are not known.

| case | host waits (before) | launches (before) | planned | attention calls that are unfused or compile a plan per shape (before) | fused ones | peak memory, GB | planned, GB |
|---|---|---|---|---|---|---|---|
{chr(10).join(dry_run_row(*case) for case in gpu_dry_run["cases"].items())}

The goal is at most {MOST_LAUNCHES:,} launches in a step of the `gsm8k` recipes. {most_launches(gpu_dry_run["cases"])} They come from Triton kernels,
which a GPU has not run yet, and from keeping activations (`train.activation_checkpointing: false`): the batch of 8 leaves room for them;
*checkpointed* recomputes each layer. `canvastune plan` counts launches at {LAUNCH_SECONDS * 1e6:.0f} us each as a bound of a step's time, and says which
bound is the largest.

## Pass 1, three ways

`python -m benchmarks.first_pass`{at(first_pass)}: a step whose examples are all self-conditioned, with pass 1 *before* (on the
clean tokens before the block, as in the engine) or with keys *reused* (the prefix's keys of pass 2, which then runs clean tokens and
canvas separately), relative to a pass 1 on all clean tokens. Loss and gradients differ by at most {first_pass["worst_difference"]:.0e}.
The four ranks share two cores, so their seconds mean little.

| sequence length, ranks / EP | before: FLOPs | seconds | received | peak | reused: FLOPs | seconds | received | peak |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(_first_pass(case) for case in first_pass["cases"] if case["chosen"] == "middle")}

Reuse saves slightly more FLOPs, but gathers each layer one more time under FSDP and reduces its gradients twice, is slower on one rank, and would
make pass 1 see keys with dropout applied.

## From 1 to {growth["rows"][-1]["examples"]} examples

`python -m benchmarks.growth`{at(growth)}: examples of different lengths in one forward pass, with activation checkpointing. Seconds grow as the number of tokens to the power of
{growth["exponent_of_seconds_mapped_anew"]:.2f}; of {growth["exponent_of_seconds"]:.2f} where the process keeps its memory
between uses, as CUDA's allocator does (the C library maps each tensor above 32 MiB again).

| examples | tokens | ms per token | ms per token, memory kept | MB per example, live tensors | MB per example, process |
|---|---|---|---|---|---|
{chr(10).join(map(_growth, growth["rows"]))}

## One example of up to {max(row["clean"] for row in lengths["rows"]):,} tokens

`python -m benchmarks.lengths`{at(lengths)}: a training step on one long example at small width, with activation checkpointing. Memory per
token does not grow with the length; the counted FLOPs do, by the attention of full-attention layers, and the machine computes them no
slower in long examples than in short ones. Seconds vary by up to a factor of two between runs: the machine is shared.

| tokens | blocks of the answer in a step | kB per token in addition to weights and gradients | seconds | GFLOP counted | GFLOP per second | attention, us per token: a sliding-window layer | a full-attention layer |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(_length, lengths["rows"]))}

## Every block of an answer in one step

`python -m benchmarks.blocks`{at(blocks)}: `objective.blocks: all` against one block of each answer, and against a row for each block, as
Megatron-Bridge's data set has it: written plainly on Hugging Face's modules (*plain*), and in our packed pass. Gradients equal those of the
rows to {max(row["gradient_difference"] for row in blocks["answers"].values()):.0e}. A step of answers of many blocks takes about twice the
time of one block's, whatever their number is: the clean tokens are as many as the canvases' together.

| blocks of an answer | scored rows per second, times one block's (goal {several_blocks.RATE}) | seconds of a step, times (at most {several_blocks.SLOWER}) | rate, times a row for each block, plain (goal {several_blocks.BY_ROW:g}) | packed | expert rows sent per scored row, times fewer (goal {several_blocks.BY_ROW:g}) | peak memory, checkpointed, times (at most {several_blocks.MEMORY}) |
|---|---|---|---|---|---|---|
{chr(10).join(_blocks(*each) for each in blocks["answers"].items())}

`python -m benchmarks.blocks_learning`{at(blocks_learning)}: the tiny model learns running sums, answers of 16 to 18 blocks;
{blocks_learning["steps"]["1"]} steps with one block, {blocks_learning["steps"]["all"]} with all. `all` reaches the first run's final
validation loss after {blocks_learning["share_of_wall_time"]:.0%} of its time (geometric mean of three seeds; goal: a third).

![Validation loss by seconds in training steps, three seeds: all blocks reach the final loss of one block in a fraction of the time](blocks.png)

{_answering(evaluation, at(evaluation)) if evaluation else ""}{_whole(pipeline_plan, at(pipeline_plan)) if pipeline_plan else ""}## Data, merge, pipeline

| what | measured | goal |
|---|---|---|
| `benchmarks.data`{at(data)}: rows per second relative to `datasets.map` with a plain tokenizer call | {data["one_process"]["ratio"]:.2f}x | 1x |
| the same with the chat template on both sides | {_templated(data)} | |
| the same with two processes on both sides | {data["two_processes"]["ratio"]:.2f}x | 1x |
| memory, 20,000 -> 100,000 rows, the largest process | {_largest(data, "20000")} -> {_largest(data, "100000")} MB | constant |
| the largest process with 100,000 conversations with tools | {_largest(data, "tools")} MB | constant |
| rows per second of conversations with tools ({_characters(data, "tools")} characters a row, a sentence a turn) relative to GSM8K's form ({_characters(data, "gsm8k")}) | {data["tools"]["ratios"]["tools"]:.2f}x | 0.5x |
| the same with question and answer as long as GSM8K's ({_characters(data, "long_tools")} characters a row) | {data["tools"]["ratios"]["long_tools"]:.2f}x | |
| rows of GSM8K's form relative to {data["baseline"]["commit"]}, the last commit that read no tools | {data["baseline"]["ratio"]:.2f}x | 1x |
| `benchmarks.merge`{at(merge)}: speed relative to a plain copy of the same bytes | {merge["merge_over_copy"]:.2f}x | 1x |
| its memory | {merge["merge"]["extra_bytes"] / 1e6:.0f} MB | a shard, 1,000 MB |
| `benchmarks.pipeline`{at(pipeline)}: outside of the steps | {pipeline["outside"]:.1f} s | 5 s |

`map` renders no chat template and verifies nothing; preparation renders each conversation twice, to verify the response's span. The next table shows the busiest
rank's work relative to the mean, for GSM8K's lengths, in tokens of both passes:

| ranks x examples x forward passes | assigned by position | balanced |
|---|---|---|
{chr(10).join(_balance(row) for row in data["balance"])}
{_starting(startup, at(startup)) if startup else ""}"""


def _at(result: dict[str, Any], usual: str) -> str:
    """Return commit and date of a result, and its processor where that is not the usual one."""
    machine = result["machine"]
    other = f", on {machine['device']}" if machine["device"] != usual else ""
    return f" ({machine['commit']}, {machine['date']}{other})"


def _starting(startup: dict[str, Any], at: str) -> str:
    """Return the section on what starting costs."""
    against = (
        f", against commit {startup['baseline']} in the same run" if startup["baseline"] else ""
    )
    return f"""
## Starting

`python -m benchmarks.startup`{at}: commands that compute next to nothing, and the steps of a small local run in addition to their
work, which is measured where everything is imported{against}. Goals: `plan` {start_goals["plan_seconds"]:.0f} s and
{start_goals["plan_megabytes"]:.0f} MB; a tenth of a step's overhead; `canvastune demo` {start_goals["demo"]}x as fast. A plan lists the weights
from config.json, and imports no PyTorch. The steps of a local run are forked from one process that imports the libraries while the first
steps run; on a cluster, or where there is a GPU, each process imports its own.

| what | now | before | times |
|---|---|---|---|
{chr(10).join(startup_lines(startup))}
"""


def _since(commits: dict[str, Any], at: str) -> str:
    """Return how fast the step is next to an earlier commit's."""
    means = ", ".join(f"{ours} {faster:.2f}x" for ours, faster in commits["faster"].items())
    each = [faster for row in commits["shapes"].values() for faster in row["faster"].values()]
    apart = max(row["loss_difference"] for row in commits["shapes"].values())
    return f"""
`python -m benchmarks.step_commits`{at} runs this step and that of commit {commits["baseline"]}, where an example had one block, in turns on these
shapes. Geometric means of how many times as fast it is now: {means}; of single shapes {min(each):.2f}x to {max(each):.2f}x. Losses are at most {apart:.0e} apart.
"""


def _beside(peers: dict[str, Any], at: str) -> str:
    """Return the section on the peers' own code."""
    versions = peers["versions"]
    goals = ", ".join(
        f"{goal:g}x as fast as {released_peers.PEERS[peer]}"
        for peer, goal in released_peers.GOALS.items()
    )
    return f"""
## The peers' own code

`python -m benchmarks.peers`{at}, float32: the released code of NeMo AutoModel {versions["nemo_automodel"]} (its recipe's own methods on its own
model), of TRL's DiffusionGemma example (commit {versions[released_peers.EXAMPLE]}, with TRL {versions["trl"]}) and of Unsloth {versions["unsloth"]}, the last two on Hugging Face's
model. Each side is a process of two threads and takes its turn with the others, on the same weights, batch, noise, blocks and coins. At its turn it runs
two steps and the second counts, as in training a step follows another; median of {_rounds(peers)} turns. In a peer's column: its seconds and memory, then how many times faster and leaner our step is. *Kept* keeps what the
backward pass needs; *checkpointed* recomputes each layer, with NeMo's `apply_ac` and with Hugging Face's own checkpointing, which reaches only the
decoder's layers. Goals, for short answers, all kept: {goals}.

{chr(10).join(released_peers.lines(peers))}

In NeMo and Unsloth, loss and gradient are ours. TRL's are not where a sequence is as long as the sliding window or longer: its cache holds the last
keys of the whole sequence, not those before the block. Its seconds are shown all the same. NeMo computes every block of an answer and scores one; all
three compute a pass for self-conditioning for every example, and pad. FLOPs are counted as in `benchmarks.step`, and the last column is the
most that any step could gain: a peer's seconds, divided by those of the FLOPs that the loss needs at
{peers["matmul_flops_per_second"] / 1e9:.0f} GFLOP/s, this machine's rate in a large matmul.
"""


def _step_rows(row: dict[str, Any]) -> list[str]:
    lines = []
    for name in OURS:
        ratios = " | ".join(
            f"{row[name][plain]['faster']:.2f}x faster, {row[name][plain]['leaner']:.1f}x less memory"
            for plain in GOALS
        )
        memory = f"{row['extra_memory_bytes'][name] / 1e6:.0f}"
        lines.append(
            f"| {row['about']} | {name} | {row['seconds'][name]:.2f} | {memory} |"
            f" {row['efficiency'][name]:.0%} | {ratios} |"
        )
    for plain in GOALS:
        seconds, memory = row["seconds"][plain], row["extra_memory_bytes"][plain]
        lines.append(
            f"| | {plain} | {seconds:.2f} | {memory / 1e6:.0f} | {row['efficiency'][plain]:.0%}"
            " | | |"
        )
    return lines


def _means(summary: dict[str, Any]) -> list[str]:
    return [
        f"| {ours} | {plain} | {ratios['faster']:.2f}x | {ratios['leaner']:.2f}x |"
        for ours, by_plain in summary.items()
        for plain, ratios in by_plain.items()
    ]


def _verdict(step: dict[str, Any]) -> str:
    """Describe which goals are missed, by which of our steps."""
    missed = [
        f"{ours}, {quantity} than {plain}"
        for ours, by_plain in step["geometric_mean"].items()
        for plain, ratios in by_plain.items()
        for quantity, goal in zip(("faster", "leaner"), GOALS[plain], strict=True)
        if ratios[quantity] < goal
    ]
    slow = [
        row["about"] for row in step["shapes"].values() if row["efficiency"]["ours"] < EFFICIENT
    ]
    said = f"Goals missed: {'; '.join(missed)}." if missed else "Every ratio reaches its goal."
    return said + (f" Efficiency is below its goal in: {'; '.join(slow)}." if slow else "")


def _rounds(step: dict[str, Any]) -> str:
    return " to ".join(map(str, sorted({row["rounds"] for row in step["shapes"].values()})))


def _ceiling(step: dict[str, Any]) -> str:
    """Describe the ratios of a step that took only its needed FLOPs at the machine's rate in a
    large matmul.
    """
    rate = step["matmul_flops_per_second"]
    means = {
        plain: statistics.geometric_mean(
            row["seconds"][plain] * rate / row["flops_needed"] for row in step["shapes"].values()
        )
        for plain in GOALS
    }
    most = " and ".join(
        f"{ratio:.1f}x faster than {plain.replace('chosen', 'the chosen')}"
        for plain, ratio in means.items()
    )
    return f"At full matmul rate and with nothing else to do, a step would be {most}."


def _first_pass(case: dict[str, Any]) -> str:
    whole = case["whole"]

    def of_whole(form: str) -> str:
        names = ("flops", "seconds", "received_bytes", "peak_bytes")
        return " | ".join(
            f"{case[form][name] / whole[name]:.2f}" if whole.get(name) else "-" for name in names
        )

    return (
        f"| {case['tokens']:,}, {case['ranks']} / {case['ep']} | {of_whole('before')} |"
        f" {of_whole('reused')} |"
    )


def _length(row: dict[str, Any]) -> str:
    tokens, seconds, flops = row["tokens"], row["seconds"], row["flops"]
    sliding, full = (
        f"{row['attention_seconds'][kind] / tokens * 1e6:.0f}"
        for kind in ("sliding_attention", "full_attention")
    )
    return (
        f"| {row['clean']:,} | {row['blocks']} | {row['live_bytes'] / tokens / 1e3:.1f} | {seconds:.1f} |"
        f" {flops / 1e9:,.0f} | {flops / seconds / 1e9:.0f} | {sliding} | {full} |"
    )


def _blocks(blocks: str, row: dict[str, Any]) -> str:
    ratios = row["ratios"]
    by_row = ratios["by_row"]

    def both(name: str) -> str:
        whole, checkpointed = ratios[name]
        return f"{whole:.2f}, checkpointed {checkpointed:.2f}"

    return (
        f"| {blocks} | {both('rate')} | {both('slower')} | {by_row['plain']:.2f} |"
        f" {by_row['packed']:.2f} | {by_row['sent']:.2f} | {ratios['memory']:.2f} |"
    )


def _growth(row: dict[str, Any]) -> str:
    a_token = [
        f"{1e3 * row[name] / row['tokens']:.2f}" for name in ("seconds_mapped_anew", "seconds")
    ]
    an_example = [
        f"{row[name] / row['examples'] / 1e6:.1f}" for name in ("live_bytes", "extra_memory_bytes")
    ]
    return f"| {row['examples']} | {row['tokens']:,} | {' | '.join([*a_token, *an_example])} |"


def _answering(evaluation: dict[str, Any], at: str) -> str:
    """Return the section on answers of the evaluation."""
    return f"""## Answers of the evaluation

`python -m benchmarks.evaluation`{at}: {evaluation["rows"]} questions with spread stops, {evaluation["batch"]} at once, by our
sampler and by stock `generate()` in padded batches, as evaluation used it before; float32, same noise, answers and step counts equal.
*Base kept*: both models, when an earlier run has asked the base the same. FLOPs are those of matrix products and attention, bytes those that
operators read and write: what a device cannot be faster than. {_slower(evaluation)}

| shape | stock, s | ours, s | times faster (goal) | base kept (goal) | peak memory above weights, of stock's (goal {answers.MEMORY_GOAL}) | GFLOP, stock: ours | GB moved, stock: ours | equal answers |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(_answers(*each) for each in evaluation["shapes"].items())}

"""


def _whole(pipeline_plan: dict[str, Any], at: str) -> str:
    """Return the section on the time of the whole pipeline."""
    return f"""## The pipeline at full size

`python -m benchmarks.pipeline_plan`{at}: {pipeline_plan["recipe"]} on {pipeline_plan["accelerator"]}, by plan. Steps without
GPU are measured on a CPU; a node is assumed to read weights at {whole_pipeline.READ_RATE / 1e9:.0f} GB/s. Answers fill `data.seq_length`; a
block takes half of its denoising steps on average, and the slowest of a stock batch all. {_longest(pipeline_plan)}

| step | evaluation by stock `generate()`, one GPU: s | GPU-hours | by our sampler, one GPU: s | GPU-hours | on all that trained: s | GPU-hours |
|---|---|---|---|---|---|---|
{chr(10).join(whole_pipeline.lines(pipeline_plan))}

"""


def _answers(name: str, row: dict[str, Any]) -> str:
    stock, ours, goal = row["stock"], row["ours"], row["goal"]
    with_base = f" ({2 * goal:g})" if name in answers.WITH_BASE else ""
    return (
        f"| {name} | {stock['seconds']:.1f} | {ours['seconds']:.1f} | {row['faster']:.1f} ({goal:g}) |"
        f" {row['faster_with_base']:.1f}{with_base} | {row['memory_share']:.2f} |"
        f" {stock['flops'] / 1e9:,.0f} : {ours['flops'] / 1e9:,.0f} |"
        f" {stock['bytes'] / 1e9:,.0f} : {ours['bytes'] / 1e9:,.0f} |"
        f" {row['equal_answers']} of {len(ours['forwards'])} |"
    )


def _slower(evaluation: dict[str, Any]) -> str:
    """Say what each goal that is missed is bound by."""
    missed = [
        f"{name}: stock computes {row['fewer_flops']:.1f}x the FLOPs and moves"
        f" {row['fewer_bytes']:.1f}x the bytes"
        for name, row in evaluation["shapes"].items()
        if row["faster"] < row["goal"]
    ]
    missed += [
        f"{name}, in memory, {_least(row)}"
        for name, row in evaluation["shapes"].items()
        if name in answers.WITH_BASE and row["memory_share"] > row["memory_goal"]
    ]
    return f"Below its goal is {'; '.join(missed)}." if missed else "Every goal is reached."


def _least(row: dict[str, Any]) -> str:
    """Say what memory a sampler needs that keeps its keys."""
    stock, ours = row["stock"]["peak_bytes"], row["ours"]
    return (
        f"where stock takes {stock / 1e6:.0f} MB and ours {ours['peak_bytes'] / 1e6:.0f}, of which"
        f" {ours['least_bytes'] / 1e6:.0f} ({row['least_memory_share']:.2f} of stock's) are the keys and"
        " values that the canvases see, their expected embeddings, and what stock's layers hold while"
        " they run on them: a sampler that keeps its keys and calls these layers cannot do without"
    )


def _longest(found: dict[str, Any]) -> str:
    """Say which step is the longest, by how the evaluation answers."""
    steps = {name: way["steps"] for name, way in found["ways"].items()}
    most = {name: max(way, key=lambda step: way[step]["seconds"]) for name, way in steps.items()}
    return (
        f"The longest step is *{most['stock']}* with stock's `generate()`, and"
        f" *{most['ours_on_all']}* with `evaluate.gpus` as many as trained."
    )


def _templated(data: dict[str, Any]) -> str:
    rates = data["one_process"]["rows_per_second"]
    return f"{rates['prepare_data'] / rates['map_chat_template']:.2f}x"


def _characters(data: dict[str, Any], form: str) -> str:
    return f"{data['tools']['characters_a_row'][form]:,}"


def _largest(data: dict[str, Any], rows: str) -> str:
    return f"{max(data['memory'][rows]['anonymous_bytes']) / 1e6:.0f}"


def _balance(row: dict[str, Any]) -> str:
    layout = f"{row['ranks']} x {row['micro_batch']} x {row['forwards']}"
    return f"| {layout} | {row['by_position']['step']:.2f} | {row['shared_out']['step']:.2f} |"


if __name__ == "__main__":
    sys.exit(main())

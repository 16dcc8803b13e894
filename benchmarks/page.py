"""`python -m benchmarks.page`: write docs/performance.md, scaling.md and planner.md from
benchmarks/results/.
"""

from __future__ import annotations

import functools
import statistics
import sys
from typing import Any

from benchmarks import blocks as several_blocks
from benchmarks import evaluation as answers
from benchmarks import peers as released_peers
from benchmarks import pipeline_plan as whole_pipeline
from benchmarks import planner, scaling
from benchmarks.gpu_page import dry_run_row, gpu_section, most_launches, way_back_section
from benchmarks.measure import RESULTS, ROOT, read_result, say
from benchmarks.startup import GOALS as start_goals
from benchmarks.startup import least_wait
from benchmarks.startup import lines as startup_lines
from benchmarks.step import EFFICIENT, EXACT, GOALS, OURS
from canvastune.perf_model.launches import LAUNCH_SECONDS, MOST_LAUNCHES, WAIT_SECONDS

FILES = (
    *("step", "first_pass", "growth", "lengths", "blocks", "blocks_learning"),
    *("data", "merge", "pipeline", "gpu_dry_run"),
)
MAY_LACK = (
    *("evaluation", "pipeline_plan", "saving", "gpu", "startup", "peers", "step_commits"),
    "long_example",
)
PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    results = {name: read_result(name) for name in (*FILES, "scaling", "planner")}
    measured = results["scaling"]
    may_lack: dict[str, Any] = {name: _if_there(name) for name in MAY_LACK}
    pages = {
        PAGE: page(**{name: results[name] for name in FILES}, **may_lack),
        scaling.PAGE: scaling.page(measured["cases"], measured["released"], measured["machine"]),
        planner.PAGE: planner.page(results["planner"]["cases"]),
    }
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
        say("page", f"{path.relative_to(ROOT)} written")
    return 0


def _if_there(name: str) -> dict[str, Any] | None:
    """Return a result that may not have been measured: a GPU is only lent at times."""
    return read_result(name) if (RESULTS / f"{name}.json").exists() else None


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
    saving: dict[str, Any] | None,
    gpu: dict[str, Any] | None,
    startup: dict[str, Any] | None,
    peers: dict[str, Any] | None,
    step_commits: dict[str, Any] | None,
    long_example: dict[str, Any] | None,
) -> str:
    """Return docs/performance.md."""
    here, rate = step["machine"], step["matmul_flops_per_second"]
    at = functools.partial(_at, usual=here["device"])
    worst = max(row["gradient_difference"] for row in step["shapes"].values())
    goals = "; ".join(
        f"against *{plain}*, {faster}x faster and {leaner}x less memory"
        for plain, (faster, leaner) in GOALS.items()
    )
    return f"""# Speed and memory

This page compares Canvastune with a plain implementation, measured in the same run on a CPU ({here["cores"]} cores, {here["device"]} unless another
processor is named, {here["threads"]} threads, torch {here["torch"]}). **{"Only [the section on GPUs](#on-a-gpu) was" if gpu else "None of this was"} measured on a GPU.** Each section names the commit at
which it was measured. `python -m benchmarks.page` generates this page from `benchmarks/results/`. For communication between ranks, see
[scaling](scaling.md); for predicted and counted FLOPs and memory, see [the planner](planner.md).

## The step

`python -m benchmarks.step`{at(step)} measures one process in float32. The plain step (`benchmarks/plain_step.py`) calls Hugging
Face's modules twice, on a right-padded batch with dense masks and complete float32 logits: *all blocks* decodes every response block and
scores one, *chosen block* decodes only the scored one. Weights, batch and draws are the same on both sides. Our gradient differs from the
plain one by at most {worst:.0e} of its norm (goal: below {EXACT:.0e}).

*Efficiency* is the FLOPs that the loss needs (scored rows, real tokens, no recomputation), divided by the product of the seconds and this
machine's rate in a large matmul, {rate / 1e9:.0f} GFLOP/s; the goal is {EFFICIENT:.0%}. *Memory* is what the step needs in addition to weights and
gradients. *Ours* keeps what the backward pass needs, like the plain step (`train.activation_checkpointing: false`); *selective* recomputes
every second layer; *checkpointed* recomputes every layer, which is the default of a recipe. Each step is timed in its steady state, after
one warm-up run. The tables show the median of {_rounds(step)} timed runs per side.

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

- **No padding and no masks.** Attention runs on each example separately. The keys that a canvas sees are contiguous, so no attention call
  needs a mask. On sliding-window layers, if an example is longer than the window, attention runs on half a window of rows at a time.
- **Only the chosen block** is decoded, in one pass with the clean tokens, and only self-conditioned examples go through a self-conditioning
  pass (pass 1).
- **Logits are computed in chunks, on a CPU in tiles** that stay in its caches from the matmul to the gradient, which is computed in place.
  Soft-capped logits are bounded, so no maximum has to be found and subtracted; factors that are constant over a row are applied to the
  row's other operand.
- **One gradient for the embedding table.** All of its uses (head, lookups, soft embedding) add to one buffer; autograd would allocate a
  [V, H] tensor for each.
- **Expert rows** are gathered again in the backward pass instead of being kept, weighted where they are narrowest (before the last
  projection), and summed per token in one pass; this is deterministic on every device.
- **Norms and gated MLPs keep only their inputs**; transformers' norm keeps four tensors of its input's size.
- **Few kernel launches on CUDA.** Each of the following is one Triton kernel in the forward and one in the backward pass
  (`train.triton_kernels`): norms with their residuals and scales, the heads' norms and rotary embeddings, gates, the choice of experts, and
  the sorting of their rows. Without a C compiler or Triton, torch's fused norm and PyTorch operators are used instead. Adapters with the
  same input share their first product and are added inside a matmul. The norm of all gradients is computed by multi-tensor kernels.
- **Dispatch overlaps with the dense MLP**: rows are sent to the ranks of their experts while the MLP computes, and their gradients during
  its backward pass; FSDP gathers the next layer at the same time. Returning the results and their gradients is
  [blocking](#returning-the-experts-results). How much time the overlap saves on CUDA has not been measured.
- **Pass 1 only computes the clean tokens before the chosen block**, which are all that its canvas sees ([below](#pass-1-three-ways)).
- **The last layer stays gathered** between its uses, and a rank without self-conditioned examples joins pass 1 with two padding tokens.
- **The host waits for the device once per step**, when the losses and the norm are logged, and, with expert parallelism, once in each layer
  and pass, when it has to know how many rows each rank receives. Where PyTorch has no kernel for a grouped matmul (A100, L40S, float32), it
  also waits once for each of them, and launches a matmul for each expert; `canvastune plan` says what this costs.
- **Ranks finish together**: a step's examples are distributed by their tokens and self-conditioning draws
  ([below](#data-merge-pipeline)). The examples of a step, their noise and the gradient do not change.

With `train.attention: flex`, a whole batch is computed in one FlexAttention kernel per layer on CUDA; on a CPU, its gradients equal those
of `sdpa`. It is not the default because it has not been measured on a GPU. `torch.compile` is not applied to the layers because it could
not be measured on its target hardware. `tools/gpu_day.sh` is ready to run on a GPU and is tested at small sizes. It covers sequence lengths
of 512 to 4,096 with layers of the released model's size, both kinds of attention and the plain step, the kernel used by each attention
call, utilization relative to the card's measured matmul rate, the five most expensive operations, and 20 steps of the trainer compared with
its plan.
{gpu_section(gpu) if gpu else ""}
## Simulated GPUs: waits, launches and memory

`make test-gpu-dry`{at(gpu_dry_run)} runs training steps of the released model on eight simulated H100s
([how](verification.md#cuda-without-a-gpu)), with the batches of the `gsm8k` recipes: one example of 366 tokens (*longest*: 1,279) per rank
and step, or eight. *Before* is commit 80fd2ae, counted in the same way. The numbers of launches are estimates; times are unknown.

| case | host waits (before) | launches (before) | planned launches | attention calls that are unfused or compile a plan per shape (before) | fused attention calls | peak memory, GB | planned, GB |
|---|---|---|---|---|---|---|---|
{chr(10).join(dry_run_row(*case) for case in gpu_dry_run["cases"].items())}

The goal is at most {MOST_LAUNCHES:,} launches in a step of the `gsm8k` recipes. {most_launches(gpu_dry_run["cases"])} The number is low because of Triton
kernels, which have not run on a GPU yet, and because activations are kept (`train.activation_checkpointing: false`), for which the batch of
8 leaves enough memory; *checkpointed* recomputes each layer. `canvastune plan` counts {LAUNCH_SECONDS * 1e6:.0f} us per launch and {WAIT_SECONDS * 1e6:.0f} us per wait, and
reports which of a step's bounds is the largest.
{way_back_section()}
## Pass 1, three ways

`python -m benchmarks.first_pass`{at(first_pass)} compares two ways to compute pass 1 with a pass 1 on all clean tokens, in a step whose examples
are all self-conditioned. *Before* computes it on the clean tokens before the block, as the engine does. *Reused* takes the prefix's keys
from pass 2, which then runs clean tokens and canvas separately. All figures are ratios. Loss and gradients differ by at most {first_pass["worst_difference"]:.0e}.
The four ranks share two cores, so their times mean little.

| sequence length, ranks / EP | before: FLOPs | seconds | received | peak | reused: FLOPs | seconds | received | peak |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(_first_pass(case) for case in first_pass["cases"] if case["chosen"] == "middle")}

Reusing keys saves slightly more FLOPs, but it gathers each layer once more under FSDP, reduces its gradients twice, is slower on one rank,
and would make pass 1 see keys with dropout applied.

## From 1 to {growth["rows"][-1]["examples"]} examples

`python -m benchmarks.growth`{at(growth)} measures examples of different lengths in one forward pass, with activation checkpointing. Time
grows as the number of tokens to the power of {growth["exponent_of_seconds_mapped_anew"]:.2f}, or of {growth["exponent_of_seconds"]:.2f} if the process keeps its memory between uses, as CUDA's
allocator does (the C library maps each tensor above 32 MiB again).

| examples | tokens | ms per token | ms per token, memory kept | MB per example, live tensors | MB per example, process |
|---|---|---|---|---|---|
{chr(10).join(map(_growth, growth["rows"]))}

## One example of up to {max(row["clean"] for row in lengths["rows"]):,} tokens

`python -m benchmarks.lengths`{at(lengths)} measures a training step on one long example at small width, with activation checkpointing.
Memory per token does not grow with the length. The counted FLOPs per token do, because of the full-attention layers, but the machine
computes them no slower in long examples than in short ones. Times vary by up to a factor of two between runs, since the machine is shared.

| tokens | blocks of the answer per step | kB per token in addition to weights and gradients | seconds | GFLOP counted | GFLOP per second | attention in a sliding-window layer, us per token | in a full-attention layer |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(_length, lengths["rows"]))}
{_long_example(long_example, at(long_example) if long_example else "")}
## Every block of an answer in one step

`python -m benchmarks.blocks`{at(blocks)} compares `objective.blocks: all` with one block per answer, and with a separate row for each
block, as in Megatron-Bridge's dataset, both in a plain implementation on Hugging Face's modules (*plain*) and in our packed pass (*packed*).
Gradients equal those of the separate rows to {max(row["gradient_difference"] for row in blocks["answers"].values()):.0e}. With many blocks, a step takes about twice as long as with one block, regardless of
their number, because all canvases together have about as many tokens as the clean text.

| blocks per answer | scored rows per second, relative to one block (goal {several_blocks.RATE}) | time per step, relative to one block (at most {several_blocks.SLOWER}) | rate relative to separate rows, plain (goal {several_blocks.BY_ROW:g}) | packed | reduction in expert rows sent per scored row (goal {several_blocks.BY_ROW:g}) | peak memory, checkpointed, relative to one block (at most {several_blocks.MEMORY}) |
|---|---|---|---|---|---|---|
{chr(10).join(_blocks(*each) for each in blocks["answers"].items())}

`python -m benchmarks.blocks_learning`{at(blocks_learning)} trains the tiny model on running sums, with answers of 16 to 18 blocks, for
{blocks_learning["steps"]["1"]} steps with one block and {blocks_learning["steps"]["all"]} steps with all. `all` reaches the first run's final validation loss after {blocks_learning["share_of_wall_time"]:.0%} of its time
(geometric mean of three seeds; goal: a third).

![Validation loss by seconds in training steps, three seeds: all blocks reach the final loss of one block in a fraction of the time](blocks.png)

{_answering(evaluation, at(evaluation)) if evaluation else ""}{_whole(pipeline_plan, at(pipeline_plan)) if pipeline_plan else ""}{_saving(saving, at(saving)) if saving else ""}## Data, merge, pipeline

| what | measured | goal |
|---|---|---|
| `benchmarks.data`{at(data)}: rows per second, relative to `datasets.map` with a plain tokenizer call | {data["one_process"]["ratio"]:.2f}x | 1x |
| the same with the chat template on both sides | {_templated(data)} | |
| the same with two processes on both sides | {data["two_processes"]["ratio"]:.2f}x | 1x |
| memory of the largest process, for 20,000 -> 100,000 rows | {_largest(data, "20000")} -> {_largest(data, "100000")} MB | constant |
| the same for 100,000 conversations with tools | {_largest(data, "tools")} MB | constant |
| rows per second for conversations with tools ({_characters(data, "tools")} characters per row, one sentence per turn), relative to GSM8K's format ({_characters(data, "gsm8k")} characters) | {data["tools"]["ratios"]["tools"]:.2f}x | 0.5x |
| the same with question and answer as long as GSM8K's ({_characters(data, "long_tools")} characters per row) | {data["tools"]["ratios"]["long_tools"]:.2f}x | |
| rows per second in GSM8K's format, relative to {data["baseline"]["commit"]}, the last commit without support for tools | {data["baseline"]["ratio"]:.2f}x | 1x |
| `benchmarks.merge`{at(merge)}: speed, relative to a plain copy of the same bytes | {merge["merge_over_copy"]:.2f}x | 1x |
| its memory | {merge["merge"]["extra_bytes"] / 1e6:.0f} MB | a shard, 1,000 MB |
| `benchmarks.pipeline`{at(pipeline)}: time outside of the steps | {pipeline["outside"]:.1f} s | 5 s |

`map` neither renders a chat template nor verifies anything; preparation renders each conversation twice to verify the response's span. The
next table shows the work of the busiest rank relative to the mean, in tokens of both passes, for GSM8K's lengths:

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
        f". *Before* is commit {startup['baseline']}, in the same run"
        if startup["baseline"]
        else ""
    )
    return f"""
## Starting

`python -m benchmarks.startup`{at} measures commands that compute next to nothing, and the
overhead of each step in a small local run: the step's time minus that of its work, which is measured with everything imported{against}.
Goals: `plan` in {start_goals["plan_seconds"]:.0f} s and {start_goals["plan_megabytes"]:.0f} MB; a tenth of each step's overhead; `canvastune demo` {start_goals["demo"]}x as fast. `plan` lists the weights
from config.json and does not import PyTorch. The steps of a local run are forked from two processes that import the libraries while the
first steps run; on a cluster, or on a machine with a GPU, each process imports its own libraries.{_waits(startup)}

| what | now | before | improvement |
|---|---|---|---|
{chr(10).join(startup_lines(startup))}
"""


def _waits(startup: dict[str, Any]) -> str:
    """Say which steps wait for imports that no other process can do for them."""
    if "begins" not in startup["pipeline"]:  # results of earlier versions lack it
        return ""
    ready, pipeline, wait = startup["imports"], startup["pipeline"], least_wait(startup)
    text = f"""

What is left is mostly waiting for imports. A rank of `train` needs PyTorch, transformers and PEFT in one interpreter, which are
{ready["rank"]:.1f} s of one processor in any order. The step begins {pipeline["begins"]["ours"]["train"]:.1f} s after the command, so at least {wait:.1f} of its {pipeline["overhead"]["ours"]["train"]:.1f} s are this wait;"""
    if before := pipeline["overhead"].get("baseline", {}).get("train"):
        text += f"""
with nothing else left, the step's overhead would be {before / wait:.1f}x less than before."""
    return f"""{text} `prepare_data` and `plan` import neither PyTorch nor a model of transformers. MLflow, which `train` is
the first to use, takes the other process {ready["train"] - ready["plan"]:.1f} s meanwhile. In `evaluate`, it is MLflow's calls, each a transaction of its
database: an evaluation has two traces for each row."""


def _since(commits: dict[str, Any], at: str) -> str:
    """Return how fast the step is next to an earlier commit's."""
    means = "; ".join(f"*{ours}* {faster:.2f}x" for ours, faster in commits["faster"].items())
    each = [faster for row in commits["shapes"].values() for faster in row["faster"].values()]
    apart = max(row["loss_difference"] for row in commits["shapes"].values())
    return f"""
`python -m benchmarks.step_commits`{at} alternates between this step and that of commit {commits["baseline"]}, where
each example had one block, on the same shapes. The geometric means of the speedup since then are: {means}. For individual shapes, it
is {min(each):.2f}x to {max(each):.2f}x. Losses differ by at most {apart:.0e}.
"""


def _beside(peers: dict[str, Any], at: str) -> str:
    """Return the section on the peers' own code."""
    versions = peers["versions"]
    goals = ", ".join(
        f"{goal:g}x as fast as {released_peers.PEERS[peer]}"
        for peer, goal in released_peers.GOALS.items()
    )
    return f"""
## NeMo AutoModel, TRL and Unsloth

`python -m benchmarks.peers`{at} compares our step with released code in float32: NeMo
AutoModel {versions["nemo_automodel"]} (its recipe's methods on its own model), TRL's DiffusionGemma example (commit {versions[released_peers.EXAMPLE]}, with TRL {versions["trl"]}), and Unsloth {versions["unsloth"]}.
The last two use Hugging Face's model. Each library runs in a process with two threads, and the processes take turns on the same weights,
batch, noise, blocks and self-conditioning draws. In each turn, a process runs two steps, of which the second is timed, since steps follow
each other in training; the table shows the median of {_rounds(peers)} turns. A library's column shows its seconds and memory, and then how many times
faster and how many times smaller our step is. *Kept* keeps what the backward pass needs; *checkpointed* recomputes each layer, with NeMo's
`apply_ac` or with Hugging Face's checkpointing, which only covers the decoder's layers. Goals for short answers with everything kept:
{goals}.

{chr(10).join(released_peers.lines(peers))}

The loss and gradient of NeMo and Unsloth equal ours. TRL's differ if a sequence is at least as long as the sliding window, because its cache
holds the last keys of the whole sequence, not those before the block; its times are shown nevertheless. NeMo computes every block of an
answer and scores one. All three pad, and compute a self-conditioning pass for every example. FLOPs are counted as in `benchmarks.step`. The
last column is the maximum speedup over a library that any step could reach: the library's seconds, divided by the time that the FLOPs
needed by the loss take at {peers["matmul_flops_per_second"] / 1e9:.0f} GFLOP/s, this machine's rate in a large matmul.
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
        f"the {quantity} of *{ours}* compared with *{plain}*"
        for ours, by_plain in step["geometric_mean"].items()
        for plain, ratios in by_plain.items()
        for quantity, ratio, goal in zip(
            ("speed", "memory"), (ratios["faster"], ratios["leaner"]), GOALS[plain], strict=True
        )
        if ratio < goal
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
    return f"A step that ran at the full matmul rate, with no other work, would be {most}."


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


def _long_example(found: dict[str, Any] | None, at: str) -> str:
    if found is None:
        return ""
    sides = {name: side["extra_memory_bytes"] / 1e6 for name, side in found["sides"].items()}
    seconds = {name: side["cpu_seconds"] for name, side in found["sides"].items()}
    return f"""
What a process needs for such a step, and not only its tensors, is compared with an earlier commit by
`python -m benchmarks.long_example`{at}: for 16,384 tokens, checkpointed, {sides["ours"]:,.0f} MB in addition to weights and
gradients instead of {sides["baseline"]:,.0f} MB at {found["baseline"]} ({found["leaner"]:.1f}x less), in {seconds["ours"] / seconds["baseline"]:.2f}x its CPU time. On a CPU, experts and gated
layers are computed in chunks of rows, and the C library returns a large tensor's memory as soon as the tensor is freed.
"""


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

`python -m benchmarks.evaluation`{at} compares our sampler with stock `generate()` in padded batches,
which the evaluation used before. Both answer {evaluation["rows"]} questions whose answers end at different lengths, {evaluation["batch"]} at a time, in float32 with the same
noise; answers and step counts are equal. *Base kept* is the speedup for both models if an earlier run has asked the base the same questions. FLOPs
are those of matrix products and attention; bytes are those that operators read and write. Both limit how fast a device can be.
{_slower(evaluation)}

| shape | stock, s | ours, s | speedup (goal) | base kept (goal) | peak memory above weights, relative to stock (goal {answers.MEMORY_GOAL}) | GFLOP, stock : ours | GB moved, stock : ours | equal answers |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(_answers(*each) for each in evaluation["shapes"].items())}

"""


def _whole(pipeline_plan: dict[str, Any], at: str) -> str:
    """Return the section on the time of the whole pipeline."""
    return f"""## The pipeline at full size

`python -m benchmarks.pipeline_plan`{at} plans {pipeline_plan["recipe"]} on {pipeline_plan["accelerator"]}. Steps
without a GPU are measured on a CPU; a node is assumed to read weights at {whole_pipeline.READ_RATE / 1e9:.0f} GB/s. Answers are assumed to fill `data.seq_length`; a
block takes half of its denoising steps on average, and the slowest block of a stock batch takes all of them. {_longest(pipeline_plan)}

| step | stock `generate()` on one GPU: s | GPU-hours | our sampler on one GPU: s | GPU-hours | our sampler on all training GPUs: s | GPU-hours |
|---|---|---|---|---|---|---|
{chr(10).join(whole_pipeline.lines(pipeline_plan))}

"""


def _saving(saving: dict[str, Any], at: str) -> str:
    rows = "\n".join(
        f"| {name} | {row['returned']:.2f} | {row['longest_pause']:.2f} | {row['paused']:.2f} |"
        f" {row['seconds']:.1f} |"
        for name, row in (("torch's", saving["torch"]), ("ours", saving["ours"]))
    )
    return f"""## Training while a checkpoint is written

`python -m benchmarks.saving`{at} saves a state of {saving["bytes"] / 1e9:.1f} GB in the background, with torch's writer for safetensors shards and
with ours, while another thread of the process wakes up every 5 ms, like a training thread that launches kernels. Torch's writer holds
Python's interpreter lock while it serializes a file. Ours also hashes every file.

| writer | time until the call returns, s | longest pause of the other thread, s | sum of pauses above 10 ms, s | time until everything is written, s |
|---|---|---|---|---|
{rows}

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
        f"the memory of *{name}*, {_least(row)}"
        for name, row in evaluation["shapes"].items()
        if name in answers.WITH_BASE and row["memory_share"] > row["memory_goal"]
    ]
    return f"Goals missed: {'; '.join(missed)}." if missed else "Every goal is reached."


def _least(row: dict[str, Any]) -> str:
    """Say what memory a sampler needs that keeps its keys."""
    stock, ours = row["stock"]["peak_bytes"], row["ours"]
    return (
        f"where stock takes {stock / 1e6:.0f} MB and ours {ours['peak_bytes'] / 1e6:.0f} MB, of which"
        f" {ours['least_bytes'] / 1e6:.0f} MB ({row['least_memory_share']:.2f} of stock's) are unavoidable"
        " for a sampler that keeps its keys and calls stock's layers: the keys and values that the"
        " canvases see, their expected embeddings, and what the layers hold while they run"
    )


def _longest(found: dict[str, Any]) -> str:
    """Say which step is the longest, by how the evaluation answers."""
    steps = {name: way["steps"] for name, way in found["ways"].items()}
    most = {name: max(way, key=lambda step: way[step]["seconds"]) for name, way in steps.items()}
    stock, ours = most["stock"], most["ours_on_all"]
    if stock == ours:
        return (
            f"The longest step is *{stock}*, both with stock `generate()` and with our sampler on all"
            " training GPUs."
        )
    return (
        f"The longest step is *{stock}* with stock `generate()`, and *{ours}* with our sampler on all"
        " training GPUs."
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

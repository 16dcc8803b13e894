"""`python -m benchmarks.blocks [BLOCKS ...]`: several blocks of an answer in one step.

Side by side on the same weights, examples and draws: one block of each answer, as before; all of
them next to one clean pass (`objective.blocks: all`); and a row for each block, which pays for the
clean tokens before it again. The latter as Megatron-Bridge's data set has it, a row of the prompt,
the blocks before and one canvas, on Hugging Face's modules, and the same rows in our packed pass.

Per number of blocks: seconds of a step, scored canvas rows per second, peak memory, how far loss and
gradients of `all` are from those of the rows; then expert rows sent between four ranks. One process,
two threads, float32. Writes benchmarks/results/blocks.json.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from benchmarks.engine import (
    allocate_gradients,
    bench_recipe,
    draw_noise,
    held_tensors,
    loaded_model,
)
from benchmarks.instruments.live_bytes import LiveBytes
from benchmarks.instruments.ranks import run_ranks
from benchmarks.measure import alternate, command_parser, extra_memory, say, write_result
from benchmarks.plain_step import IGNORED, PlainBatch, plain_loss
from benchmarks.step import gradient_difference, packed_step, write_model
from benchmarks.synthetic_checkpoint import described
from benchmarks.traffic import Traffic
from canvastune.data.packing import Example, PackedBatch, pack
from canvastune.distributed.parallelize import local_tensor
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.noise import NoiseSample
from canvastune.objective import losses
from canvastune.perf_model.architecture import Architecture, read_architecture
from canvastune.perf_model.flops import EXCHANGE, count_flops, needed_flops
from canvastune.perf_model.memory import StepShape
from canvastune.planner.planner import SHIPPED_CONFIG

THREADS, RANKS = 2, 4
RANK_LAYERS = 3  # of the model that four ranks share: each layer sends as many rows
# The shares of attention, experts, dense MLP and head in the FLOPs are the released model's (see
# `shares`); the prompt is half a block long, as GSM8K's are.
MODEL = {"layers": 6, "hidden": 256, "experts": 16, "vocabulary": 4096, "canvas": 64}
PREFIX = MODEL["canvas"] // 2
# Of the examples' tokens. With 3, two experts of a token tie in float32: the sides choose different ones.
SEED = 4
ANSWERS = (8, 16)  # blocks of an answer
EXAMPLES = 2  # of a step; of the blocks in their middles one is denoised twice, as the draws expect
RATE, SLOWER, BY_ROW, MEMORY, EXACT = 3.5, 2.2, 2.0, 1.6, 1e-5
ONE, ALL, ROWS, PLAIN = "one block", "all", "a row for each block", "plain: a row for each block"
CHECKPOINTED = ", checkpointed"
Draws = list[tuple[NoiseSample, ...]]
Step = Callable[[], torch.Tensor]


def main() -> int:
    parser = command_parser("benchmarks.blocks", __doc__)
    parser.add_argument(
        "blocks",
        nargs="*",
        type=int,
        help=f"of an answer; default: {', '.join(map(str, ANSWERS))}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    model_config = described(**MODEL)
    model_config.dtype = torch.float32
    found, met = {}, True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stock = write_model(folder / "model", model_config)
        write_model(folder / "ranks", described(**MODEL | {"layers": RANK_LAYERS}))
        ours = loaded_model(bench_recipe(), copy.deepcopy(model_config), folder / "model")
        architecture = read_architecture(bench_recipe(), folder / "model")
        lora = bench_recipe(method="lora", precision="bfloat16")
        released = read_architecture(lora, SHIPPED_CONFIG)
        for blocks in chosen.blocks or ANSWERS:
            row = measure(ours, stock, architecture, blocks, chosen.rounds)
            run_ranks(rank_step, RANKS, folder, folder / "ranks", blocks)
            row["sent"] = sent(folder, blocks)
            row["released"] = counted(released, blocks)
            found[str(blocks)] = row
            met &= report(blocks, row)
    if not chosen.blocks:
        write_result(
            "blocks",
            {
                "model": MODEL,
                "prefix_tokens": PREFIX,
                "goals": {
                    "rate": RATE,
                    "slower": SLOWER,
                    "rate_by_row": BY_ROW,
                    "sent_by_row": BY_ROW,
                    "memory": MEMORY,
                },
                "answers": found,
            },
        )
    return int(not met)


def measure(
    ours: WeightTiedDiffusionGemma,
    stock: DiffusionGemmaForBlockDiffusion,
    architecture: Architecture,
    blocks: int,
    rounds: int,
) -> dict[str, Any]:
    """Measure all sides in one process, in turns."""
    examples, draws = made_examples(blocks, EXAMPLES)
    batches = packed_sides(examples, draws)
    plain = plain_rows(stock, examples, draws)
    steps: dict[str, Step] = {
        name + suffix: lambda batch=batch, again=again: packed_step(ours, batch, again)  # type: ignore[misc]
        for suffix, again in (("", False), (CHECKPOINTED, True))
        for name, batch in batches.items()
        if name != ROWS or not again
    }
    steps[PLAIN] = lambda: plain_step(stock, plain)

    stock.zero_grad(set_to_none=True)  # of the answers measured before
    expected, difference = float(steps[PLAIN]()), {}
    loss = {}
    for name in (ALL, ROWS):
        ours.zero_grad(set_to_none=True)
        loss[name] = float(steps[name]())
        difference[name] = gradient_difference(ours, stock)
    for model in (ours, stock):
        allocate_gradients(model)
    memory = {name: extra_memory(run) for name, run in steps.items()}
    alive = {
        name: peak_bytes(ours, run) for name, run in steps.items() if name.endswith(CHECKPOINTED)
    }
    seconds = alternate(steps, rounds, settle=True)
    scored = {
        name: len(batches[name.removesuffix(CHECKPOINTED).replace("plain: ", "")].canvas_targets)
        for name in steps
    }
    return {
        "examples": EXAMPLES,
        "tokens": len(examples[0].tokens),
        "coins": [[draw.self_condition for draw in own] for own in draws],
        "rounds": rounds,
        "seconds": seconds,
        "scored_rows": scored,
        "rows_per_second": {name: scored[name] / seconds[name] for name in steps},
        "extra_memory_bytes": memory,  # of the process, above weights and gradients
        "peak_bytes": alive,  # of all tensors, AdamW's moments included
        "flops_needed": {
            name: needed_flops(architecture, batch) for name, batch in batches.items()
        },
        "counted": counted(architecture, blocks),
        "loss_difference": max(abs(value / expected - 1) for value in loss.values()),
        "gradient_difference": max(difference.values()),
    }


def plain_step(
    model: DiffusionGemmaForBlockDiffusion, rows: list[tuple[PlainBatch, float]]
) -> torch.Tensor:
    """Forward and backward of each row by itself, so that nothing is padded.

    Args:
        rows: each with the number of its scored pairs over their mean.
    """
    total = torch.zeros(())
    for batch, pairs in rows:
        loss = plain_loss(model, batch, pairs) / len(rows)
        loss.backward()
        total += loss.detach()
    return total


def made_examples(blocks: int, count: int) -> tuple[list[Example], Draws]:
    """Random tokens; of each example's blocks every second one is denoised twice, beginning with
    the first one in the first example, with the second one in the next.
    """
    generator = torch.Generator().manual_seed(SEED)
    canvas, vocabulary = MODEL["canvas"], MODEL["vocabulary"]
    examples, draws = [], []
    for position in range(count):
        tokens = torch.randint(5, vocabulary, (PREFIX + blocks * canvas,), generator=generator)
        examples.append(Example(tokens, PREFIX, canvas, str(position)))
        drawn = draw_noise(5, examples[-1], vocabulary, count=blocks)
        draws.append(
            tuple(
                dataclasses.replace(draw, self_condition=(draw.block + position) % 2 == 0)
                for draw in drawn
            )
        )
    return examples, draws


def packed_sides(examples: list[Example], draws: Draws) -> dict[str, PackedBatch]:
    """Pack for each of our sides; one block is that in the middle of the answer."""
    return {
        ONE: pack(examples, [own[len(own) // 2] for own in draws]),
        ALL: pack(examples, draws),
        ROWS: block_rows(examples, draws),
    }


def rows_of(examples: list[Example], draws: Draws) -> tuple[list[Example], list[NoiseSample]]:
    """Return a row for each block: the tokens before and in it, with its noise."""
    rows, noise = [], []
    for example, own in zip(examples, draws, strict=True):
        for draw in own:
            end = example.prefix_length + (draw.block + 1) * example.canvas_length
            rows.append(dataclasses.replace(example, tokens=example.tokens[:end]))
            noise.append(draw)
    return rows, noise


def block_rows(examples: list[Example], draws: Draws) -> PackedBatch:
    """Pack a row for each block; each pair of the example is scored in one row."""
    rows, noise = rows_of(examples, draws)
    batch = pack(rows, noise)
    first = torch.tensor(
        [
            0 if draw.block == 0 else row_start(row) - 1
            for row, draw in zip(rows, noise, strict=True)
        ]
    )
    of_row = torch.repeat_interleave(first, torch.tensor(batch.clean_lengths))
    scored = batch.clean_positions[batch.next_rows] >= of_row[batch.next_rows]
    return dataclasses.replace(
        batch, next_rows=batch.next_rows[scored], next_targets=batch.next_targets[scored]
    )


def plain_rows(
    model: DiffusionGemmaForBlockDiffusion, examples: list[Example], draws: Draws
) -> list[tuple[PlainBatch, float]]:
    """Return the same rows for Hugging Face's modules, each with its pairs over the mean number."""
    rows, noise = rows_of(examples, draws)
    window = model.config.text_config.sliding_window
    found = []
    for row, draw in zip(rows, noise, strict=True):
        batch = PlainBatch.of([row], [draw], window, all_blocks=False)
        if draw.block:
            batch.next_targets[:, : row_start(row) - 1] = IGNORED
        found.append((batch, int((batch.next_targets != IGNORED).sum())))
    mean = sum(pairs for _, pairs in found) / len(found)
    return [(batch, pairs / mean) for batch, pairs in found]


def row_start(row: Example) -> int:
    """Return where the last block of a row starts."""
    return len(row.tokens) - row.canvas_length


def peak_bytes(model: WeightTiedDiffusionGemma, run: Step) -> int:
    """Return the most bytes that are alive in a step: weights, gradients, AdamW's moments and
    everything the step makes.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
    live = LiveBytes([*held_tensors(model), *moments])
    with live:
        run()
    return live.peak


def rank_step(folder: Path, model: Path, blocks: int) -> None:
    """Run a step of each side on this rank with one of the examples; write what it sends."""
    model_config = DiffusionGemmaConfig.from_pretrained(model)
    model_config.dtype = torch.float32
    sharded = loaded_model(bench_recipe(ep=RANKS), model_config, model)
    rank = dist.get_rank()
    everyone = made_examples(blocks, RANKS)
    examples, draws = [everyone[0][rank]], [everyone[1][rank]]
    found = {}
    for name, batch in packed_sides(examples, draws).items():
        held = [local_tensor(parameter.detach()) for parameter in sharded.parameters()]
        traffic = Traffic(held)
        hooks = [
            traffic.watch_routing(layer.experts, any(batch.self_conditioned))
            for layer in sharded.model.decoder.layers
        ]
        with traffic.watching():
            our_rank_step(sharded, batch)
        for hook in hooks:
            hook.remove()
        found[name] = {
            "rows": traffic.needed,
            "bytes": traffic.received_by_kind[EXCHANGE],
            "scored_rows": len(batch.canvas_targets),
        }
    (folder / f"{blocks}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def our_rank_step(model: WeightTiedDiffusionGemma, batch: PackedBatch) -> None:
    """Forward and backward of this rank's batch; another rank has a self-conditioned block."""
    loss, _, _ = model.run_under_fsdp(
        losses, batch, (1.0, 1.0), any_self_conditioned=True, checkpointing=False
    )
    loss.backward()


def sent(folder: Path, blocks: int) -> dict[str, dict[str, float]]:
    """Return, by side, the expert rows and bytes that all ranks exchange for their scored rows."""
    ranks = [
        json.loads((folder / f"{blocks}-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(RANKS)
    ]
    return {
        side: {name: sum(rank[side][name] for rank in ranks) for name in ranks[0][side]}
        for side in ranks[0]
    }


def counted(architecture: Architecture, blocks: int) -> dict[str, Any]:
    """Count the steps of one block and of all, of an example with this many, by the planner's
    formulas: checkpointed, half of the blocks denoised twice.
    """
    canvas = architecture.canvas
    clean = canvas // 2 + blocks * canvas
    step = StepShape(1, 1, 1, 1, clean, canvas, True, 0.5)
    middle = dataclasses.replace(step, chosen_start=canvas // 2 + (blocks - 1) * canvas // 2)
    one, every = (
        count_flops(architecture, shape)
        for shape in (middle, dataclasses.replace(step, blocks=blocks))
    )
    return {
        "times_flops": every.total / one.total,
        "times_rate": blocks * one.total / every.total,
        "shares": {part: value / every.total for part, value in every.by_part.items()},
    }


def report(blocks: int, row: dict[str, Any]) -> bool:
    """Say what was found for answers of so many blocks; return whether it meets the goals."""
    rate, sent_rows = row["rows_per_second"], row["sent"]
    by_sent = {side: found["rows"] / found["scored_rows"] for side, found in sent_rows.items()}
    times = {
        "rate": [rate[ALL + end] / rate[ONE + end] for end in ("", CHECKPOINTED)],
        "slower": [
            row["seconds"][ALL + end] / row["seconds"][ONE + end] for end in ("", CHECKPOINTED)
        ],
    }
    by_row = {
        "plain": rate[ALL] / rate[PLAIN],
        "packed": rate[ALL] / rate[ROWS],
        "sent": by_sent[ROWS] / by_sent[ALL],
    }
    memory = row["peak_bytes"][ALL + CHECKPOINTED] / row["peak_bytes"][ONE + CHECKPOINTED]
    extra = (
        row["extra_memory_bytes"][ALL + CHECKPOINTED]
        / row["extra_memory_bytes"][ONE + CHECKPOINTED]
    )
    row["ratios"] = {**times, "by_row": by_row, "memory": memory, "extra_memory": extra}
    lines = (
        f"all scores {_both(times['rate'])}x the rows per second of one block (goal {RATE}; FLOPs"
        f" {row['counted']['times_rate']:.2f}, the released model's {row['released']['times_rate']:.2f})",
        f"its step takes {_both(times['slower'])}x the time (goal {SLOWER}; FLOPs"
        f" {row['counted']['times_flops']:.2f}, the released model's"
        f" {row['released']['times_flops']:.2f})",
        f"{by_row['plain']:.2f}x the rate of a row for each block, plain (goal {BY_ROW});"
        f" {by_row['packed']:.2f}x in our packed pass",
        f"a scored row sends 1/{by_row['sent']:.2f} of the expert rows (goal {BY_ROW}), on"
        f" {RANKS} ranks",
        f"peak memory {memory:.2f}x (goal {MEMORY}), {extra:.2f}x above weights and gradients",
        f"gradients differ by {row['gradient_difference']:.1e}, losses by"
        f" {row['loss_difference']:.1e}",
    )
    for line in lines:
        say("blocks", f"{blocks} blocks: {line}")
    return (
        min(times["rate"]) >= RATE
        and max(times["slower"]) <= SLOWER
        and min(by_row["plain"], by_row["sent"]) >= BY_ROW
        and memory <= MEMORY
        and row["gradient_difference"] < EXACT
    )


def _both(values: list[float]) -> str:
    return f"{values[0]:.2f}x, checkpointed {values[1]:.2f}"


if __name__ == "__main__":
    sys.exit(main())

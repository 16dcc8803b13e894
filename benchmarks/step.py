"""`python -m benchmarks.step [SHAPE ...]`: our step against the plain one, on the same weights,
batch and draws.

Per shape: median seconds, memory above weights and gradients, FLOPs that ran and FLOPs that the
loss needs, and how far loss and
gradients are apart. One process, two threads, float32. Writes benchmarks/results/step.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from benchmarks.engine import allocate_gradients, bench_recipe, draw_noise, loaded_model
from benchmarks.measure import (
    alternate,
    command_parser,
    extra_memory,
    matmul_rate,
    one_of,
    say,
    write_result,
)
from benchmarks.plain_step import PlainBatch, plain_step
from benchmarks.planner import Flops
from benchmarks.synthetic_checkpoint import described
from canvastune.config.schema import Checkpointing
from canvastune.data.packing import Example, PackedBatch, pack
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.noise import NoiseSample
from canvastune.objective import losses
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.flops import needed_flops

THREADS = 2
GOALS = {"all blocks": (3.0, 4.0), "chosen block": (1.7, 3.0)}  # times faster, times less memory
EXACT, EFFICIENT = 1e-5, 0.45
# By train.activation_checkpointing; a recipe's default is the last.
OURS: dict[str, Checkpointing] = {
    "ours": False,
    "ours, selective": "selective",
    "ours, checkpointed": True,
}


@dataclass(frozen=True)
class Shape:
    """A model and a batch: per example, tokens of the prefix and of the response."""

    about: str
    model: dict[str, int]
    examples: tuple[tuple[int, int], ...]
    rounds: int = 3

    def config(self) -> DiffusionGemmaConfig:
        config = described(**self.model)
        config.dtype = torch.float32
        return config


_BASE = {"layers": 6, "hidden": 256, "experts": 16, "vocabulary": 32768, "canvas": 64}
SHAPES = {
    "short": Shape("short answers: one block each", _BASE, ((192, 64),) * 4),
    "long": Shape("a long answer: eight blocks", _BASE, ((512, 512),)),
    "longest": Shape("a longer one: S 2,048, sixteen blocks", _BASE, ((1024, 1024),), rounds=2),
    "vocabulary": Shape(
        "the released model's vocabulary",
        _BASE | {"vocabulary": 262144},
        ((192, 64),) * 2,
        rounds=2,
    ),
    "experts": Shape("128 experts", _BASE | {"experts": 128}, ((256, 256),) * 2),
    "ragged": Shape(
        "lengths from 64 to 1,024",
        _BASE,
        ((48, 16), (64, 64), (96, 100), (160, 96), (300, 84), (600, 424)),
        rounds=2,
    ),
}


def main() -> int:
    parser = command_parser("benchmarks.step", __doc__)
    add_shapes(parser)
    parser.add_argument(
        "--rounds", type=int, help="timed runs of each side; default: 2 or 3 by shape"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows, rate = {}, matmul_rate()
    for name in chosen.shapes or SHAPES:
        shape = SHAPES[name]
        rows[name] = measure(dataclasses.replace(shape, rounds=chosen.rounds or shape.rounds))
        rate = max(
            rate, matmul_rate()
        )  # the best that was seen: an efficiency is not flattered by a slow moment
        say("step", f"{name}: {described_row(rows[name])}")
    for name, row in rows.items():
        row["efficiency"] = {
            side: row["flops_needed"] / seconds / rate for side, seconds in row["seconds"].items()
        }
        of_sides = ", ".join(f"{side} {value:.0%}" for side, value in row["efficiency"].items())
        say("step", f"{name}: of {rate / 1e9:.0f} GFLOP/s: {of_sides}")
    summary = {
        ours: {
            plain: {
                quantity: statistics.geometric_mean(
                    row[ours][plain][quantity] for row in rows.values()
                )
                for quantity in ("faster", "leaner")
            }
            for plain in GOALS
        }
        for ours in OURS
    }
    for ours, by_plain in summary.items():
        for plain, (faster, leaner) in GOALS.items():
            found = by_plain[plain]
            ratios = (
                f"{found['faster']:.2f}x faster (goal {faster}), {found['leaner']:.2f}x leaner"
                f" (goal {leaner})"
            )
            say("step", f"{ours} against {plain}: {ratios}")
    if not chosen.shapes:
        write_result(
            "step", {"matmul_flops_per_second": rate, "shapes": rows, "geometric_mean": summary}
        )
    best = summary["ours"]
    met = all(
        best[plain]["faster"] >= goal[0] and best[plain]["leaner"] >= goal[1]
        for plain, goal in GOALS.items()
    )
    exact = all(row["gradient_difference"] < EXACT for row in rows.values())
    efficient = all(row["efficiency"]["ours"] >= EFFICIENT for row in rows.values())
    return int(not (met and exact and efficient))


def measure(shape: Shape) -> dict[str, Any]:
    """Measure all figures of a shape."""
    model_config = shape.config()
    config = bench_recipe()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stock = write_model(folder, model_config)
        # a copy: the engine writes its own kinds of attention and experts there
        ours = loaded_model(config, copy.deepcopy(model_config), folder, config.seed)
        architecture = read_architecture(config, folder)

    examples, draws = made_examples(shape)
    window = model_config.text_config.sliding_window
    plain = {
        "all blocks": PlainBatch.of(examples, draws, window, all_blocks=True),
        "chosen block": PlainBatch.of(examples, draws, window, all_blocks=False),
    }
    sides: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda checkpointing=checkpointing: our_step(ours, examples, draws, checkpointing)  # type: ignore[misc]
        for name, checkpointing in OURS.items()
    }
    sides |= {name: lambda batch=batch: plain_step(stock, batch) for name, batch in plain.items()}  # type: ignore[misc]

    loss = {name: float(sides[name]()) for name in ("ours", "chosen block")}
    difference = gradient_difference(ours, stock)
    for model in (ours, stock):
        allocate_gradients(model)
    memory = {name: extra_memory(run) for name, run in sides.items()}
    seconds = alternate(sides, shape.rounds, settle=True)
    with Flops() as counter:
        sides["ours"]()
    needed = needed_flops(architecture, pack(examples, draws))
    result: dict[str, Any] = {
        "about": shape.about,
        "model": shape.model,
        "examples": shape.examples,
        "coins": [draw.self_condition for draw in draws],
        "tokens": sum(len(example.tokens) for example in examples),
        "rounds": shape.rounds,
        "seconds": seconds,
        "extra_memory_bytes": memory,
        "flops_ran": counter.total,
        "flops_needed": needed,
        "loss_difference": abs(loss["ours"] / loss["chosen block"] - 1),
        "gradient_difference": difference,
    }
    for side in OURS:
        result[side] = {
            name: {"faster": seconds[name] / seconds[side], "leaner": memory[name] / memory[side]}
            for name in GOALS
        }
    return result


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names shapes; none are all."""
    about = f"default: all of {', '.join(SHAPES)}"
    parser.add_argument("shapes", nargs="*", type=one_of(SHAPES), metavar="SHAPE", help=about)


def write_model(
    folder: Path, model_config: DiffusionGemmaConfig
) -> DiffusionGemmaForBlockDiffusion:
    """Write random weights and return them in Hugging Face's modules, as trained as ours."""
    torch.manual_seed(0)
    stock = DiffusionGemmaForBlockDiffusion(copy.deepcopy(model_config))
    with torch.no_grad():
        for layer in stock.model.decoder.layers:
            # Attention has scale 1: else it is ill-conditioned.
            layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)
    stock.save_pretrained(folder)
    model_config.save_pretrained(folder)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("vision" not in name and "router" not in name)
    return stock


def our_step(
    model: WeightTiedDiffusionGemma,
    examples: list[Example],
    draws: list[NoiseSample],
    checkpointing: Checkpointing,
) -> torch.Tensor:
    """Forward and backward of a batch as the trainer does it, packing included."""
    return packed_step(model, pack(examples, draws), checkpointing)


def packed_step(
    model: WeightTiedDiffusionGemma, batch: PackedBatch, checkpointing: Checkpointing
) -> torch.Tensor:
    """Forward and backward of a packed batch as the trainer does it."""
    weights = 1 / len(batch.canvas_targets), 1 / len(batch.next_targets)
    loss, _, _ = model.run_under_fsdp(
        losses,
        batch,
        weights,
        any_self_conditioned=any(batch.self_conditioned),
        checkpointing=checkpointing,
    )
    loss.backward()
    return loss.detach()


def gradient_difference(
    ours: WeightTiedDiffusionGemma, stock: DiffusionGemmaForBlockDiffusion
) -> float:
    """|ours - plain| / |plain| over the gradients of all weights together."""
    expected = {
        name.replace("model.encoder.language_model.", "model.decoder."): p.grad
        for name, p in stock.named_parameters()
    }
    off = total = 0.0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            plain = expected[name]
            assert plain is not None, f"the plain step gives {name} no gradient"
            off += float((parameter.grad - plain).square().sum(dtype=torch.float64))
            total += float(plain.square().sum(dtype=torch.float64))
    return math.sqrt(off / total)


def made_examples(shape: Shape) -> tuple[list[Example], list[NoiseSample]]:
    """Random tokens; every second example is denoised twice, beginning with the first; the block in
    the middle is chosen.
    """
    generator = torch.Generator().manual_seed(3)
    canvas, vocabulary = shape.model["canvas"], shape.model["vocabulary"]
    examples, draws = [], []
    for position, (prefix, response) in enumerate(shape.examples):
        tokens = torch.randint(5, vocabulary, (prefix + response,), generator=generator)
        tokens = torch.cat([tokens, tokens.new_full((-response % canvas,), 1)])
        example = Example(tokens, prefix, canvas, str(position))
        (draw,) = draw_noise(5, example, vocabulary)
        examples.append(example)
        draws.append(
            dataclasses.replace(draw, block=example.blocks // 2, self_condition=position % 2 == 0)
        )
    return examples, draws


def described_row(row: dict[str, Any]) -> str:
    def side(name: str) -> str:
        found = row[name]
        ratios = ", ".join(
            f"{found[plain]['faster']:.2f}x faster and {found[plain]['leaner']:.2f}x leaner than"
            f" {plain}"
            for plain in GOALS
        )
        size = f"{row['seconds'][name]:.2f} s, {row['extra_memory_bytes'][name] / 1e6:.0f} MB"
        return f"{name}: {size}, {ratios}"

    return f"{'; '.join(map(side, OURS))}; gradients differ by {row['gradient_difference']:.1e}"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.blocks_learning`: what a second of training teaches, with one block of each
answer and with all of them.

The tiny model learns made problems whose answers have sixteen blocks or more, from several seeds: a
run of N steps with `objective.blocks: 1`, and one with `all` from the same weights, whose steps
alternate with the first one's. The question is when `all` reaches the first run's final validation
loss. Validation scores every block. Writes benchmarks/results/blocks_learning.json and
docs/blocks.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.engine import loaded_model, make_trainer
from benchmarks.instruments.ranks import run_ranks
from benchmarks.measure import ROOT, command_parser, say, write_result
from canvastune.checkpoint.load import read_model_config
from canvastune.config import RunConfig, parse_config
from canvastune.preparation.prepare import prepare_data
from canvastune.tiny_model import make_tiny_model

PICTURE = ROOT / "docs" / "blocks.png"
SEEDS = (1, 2, 3)
STEPS, SHARE = 600, 0.2  # of the run with one block; of them, those of the run with all
VALIDATIONS = 12  # of each run
BATCH, LR, ROWS, HELD_OUT = 1, 3e-3, 3000, 16
GOAL = 1 / 3  # of the wall time
THREADS = 2
SIDES: tuple[int | str, str] = (1, "all")
_COLORS = {"1": "#b4540a", "all": "#1f5fd0"}


def main() -> int:
    parser = command_parser("benchmarks.blocks_learning", __doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the run with one block")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--batch", type=int, default=BATCH)
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny_model(folder / "model")
        write_chains(folder / "chains.jsonl", ROWS)
        configs = {
            (seed, blocks): recipe(folder, seed, blocks, chosen)
            for seed in chosen.seeds
            for blocks in SIDES
        }
        card = prepare_data(next(iter(configs.values())), folder / "model", folder / "data", 1)
        for seed in chosen.seeds:
            run_ranks(learn, 1, folder, seed, {str(b): configs[seed, b] for b in SIDES})
        found = {
            str(seed): json.loads((folder / f"{seed}.json").read_text(encoding="utf-8"))
            for seed in chosen.seeds
        }
    for seed, curves in found.items():
        curves["share"] = share = time_share(curves["1"], curves["all"])
        say(
            "blocks_learning",
            f"seed {seed}: one block ends at {curves['1']['loss'][-1]:.3f} after"
            f" {curves['1']['seconds'][-1]:.0f} s; all: {curves['all']['loss'][-1]:.3f} after"
            f" {curves['all']['seconds'][-1]:.0f} s, there after"
            f" {'-' if share is None else f'{share:.2f} of the time'}",
        )
    shares = [curves["share"] for curves in found.values()]
    reached = [share for share in shares if share is not None]
    mean = statistics.geometric_mean(reached) if len(reached) == len(shares) else None
    result = {
        "model": "tiny",
        "blocks_of_answers": card["block_histogram"],
        "prefix_tokens": card["prefix_tokens"],
        "steps": {str(b): configs[chosen.seeds[0], b].train.steps for b in SIDES},
        "global_batch_size": chosen.batch,
        "lr": chosen.lr,
        "seeds": found,
        "share_of_wall_time": mean,
        "goal": GOAL,
        "total_seconds": round(time.monotonic() - started),
    }
    said = "not reached by every seed" if mean is None else f"{mean:.3f} of the wall time"
    say("blocks_learning", f"all, geometric mean: {said} (goal {GOAL:.3f})")
    if (chosen.steps, tuple(chosen.seeds), chosen.lr, chosen.batch) == (STEPS, SEEDS, LR, BATCH):
        write_result("blocks_learning", result)
        draw(found, PICTURE)
    return int(mean is None or mean > GOAL)


def write_chains(path: Path, rows: int) -> None:
    """Write problems whose answer is a running sum, line by line: sixteen blocks of the tiny model
    or more.
    """
    draw = random.Random("chains")
    lines = []
    for _ in range(rows):
        number = draw.randint(1, 9)
        asked, answer = [str(number)], []
        for _ in range(draw.randint(40, 46)):
            step = draw.choice([s for s in range(-9, 10) if s and 0 <= number + s <= 9])
            asked.append(f"{step:+d}")
            answer.append(f"{number}{step:+d}={number + step}")
            number += step
        lines.append({"question": "".join(asked), "answer": "\n".join([*answer, f"#### {number}"])})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def recipe(folder: Path, seed: int, blocks: int | str, chosen: argparse.Namespace) -> RunConfig:
    """Return one run's recipe; both sides differ in `objective.blocks` and the number of steps."""
    steps = chosen.steps if blocks == 1 else max(VALIDATIONS, round(SHARE * chosen.steps))
    return parse_config(
        {
            "name": "chains",
            "seed": seed,
            "model": {"id": str(folder / "model")},
            "data": {
                "source": str(folder / "chains.jsonl"),
                "seq_length": 384,
                "validation_rows": HELD_OUT,
            },
            "objective": {"blocks": blocks},
            "train": {
                "method": "full",
                "steps": steps,
                "global_batch_size": chosen.batch,
                "micro_batch_size": chosen.batch,
                "precision": "float32",
                "activation_checkpointing": False,
                "validate_every": max(1, steps // VALIDATIONS),
                "validation_levels": [0.3, 0.7],
                "validation_blocks": "all",
            },
            "optimizer": {
                "lr": chosen.lr,
                "min_lr": chosen.lr / 10,
                "warmup_steps": max(1, steps // 20),
            },
            "parallel": {"ep": 1, "nproc_per_node": 1},
        }
    )


def learn(folder: Path, seed: int, configs: dict[str, RunConfig]) -> None:
    """Train both runs of a seed in this process, a stretch of each in turn, and write their curves:
    the validation loss by seconds spent in training steps.
    """
    torch.set_num_threads(THREADS)
    runs = {name: _Run(folder, config) for name, config in configs.items()}
    while not all(run.done for run in runs.values()):
        for run in runs.values():
            run.advance()
    curves = {name: run.curve for name, run in runs.items()}
    (folder / f"{seed}.json").write_text(json.dumps(curves), encoding="utf-8")


class _Run:
    """One training run, with its curve so far."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        described = read_model_config(folder / "model")
        model = loaded_model(config, described, folder / "model", config.seed)
        self._config = config
        self._trainer = make_trainer(config, model, described, folder / "data")
        self._seconds = 0.0
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
        self._validate()

    @property
    def done(self) -> bool:
        return self._trainer.progress.step >= self._config.train.steps

    def advance(self) -> None:
        """Train to the next validation."""
        train, progress = self._config.train, self._trainer.progress
        while not self.done:
            self._seconds += self._trainer.train_step()["seconds"]
            if progress.step % train.validate_every == 0 or self.done:
                self._validate()
                return

    def _validate(self) -> None:
        record = self._trainer.validate()
        assert record is not None, "nothing asks this run to stop"
        self.curve["step"].append(self._trainer.progress.step)
        self.curve["seconds"].append(self._seconds)
        self.curve["loss"].append(record["loss"])


def time_share(one: dict[str, list[float]], every: dict[str, list[float]]) -> float | None:
    """Return when the second curve is first at or below the first one's end, over the first one's
    seconds; None: never. Between two validations the loss is taken as linear.
    """
    goal, whole = one["loss"][-1], one["seconds"][-1]
    points = list(zip(every["seconds"], every["loss"], strict=True))
    for (start, above), (stop, below) in itertools.pairwise(points):
        if below <= goal:
            return (start + (stop - start) * (above - goal) / (above - below)) / whole
    return None


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a panel for each seed: both curves, and where the second reaches the first one's end."""
    figure = Figure(figsize=(3.4 * len(found), 3.1), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (seed, curves) in zip(panels, found.items(), strict=True):
        for name, label in (("1", "one block"), ("all", "all blocks")):
            axes.plot(
                curves[name]["seconds"], curves[name]["loss"], color=_COLORS[name], label=label
            )
        axes.axhline(curves["1"]["loss"][-1], color="#566072", linewidth=0.8, linestyle=(0, (4, 3)))
        if curves["share"] is not None:
            at = curves["share"] * curves["1"]["seconds"][-1]
            axes.plot([at], [curves["1"]["loss"][-1]], "o", color=_COLORS["all"], markersize=5)
        share = "never" if curves["share"] is None else f"{curves['share']:.0%} of the time"
        axes.set_title(f"seed {seed}: {share}", fontsize=10)
        axes.set_xlabel("seconds in training steps", fontsize=9)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 2, 5]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
    panels[0].set_ylabel("validation loss, every block", fontsize=9)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())

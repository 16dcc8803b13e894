"""`python -m tools.method_figure` draws docs/method.png: who sees whom in a step on one example, and what noise does to its canvas.

Nothing is drawn by hand: rows, noise and visibility are what the engine makes of a row of data.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from canvastune.config import parse_config
from canvastune.config.schema import ObjectiveConfig, TrainConfig
from canvastune.data.dataset import TrainingDataset
from canvastune.data.packing import Example, PackedBatch, pack
from canvastune.model.attention import Packing
from canvastune.noise import NoiseSample
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.tokenizer import load_tokenizer
from canvastune.tiny_model import make_tiny_model, write_problems

PICTURE = Path(__file__).parents[1] / "docs" / "method.png"
QUESTION, ANSWER = "Tom has 3 nuts. Tom finds 2 more. Tom loses 1.", "3+2=5\n5-1=4\n#### 4"
CANVAS, WINDOW, SEED = 6, 16, 42  # the released model has 256 and 1,024
LEVELS = TrainConfig().validation_levels
_CLEAN, _PAST, _OWN, _NOISE = "#4c78a8", "#8e6bbf", "#e08a2e", "#fbd9b0"
_SOFT, _LINE = "#566072", "#c9cfd8"


@dataclass(frozen=True)
class Shown:
    """One example as a step has it."""

    example: Example
    draws: NoiseSample
    position: int  # in the stream
    batch: PackedBatch
    at_levels: dict[float, PackedBatch]  # the same block with validation's noise, which depends on the example alone
    vocabulary: list[str]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Names and lengths of what the rows are, in their order."""
        example = self.example
        return [("prefix", example.prefix_length), *((f"block {n + 1}", CANVAS) for n in range(example.blocks)), ("canvas", CANVAS)]

    def words(self, tokens: torch.Tensor) -> list[str]:
        """Tokens as text: blanks and line breaks are made visible."""
        return [self.vocabulary[token].replace("\n", "\\n") for token in tokens.tolist()]


def shown(folder: Path) -> Shown:
    """The first place in the stream where the example's middle block is denoised twice, half of it corrupted.

    Args:
        folder: gets a tiny model and a data set of a few rows.
    """
    make_tiny_model(folder / "model")
    write_problems(folder / "rows.jsonl", "compare", rows=20, seed=0)
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"question": QUESTION, "answer": ANSWER}) + "\n")
    recipe = {"name": "figure", "data": {"source": str(folder / "rows.jsonl"), "validation_fraction": 0.2}}
    prepare_data(parse_config(recipe), folder / "model", folder / "data", processes=1)
    tokenizer = load_tokenizer(folder / "model").tokenizer
    sizes = {"canvas_length": CANVAS, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    data = TrainingDataset(folder / "data", seed=SEED, objective=ObjectiveConfig(), **sizes)
    for position in count():
        (example,) = data.train_examples([position])
        draws = data.train_draws(example, position)
        if example.blocks == 3 and draws.block == 1 and draws.self_condition and int(draws.corrupted.sum()) == CANVAS // 2:
            break
    fixed = {level: replace(data.validation_draws(example, level), block=draws.block) for level in LEVELS}
    at_levels = {level: pack([example], [noise]) for level, noise in fixed.items()}
    words = [tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer))]
    return Shown(example, draws, position, pack([example], [draws]), at_levels, words)


def sees(batch: PackedBatch, kind: str) -> torch.Tensor:
    """bool[N+M, N+M]: which rows (first) see which keys in a layer of this type, read off the engine's attention.

    Where all keys are alike a row's weights are even over what it sees, and values that are one-hot give the weights back.
    """
    rows = len(batch.clean) + len(batch.canvas)
    alike, one_hot = torch.zeros(1, 1, rows, rows), torch.eye(rows)[None, None]
    return Packing.of(batch, WINDOW).attend(kind, alike, alike, one_hot, 1.0)[0, 0] > 0


def caption(what: Shown) -> str:
    """What the page says of the example, word for word."""
    draws, blocks = what.draws, what.example.blocks
    changed = int((what.batch.canvas != what.batch.canvas_targets).sum())
    return (
        f"Seed {SEED}, place {what.position} of the stream: block {draws.block + 1} of {blocks}, t = {draws.level:.2f} "
        f"({int(draws.corrupted.sum())} of {CANVAS} tokens drawn anew, {changed} of them others than before), denoised twice."
    )


def draw(what: Shown) -> Figure:
    """The whole figure."""
    figure = Figure(figsize=(10.4, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5.2, 2.6))
    for column, (kind, title) in enumerate(
        (("full_attention", "Full layers"), ("sliding_attention", f"Sliding layers (here with a window of {WINDOW})"))
    ):
        _draw_sight(figure.add_subplot(grid[0, column]), what, kind, title)
    _draw_noise(figure.add_subplot(grid[1, :]), what)
    return figure


def _draw_sight(axes: Axes, what: Shown, kind: str, title: str) -> None:
    seen = sees(what.batch, kind).numpy()
    clean = len(what.batch.clean)
    colours = seen.astype(int)
    colours[clean:, :clean] *= 2
    colours[clean:, clean:] *= 3
    axes.imshow(colours, cmap=ListedColormap(["white", _CLEAN, _PAST, _OWN]), vmin=0, vmax=3, interpolation="nearest")
    edges = np.cumsum([0, *(length for _, length in what.groups)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color=_LINE, linewidth=0.8)
        axes.axvline(edge - 0.5, color=_LINE, linewidth=0.8)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    names = [name for name, _ in what.groups]
    axes.set_xticks(middles, names, rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(middles, names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9, colors=_SOFT)
    axes.set_title(title, fontsize=11, loc="left", pad=12)
    axes.set_xlabel("keys: what is seen", fontsize=9, color=_SOFT)
    axes.set_ylabel("rows: who sees", fontsize=9, color=_SOFT)
    says = {
        0.11: ("clean rows see their past;\neach is taught the next token", _CLEAN),
        0.29: ("canvas rows see what stands\nbefore their block, and each other;\neach is taught its own clean token", "#a85b00"),
    }
    for height, (words, colour) in says.items():
        axes.text(clean * 0.98, clean * height, words, ha="right", va="center", fontsize=9, color=colour)


def _draw_noise(axes: Axes, what: Shown) -> None:
    lines: list[tuple[str, torch.Tensor]] = [("clean: what is taught", what.batch.canvas_targets)]
    lines += [(f"validation, t = {level}", batch.canvas) for level, batch in what.at_levels.items()]
    lines.append((f"this step, t = {what.draws.level:.2f}", what.batch.canvas))
    for row, (name, tokens) in enumerate(lines):
        axes.text(-0.1, -row, name, ha="right", va="center", fontsize=9.5, color=_SOFT)
        for column, (word, changed) in enumerate(zip(what.words(tokens), (tokens != lines[0][1]).tolist(), strict=True)):
            face, edge = (_NOISE, "#a85b00") if changed else ("white", _LINE)
            axes.add_patch(Rectangle((column, -row - 0.42), 0.96, 0.84, facecolor=face, edgecolor=edge, linewidth=1.0))
            weight = "bold" if changed else "normal"
            axes.text(column + 0.48, -row, word, ha="center", va="center", fontsize=9, family="monospace", weight=weight)
    axes.set_xlim(-1.5, CANVAS)
    axes.set_ylim(-len(lines) + 0.4, 0.6)
    axes.set_title("A canvas at growing corruption t: tokens in bold were replaced", fontsize=11, loc="left")
    axes.axis("off")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = shown(Path(scratch))
        draw(found).savefig(PICTURE, dpi=110, facecolor="white", metadata={"Software": None})
        print(PICTURE, caption(found), sep="\n")

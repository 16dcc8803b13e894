"""`python -m tools.method_figure` draws docs/method.png: attention masks and noise of one example.

Rows, noise and visibility are computed by the engine from a row of data; nothing is drawn by hand.
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
from canvastune.preparation.tokenizer import load_transformers_tokenizer
from canvastune.tiny_model import make_tiny_model, write_problems

PICTURE = Path(__file__).parents[1] / "docs" / "method.png"
QUESTION, ANSWER = "Tom has 3 nuts. Tom finds 2 more. Tom loses 1.", "3+2=5\n5-1=4\n#### 4"
CANVAS, WINDOW, SEED = 6, 16, 42  # the released model has 256 and 1,024
LEVELS = TrainConfig().validation_levels
_CLEAN, _PAST, _OWN, _NOISE = "#4c78a8", "#8e6bbf", "#e08a2e", "#fbd9b0"
_SOFT, _LINE = "#566072", "#c9cfd8"


@dataclass(frozen=True)
class Shown:
    """One example as a training step receives it."""

    example: Example
    draws: NoiseSample
    position: int  # in the stream
    batch: PackedBatch
    at_levels: dict[float, PackedBatch]  # the same block with validation's noise
    vocabulary: list[str]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of rows in order: name and number of rows."""
        example = self.example
        return [
            ("prefix", example.prefix_length),
            *((f"block {n + 1}", CANVAS) for n in range(example.blocks)),
            ("canvas", CANVAS),
        ]

    def words(self, tokens: torch.Tensor) -> list[str]:
        """Return each token as text, with line breaks made visible."""
        return [self.vocabulary[token].replace("\n", "\\n") for token in tokens.tolist()]


def shown(folder: Path) -> Shown:
    """Find the first position whose middle block is denoised twice with half of it corrupted.

    Args:
        folder: receives a tiny model and a dataset of a few rows.
    """
    make_tiny_model(folder / "model")
    write_problems(folder / "rows.jsonl", "compare", rows=20, seed=0)
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"question": QUESTION, "answer": ANSWER}) + "\n")
    recipe = {
        "name": "figure",
        "data": {"source": str(folder / "rows.jsonl"), "validation_fraction": 0.2},
    }
    prepare_data(parse_config(recipe), folder / "model", folder / "data", processes=1)
    tokenizer = load_transformers_tokenizer(folder / "model")
    sizes = {
        "canvas_length": CANVAS,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    data = TrainingDataset(folder / "data", seed=SEED, objective=ObjectiveConfig(), **sizes)
    for position in count():
        (example,) = data.train_examples([position])
        (draws,) = data.train_draws(example, position)
        if (
            example.blocks == 3
            and draws.block == 1
            and draws.self_condition
            and int(draws.corrupted.sum()) == CANVAS // 2
        ):
            break
    fixed = {
        level: replace(data.validation_draws(example, level, 1)[0], block=draws.block)
        for level in LEVELS
    }
    at_levels = {level: pack([example], [noise]) for level, noise in fixed.items()}
    words = [tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer))]
    return Shown(example, draws, position, pack([example], [draws]), at_levels, words)


def sees(batch: PackedBatch, kind: str) -> torch.Tensor:
    """Return bool[N+M, N+M]: which rows (first axis) see which keys in a layer of this type.

    The mask is read from the engine's attention: with equal keys, a row's weights are uniform over
    the keys it sees, and one-hot values return the weights.
    """
    rows = len(batch.clean) + len(batch.canvas)
    equal, one_hot = torch.zeros(1, 1, rows, rows), torch.eye(rows)[None, None]
    return Packing.of(batch, WINDOW).attend(kind, equal, equal, one_hot, 1.0)[0, 0] > 0


def caption(what: Shown) -> str:
    """Return the page's sentence about the example."""
    draws, blocks = what.draws, what.example.blocks
    changed = int((what.batch.canvas != what.batch.canvas_targets).sum())
    return (
        f"Seed {SEED}, position {what.position} of the stream: block {draws.block + 1} of "
        f"{blocks}, t = {draws.level:.2f} ({int(draws.corrupted.sum())} of {CANVAS} tokens "
        f"redrawn, {changed} of them changed), denoised twice."
    )


def draw(what: Shown) -> Figure:
    """Draw the whole figure."""
    figure = Figure(figsize=(10.4, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5.2, 2.6))
    for column, (kind, title) in enumerate(
        (
            ("full_attention", "Full layers"),
            ("sliding_attention", f"Sliding layers (here with a window of {WINDOW})"),
        )
    ):
        _draw_sight(figure.add_subplot(grid[0, column]), what, kind, title)
    _draw_noise(figure.add_subplot(grid[1, :]), what)
    return figure


def _draw_sight(axes: Axes, what: Shown, kind: str, title: str) -> None:
    seen = sees(what.batch, kind).numpy()
    clean = len(what.batch.clean)
    colors = seen.astype(int)
    colors[clean:, :clean] *= 2
    colors[clean:, clean:] *= 3
    axes.imshow(
        colors,
        cmap=ListedColormap(["white", _CLEAN, _PAST, _OWN]),
        vmin=0,
        vmax=3,
        interpolation="nearest",
    )
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
    axes.set_xlabel("keys: which positions are seen", fontsize=9, color=_SOFT)
    axes.set_ylabel("rows: which positions attend", fontsize=9, color=_SOFT)
    labels = {
        0.11: ("clean rows see their past;\neach predicts the next token", _CLEAN),
        0.29: (
            "canvas rows see everything before\ntheir block, and each other;\n"
            "each predicts its own clean token",
            "#a85b00",
        ),
    }
    for height, (words, color) in labels.items():
        axes.text(
            clean * 0.98, clean * height, words, ha="right", va="center", fontsize=9, color=color
        )


def _draw_noise(axes: Axes, what: Shown) -> None:
    lines: list[tuple[str, torch.Tensor]] = [("clean: the target", what.batch.canvas_targets)]
    lines += [(f"validation, t = {level}", batch.canvas) for level, batch in what.at_levels.items()]
    lines.append((f"this step, t = {what.draws.level:.2f}", what.batch.canvas))
    for row, (name, tokens) in enumerate(lines):
        axes.text(-0.1, -row, name, ha="right", va="center", fontsize=9.5, color=_SOFT)
        for column, (word, changed) in enumerate(
            zip(what.words(tokens), (tokens != lines[0][1]).tolist(), strict=True)
        ):
            face, edge = (_NOISE, "#a85b00") if changed else ("white", _LINE)
            axes.add_patch(
                Rectangle(
                    (column, -row - 0.42), 0.96, 0.84, facecolor=face, edgecolor=edge, linewidth=1.0
                )
            )
            weight = "bold" if changed else "normal"
            axes.text(
                column + 0.48,
                -row,
                word,
                ha="center",
                va="center",
                fontsize=9,
                family="monospace",
                weight=weight,
            )
    axes.set_xlim(-1.5, CANVAS)
    axes.set_ylim(-len(lines) + 0.4, 0.6)
    axes.set_title(
        "A canvas at increasing corruption t: tokens in bold were replaced", fontsize=11, loc="left"
    )
    axes.axis("off")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = shown(Path(scratch))
        draw(found).savefig(PICTURE, dpi=110, facecolor="white", metadata={"Software": None})
        print(PICTURE, caption(found), sep="\n")

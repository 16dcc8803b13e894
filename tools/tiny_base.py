"""`python -m tools.tiny_base [NAME] [--check]`: make a tiny base that a demo adapts.

tiny_base, of `make run`: a random model is trained on one kind of word problems by the recipe
tiny_sft.yaml. support_base, of `make demo-support`: on what other shops answer, by
tools/support_base.yaml, which takes half an hour; with --work, the same command resumes it.

The weights are stored in bfloat16, in pipelines/NAME. The same processor gives the same bytes; another
kind rounds differently, and --check compares the losses. tools/NAME.json has what the model was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.measure import command_parser, machine
from canvastune.config import load_config
from canvastune.config.loading import known_keys
from canvastune.config.strict import affects_weights, flatten
from canvastune.tiny_model import make_tiny_model, write_problems
from canvastune.tracking import StepRun, read_metrics
from components.train.step import train
from pipelines.demo import RECIPES, ROWS, SHIPPED_BASE, SUPPORT_BASE
from tools.other_shops import texts, write_other_shops

KEPT = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
_CLOSE = 0.05  # relative: validation losses of the same training on two kinds of processors


@dataclass(frozen=True)
class Base:
    """A model that comes with the package."""

    shipped: Path
    recipe: Path
    write: Callable[[Path], None]  # the rows that it learns
    text: Callable[[Path], Iterable[str]] | None  # of these rows, for a separate tokenizer

    @property
    def made(self) -> Path:
        """The file that says what the model was made from."""
        return Path(__file__).with_name(f"{self.shipped.name}.json")

    def ingredients(self, rows: Path) -> dict[str, str]:
        """Return what the model is made from: hashes of the rows and of the settings that affect it."""
        sections = {"seed", "train", "optimizer", "data", "objective"}
        settings = flatten(load_config(self.recipe).model_dump(mode="json", include=sections))
        known = known_keys()
        kept = {
            key: value
            for key, value in settings.items()
            if key not in known or affects_weights(known[key])
        }
        return {
            "settings": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
            "problems": hashlib.sha256(rows.read_bytes()).hexdigest(),
        }

    def make_random(self, folder: Path, rows: Path) -> None:
        """Write the random model that the training starts from."""
        make_tiny_model(folder, text=self.text(rows) if self.text else None)


BASES = {
    base.shipped.name: base
    for base in (
        Base(
            SHIPPED_BASE,
            RECIPES / "tiny_sft.yaml",
            lambda path: write_problems(path, "change", ROWS, seed=0),
            None,
        ),
        Base(SUPPORT_BASE, Path(__file__).with_name("support_base.yaml"), write_other_shops, texts),
    )
}


def main() -> int:
    parser = command_parser("tools.tiny_base", __doc__)
    parser.add_argument("name", nargs="?", choices=BASES, default=SHIPPED_BASE.name)
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    parser.add_argument("--work", type=Path, help="folder that is kept; default: a temporary one")
    options = parser.parse_args()
    base = BASES[options.name]
    with tempfile.TemporaryDirectory(prefix="tiny-base-") as folder:
        model, made = _make(base, options.work or Path(folder))
        if options.check:
            return _compare(base, made)
        shutil.rmtree(base.shipped, ignore_errors=True)
        shutil.copytree(model, base.shipped)
    base.made.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"{base.shipped}: validation loss {made['validation_loss']:.4f}")
    return 0


def _make(base: Base, work: Path) -> tuple[Path, dict[str, Any]]:
    """Train the model, and return the folder with what is shipped, and what it was made from."""
    out, rows, random = work / "shipped", work / "rows.jsonl", work / "random"
    base.write(rows)
    if not random.exists():
        base.make_random(random, rows)
    config = load_config(base.recipe, [f"model.id={random}", f"data.source={rows}"])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    model = train(config, None, work / "run", StepRun())
    losses = [
        record["loss"]
        for record in read_metrics(work / "run" / "metrics.jsonl")
        if record["kind"] == "validation"
    ]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name in KEPT:
        shutil.copy(model / name, out / name)
    tensors = {
        name: tensor.bfloat16()
        for file in sorted(model.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # as every file of a package
    about: dict[str, Any] = {
        **base.ingredients(rows),
        "validation_loss": losses[-1],
        "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "machine": {key: machine()[key] for key in ("device", "torch", "transformers", "commit")},
    }
    return out, about


def _compare(base: Base, now: dict[str, Any]) -> int:
    """Print how a model made now differs from the shipped one; return the exit code."""
    shipped = json.loads(base.made.read_text(encoding="utf-8"))
    for name in ("settings", "problems"):
        if now[name] != shipped[name]:
            print(f"{name}: not those that the shipped model was made from")
            return 1
    before, after = shipped["validation_loss"], now["validation_loss"]
    same = "the same weights" if now["weights"] == shipped["weights"] else "other weights"
    print(f"{same}; validation loss {before:.4f} shipped, {after:.4f} now")
    return int(abs(after - before) > _CLOSE * before)


if __name__ == "__main__":
    sys.exit(main())

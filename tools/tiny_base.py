"""`python -m tools.tiny_base [--check]`: make the tiny base that the demo adapts, pipelines/tiny_base.

A random model is trained on one kind of word problems by the recipe tiny_sft.yaml, and its weights
are stored in bfloat16. The same processor gives the same bytes; another kind rounds differently, and
--check compares the losses. tiny_base.json has what the model was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.measure import machine
from canvastune.config import load_config
from canvastune.tiny_model import make_tiny_model, write_problems
from canvastune.tracking import StepRun, read_metrics
from components.train.step import train
from pipelines.demo import RECIPES, ROWS, SHIPPED_BASE

RECIPE = RECIPES / "tiny_sft.yaml"
MADE = Path(__file__).with_suffix(".json")
KEPT = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
_CLOSE = 0.05  # relative: validation losses of the same training on two kinds of processors


def main() -> int:
    parser = argparse.ArgumentParser(
        "tools.tiny_base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tiny-base-") as folder:
        model, made = _make(Path(folder))
        if options.check:
            return _compare(made)
        shutil.rmtree(SHIPPED_BASE, ignore_errors=True)
        shutil.copytree(model, SHIPPED_BASE)
    MADE.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"{SHIPPED_BASE}: validation loss {made['validation_loss']:.4f}")
    return 0


def ingredients(problems: Path) -> dict[str, str]:
    """Return what the model is made from: hashes of the recipe's settings and of the problems."""
    settings = load_config(RECIPE).model_dump_json(include={"seed", "train", "optimizer", "data"})
    return {
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "problems": hashlib.sha256(problems.read_bytes()).hexdigest(),
    }


def _make(work: Path) -> tuple[Path, dict[str, Any]]:
    """Train the model, and return the folder with what is shipped, and what it was made from."""
    out, problems = work / "shipped", work / "problems.jsonl"
    make_tiny_model(work / "random")
    write_problems(problems, "change", ROWS, seed=0)
    config = load_config(RECIPE, [f"model.id={work / 'random'}", f"data.source={problems}"])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    model = train(config, None, work / "run", StepRun())
    losses = [
        record["loss"]
        for record in read_metrics(work / "run" / "metrics.jsonl")
        if record["kind"] == "validation"
    ]
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
        **ingredients(problems),
        "validation_loss": losses[-1],
        "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "machine": {key: machine()[key] for key in ("device", "torch", "transformers", "commit")},
    }
    return out, about


def _compare(now: dict[str, Any]) -> int:
    """Print how a model made now differs from the shipped one; return the exit code."""
    shipped = json.loads(MADE.read_text(encoding="utf-8"))
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

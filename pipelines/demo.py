"""`canvastune demo`, what `make run` calls: the whole product on a model that is made on the spot."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import canvastune
from canvastune import tiny_model
from canvastune.config import RunConfig, load_config
from canvastune.errors import UserError
from canvastune.tracking import StepRun
from components.train.step import train
from pipelines.local_runner import run_recipe

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
ROWS = 4000  # word problems of each kind: enough that more are held out than evaluate.rows asks for


def demo() -> None:
    """Make a tiny random model, teach it one kind of word problems, and run the pipeline's LoRA on another kind.

    Everything lies where the recipes tiny_sft.yaml and tiny_lora.yaml say. Models of an earlier demo are used again.

    Raises:
        UserError: as the steps of the pipeline.
    """
    base, own = load_config(RECIPES / "tiny_sft.yaml"), load_config(RECIPES / "tiny_lora.yaml")
    maker = hashlib.sha256(Path(tiny_model.__file__).read_bytes() + canvastune.__version__.encode())
    logger.info(f"1. a tiny DiffusionGemma with random weights: {base.model.id}")
    _make_random(Path(base.model.id), maker.hexdigest())
    for config, kind in ((base, "change"), (own, "compare")):
        tiny_model.write_problems(Path(config.data.source), kind, ROWS, seed=0)  # the same bytes each time
    maker.update(base.model_dump_json().encode() + Path(base.data.source).read_bytes())
    logger.info(f"\n2. a base that can do something: {base.train.steps} steps of full fine-tuning, all its weights, on {base.data.source}")
    _make_base(base, Path(own.model.id), maker.hexdigest())
    logger.info(f"\n3. the pipeline: LoRA on problems of a kind that the base has not seen, {own.data.source}")
    run_recipe(own, Path("workspace"), None)


def _make_random(folder: Path, key: str) -> None:
    made = _keyed(folder, key)
    if not made.exists():
        tiny_model.make_tiny_model(made)
    _link(folder, made)


def _make_base(config: RunConfig, folder: Path, key: str) -> None:
    run = _keyed(folder, key)
    if (run / "result.json").exists():
        logger.info(f"    made by an earlier demo: {run}")
    else:
        train(config, None, run, StepRun())
    _link(folder, run / "model")


def _keyed(folder: Path, key: str) -> Path:
    """Where a model is kept under the hash of what made it, so that another recipe or version makes another."""
    return folder.with_name(f"{folder.name}-{key[:12]}")


def _link(folder: Path, target: Path) -> None:
    """Let the name that the recipes use stand for a kept model."""
    if folder.exists() and not folder.is_symlink():
        raise UserError(f"{folder}: the demo's model goes here, and something else is in its place. Move it away")
    link = folder.with_name(f".{folder.name}-{os.getpid()}")
    link.symlink_to(target.relative_to(folder.parent))
    link.replace(folder)

"""`canvastune demo`, also `make run`: the whole product on a tiny model that it creates first."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path

import canvastune
from canvastune import tiny_model
from canvastune.config import RunConfig, load_config
from canvastune.errors import UserError
from canvastune.preparation import prepare_data
from canvastune.preparation.stats import CALLS
from canvastune.tracking import StepRun
from components.train.step import train
from pipelines.local_runner import run_recipe, shell_command

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
TOOL_ROWS = 500
ROWS = 4000  # word problems of each kind: more are held out than evaluate.rows needs


def demo() -> None:
    """Train a tiny random model on one kind of word problems, then run the pipeline on another.

    Before, conversations with a tool are prepared, to show their data card. The recipes
    tiny_sft.yaml, tiny_tools.yaml and tiny_lora.yaml say where everything is. Models of an earlier
    demo are reused.

    Raises:
        UserError: as the steps of the pipeline.
    """
    base, tools, tuned = (
        load_config(RECIPES / f"tiny_{name}.yaml") for name in ("sft", "tools", "lora")
    )
    digest = hashlib.sha256(
        Path(tiny_model.__file__).read_bytes() + canvastune.__version__.encode()
    )
    logger.info(f"1. a tiny DiffusionGemma with random weights: {base.model.id}")
    _create_random_model(Path(base.model.id), digest.hexdigest())
    kinds = ((base, "change", ROWS), (tuned, "compare", ROWS), (tools, "tools", TOOL_ROWS))
    for config, kind, rows in kinds:
        tiny_model.write_problems(
            Path(config.data.label), kind, rows, seed=0
        )  # the same bytes each time
    digest.update(base.model_dump_json().encode() + Path(base.data.label).read_bytes())
    logger.info(
        f"\n2. the base model: {base.train.steps} steps of full fine-tuning on {base.data.label}"
    )
    _train_base_model(base, Path(tuned.model.id), digest.hexdigest())
    logger.info(f"\n3. a second data set: conversations with a tool, {tools.data.label}")
    _prepare_tools(tools)
    logger.info(f"\n4. the pipeline: LoRA on another kind of problems, {tuned.data.label}")
    run_recipe(tuned, Path("workspace"), None)


def _create_random_model(folder: Path, digest: str) -> None:
    cached = _cached_path(folder, digest)
    if not cached.exists():
        tiny_model.make_tiny_model(cached)
    _link(folder, cached)


def _train_base_model(config: RunConfig, folder: Path, digest: str) -> None:
    run = _cached_path(folder, digest)
    if (run / "result.json").exists():
        logger.info(f"    created by an earlier demo: {run}")
    else:
        train(config, None, run, StepRun())
    _link(folder, run / "model")


def _prepare_tools(config: RunConfig) -> None:
    out = Path("workspace/tools-data")
    shutil.rmtree(out, ignore_errors=True)  # an earlier demo's
    card = prepare_data(config, Path(config.model.id), out)
    turns = card["turns"]
    logger.info(
        f"    {card['rows_read']} rows, {turns['learned']} turns are learned, of them"
        f" {turns[CALLS]} tool calls: {out / 'card.html'}\n"
        f"    train on it: {shell_command('canvastune')} run pipelines/recipes/tiny_tools.yaml"
    )


def _cached_path(folder: Path, digest: str) -> Path:
    """Return where a model is kept, by the digest of everything that it depends on."""
    return folder.with_name(f"{folder.name}-{digest[:12]}")


def _link(folder: Path, target: Path) -> None:
    """Link the path that the recipes use to a kept model."""
    if folder.exists() and not folder.is_symlink():
        raise UserError(
            f"{folder}: already exists, and the demo needs this path for its model",
            hint="Move it away.",
        )
    link = folder.with_name(f".{folder.name}-{os.getpid()}")
    link.symlink_to(target.relative_to(folder.parent))
    link.replace(folder)

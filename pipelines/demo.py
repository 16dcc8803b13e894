"""`canvastune demo`, what `make run` calls: the whole product on a model that is made on the spot."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import canvastune
from canvastune import tiny
from canvastune.config import RunConfig, load_config
from canvastune.errors import UserError
from canvastune.tracking import step_run
from components.train.launcher import train
from pipelines.local import run_recipe

RECIPES = Path(__file__).parent / "recipes"
BASE_ROWS, OWN_ROWS = 4000, 2000  # word problems that the base learns from, and those that the pipeline then adapts it to


def demo() -> None:
    """Make a tiny random model, teach it one kind of word problems, and run the pipeline's LoRA on another kind.

    Everything lies where the recipes tiny_sft.yaml and tiny_lora.yaml say. The base of an earlier demo is used again.

    Raises:
        UserError: as the steps of the pipeline.
    """
    base, own = load_config(RECIPES / "tiny_sft.yaml"), load_config(RECIPES / "tiny_lora.yaml")
    make_inputs(base)
    make_base(base, Path(own.model.id))
    tiny.write_problems(Path(own.data.source), "compare", OWN_ROWS, seed=0)
    print(f"\n3. the pipeline: LoRA on problems of a kind that the model has not seen ({own.data.source})", flush=True)
    run_recipe(own, Path("workspace"), None)


def make_inputs(base: RunConfig) -> None:
    """The random model and the word problems that tiny_sft.yaml names."""
    model = Path(base.model.id)
    print(f"1. a tiny DiffusionGemma with random weights, and word problems ({model}, {base.data.source})", flush=True)
    if not model.exists():
        tiny.make_tiny_model(model)
    tiny.write_problems(Path(base.data.source), "change", BASE_ROWS, seed=0)  # the same bytes each time


def make_base(base: RunConfig, folder: Path) -> None:
    """Put the trained tiny model at `folder`: a link to the training run that made it, which is done once per recipe and version."""
    key = hashlib.sha256(
        f"{base.model_dump_json()}{canvastune.__version__}{BASE_ROWS}".encode() + Path(tiny.__file__).read_bytes()
    ).hexdigest()
    output = folder.with_name(f"{folder.name}-{key[:12]}")
    cached = "; made by an earlier demo" if (output / "result.json").exists() else ""
    print(
        f"\n2. a base that can do something: full fine-tuning of all its weights, {base.train.steps} steps ({output}{cached})", flush=True
    )
    if not cached:
        with step_run(base, None, "train", workspace=folder.parent) as record:
            train(base, None, output, record)
    if folder.exists() and not folder.is_symlink():
        raise UserError(f"{folder}: the demo's base goes here, and something else is in its place. Move it away")
    link = folder.with_name(f".{folder.name}-{os.getpid()}")
    link.symlink_to(Path(output.name) / "model")
    link.replace(folder)

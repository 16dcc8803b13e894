"""`canvastune demo`, also `make run`: the whole product on a tiny model that comes with it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from canvastune import tiny_model
from canvastune.config import load_config
from canvastune.errors import UserError, parse_error
from canvastune.io.atomic import atomic_directory
from pipelines.warm_start import step_variables
from pipelines.warm_start.start import PYTHON_EXEC

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
SHIPPED_BASE = Path(__file__).parent / "tiny_base"  # tools/tiny_base.py makes it
TOOL_ROWS = 500
ROWS = 4000  # word problems of each kind: more are held out than evaluate.rows needs
_TOOLS_DATA = Path("workspace/tools-data")


def demo() -> None:
    """Run the pipeline on a tiny model, and on a kind of word problems that it has never seen.

    Before, conversations with a tool are prepared, to show their data card. The recipes
    tiny_sft.yaml, tiny_tools.yaml and tiny_lora.yaml say where everything is.

    Raises:
        UserError: as the steps of the pipeline.
    """
    base, tools, tuned = (
        load_config(RECIPES / f"tiny_{name}.yaml") for name in ("sft", "tools", "lora")
    )
    kinds = ((base, "change", ROWS), (tuned, "compare", ROWS), (tools, "tools", TOOL_ROWS))
    for config, kind, rows in kinds:
        tiny_model.write_problems(
            Path(config.data.label), kind, rows, seed=0
        )  # the same bytes each time
    logger.info(f"1. a tiny DiffusionGemma, trained on one kind of word problems: {tuned.model.id}")
    unpack_base(Path(tuned.model.id))
    logger.info(f"\n2. a second data set: conversations with a tool, {tools.data.label}")
    _prepare_tools()
    from pipelines.local_runner import run_recipe  # imported by now

    logger.info(f"\n3. the pipeline: LoRA on another kind of problems, {tuned.data.label}")
    recipe = os.path.relpath(RECIPES / "tiny_lora.yaml")
    run_recipe(tuned, Path("workspace"), None, command=["run", recipe])


def unpack_base(folder: Path) -> None:
    """Write the shipped model, whose weights are bfloat16, as the float32 model that a run trains."""
    files = sorted(file for file in SHIPPED_BASE.iterdir() if file.is_file())
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    cached = folder.with_name(f"{folder.name}-{digest[:12]}")
    if not cached.exists():
        with atomic_directory(cached) as partial:
            for file in files:
                content = file.read_bytes()
                if file.suffix == ".safetensors":
                    content = to_float32(content)
                (partial / file.name).write_bytes(content)
    _link(folder, cached)


def to_float32(content: bytes) -> bytes:
    """Return a safetensors file of bfloat16 tensors with the same values in float32.

    A bfloat16 number is the upper half of a float32 one.
    """
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for tensor in header.values():
        if "dtype" in tensor:  # otherwise the file's metadata
            if tensor["dtype"] != "BF16":
                raise ValueError(f"found a tensor of {tensor['dtype']}, expected only BF16")
            tensor |= {"dtype": "F32", "data_offsets": [2 * at for at in tensor["data_offsets"]]}
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[::2], data[1::2]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(wide)


def _prepare_tools() -> None:
    shutil.rmtree(_TOOLS_DATA, ignore_errors=True)  # an earlier demo's
    recipe = RECIPES / "tiny_tools.yaml"
    python = os.environ.get(PYTHON_EXEC, sys.executable)
    command = [python, "-m", "pipelines.cli", "prepare", str(recipe), "--output", str(_TOOLS_DATA)]
    with subprocess.Popen(
        command,
        env={**os.environ, **step_variables()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as preparing:
        # Meanwhile, as Kubeflow's compiler takes seconds to import.
        from canvastune.preparation.stats import CALLS
        from pipelines.local_runner import shell_command

        output, _ = preparing.communicate()
    if preparing.returncode:
        raise parse_error(output) or RuntimeError(output)
    card = json.loads((_TOOLS_DATA / "card.json").read_text(encoding="utf-8"))
    turns = card["turns"]
    logger.info(
        f"    {card['rows_read']} rows, {turns['learned']} turns are learned, of them"
        f" {turns[CALLS]} tool calls: {_TOOLS_DATA / 'card.html'}\n"
        f"    train on it: {shell_command('canvastune')} run pipelines/recipes/tiny_tools.yaml"
    )


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

"""`canvastune demo`: the whole product on tiny models that come with it.

`make run` adapts one to a new kind of word problems, `make demo-support` another one to the answers
of a support desk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from canvastune import tiny_model
from canvastune.config import load_config
from canvastune.errors import UserError, parse_error
from canvastune.io.atomic import atomic_directory
from pipelines.support_desk import ROWS as SUPPORT_ROWS
from pipelines.support_desk import TOOL_ROWS as SUPPORT_TOOL_ROWS
from pipelines.support_desk import write_support_rows
from pipelines.warm_start import step_variables
from pipelines.warm_start.start import PYTHON_EXEC

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
# tools/tiny_base.py makes them.
SHIPPED_BASE = Path(__file__).parent / "tiny_base"
SUPPORT_BASE = Path(__file__).parent / "support_base"
TOOL_ROWS = 500
ROWS = 4000  # word problems of each kind: more are held out than evaluate.rows needs
_TOOLS_DATA = Path("workspace/tools-data")
_QUESTION = "Hello, Omar here. I forgot my password. What can I do?"


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
    logger.info(f"1. a tiny DiffusionGemma, trained on one kind of word problem: {tuned.model.id}")
    unpack_base(SHIPPED_BASE, Path(tuned.model.id))
    logger.info(f"\n2. a second dataset, of conversations with a tool: {tools.data.label}")
    _prepare_tools()
    from pipelines.local_runner import run_recipe  # imported by now

    logger.info(f"\n3. the pipeline, with LoRA on another kind of word problem: {tuned.data.label}")
    recipe = os.path.relpath(RECIPES / "tiny_lora.yaml")
    run_recipe(tuned, Path("workspace"), None, command=["run", recipe])


def demo_support() -> None:
    """Run the pipeline on rows of prose: the answers of a support desk, some of them with a tool.

    The recipe tiny_support.yaml says where everything is.

    Raises:
        UserError: as the steps of the pipeline.
    """
    tuned = load_config(RECIPES / "tiny_support.yaml")
    data = Path(tuned.data.label)
    logger.info(
        f"1. a tiny DiffusionGemma, trained on the answers of other shops: {tuned.model.id}"
    )
    unpack_base(SUPPORT_BASE, Path(tuned.model.id))
    write_support_rows(data)
    logger.info(
        f"\n2. the answers of one shop's support desk: {data}, {SUPPORT_ROWS} rows,"
        f" {SUPPORT_TOOL_ROWS} of them with a tool"
    )
    for message in _first_messages(data):
        logger.info(f"    {message['role']}: {message['content']}")
    from canvastune.tracking import tracking_uri
    from pipelines.local_runner import run_recipe, shell_command

    logger.info("\n3. the pipeline, with LoRA on these answers")
    recipe = os.path.relpath(RECIPES / "tiny_support.yaml")
    workspace = Path("workspace")
    run_recipe(tuned, workspace, None, command=["run", recipe])
    code = (
        f'import mlflow; mlflow.set_tracking_uri("{tracking_uri(tuned, workspace.absolute())}");'
        f' model = mlflow.pyfunc.load_model("models:/{tuned.tracking.registered_model}/latest");'
        f' print(*model.predict(["{_QUESTION}"]))'
    )
    logger.info(
        "\nAsk the tuned model, which MLflow loads in a new process:\n"
        f"    {shell_command('python')} {shlex.join(['-c', code])}"
    )


def _first_messages(data: Path) -> list[dict[str, str]]:
    with data.open(encoding="utf-8") as rows:
        messages: list[dict[str, str]] = json.loads(next(rows))["messages"]
    return messages


def unpack_base(shipped: Path, folder: Path) -> None:
    """Write a shipped model, whose weights are bfloat16, as the float32 model that a run trains."""
    files = sorted(file for file in shipped.iterdir() if file.is_file())
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
        f"    {card['rows_read']} rows with {turns['learned']} turns to learn, including"
        f" {turns[CALLS]} tool calls: {_TOOLS_DATA / 'card.html'}\n"
        f"    to train on it: {shell_command('canvastune')} run pipelines/recipes/tiny_tools.yaml"
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

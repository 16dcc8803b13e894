"""MLmodel of a logged model: signature, example, requirements and code, and no pickle."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import canvastune
from canvastune.config import RunConfig
from canvastune.tracking.client import load_mlflow

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

_CODE = Path(__file__).with_name("pyfunc_code.py")
# What the packages of ours import that answer a question; tests/e2e/test_mlflow_model.py counts.
REQUIREMENTS = (
    *("mlflow", "torch", "transformers", "peft", "safetensors", "huggingface_hub", "tokenizers"),
    *("accelerate", "datasets", "pyarrow", "numpy", "pandas", "pydantic", "pydantic_core"),
    *("pyyaml", "jinja2"),
)
_EXAMPLE = ["Hello! What can you help me with?"]


def write_mlmodel(
    out: Path, model: LoggedModel, config: RunConfig, folder: Path, kind: str, *, upload: bool
) -> None:
    """Write all that MLflow needs to load a model and to answer with it.

    Args:
        out: a new folder.
        folder: of the weights, which are copied if `upload`, and otherwise named.
        kind: "adapter", "merged" or "full".
    """
    load_mlflow()
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    defaults: dict[str, Any] = {
        "system": "",
        "seed": config.seed,
        "max_new_tokens": config.evaluate.max_new_tokens,
    }
    signature = ModelSignature(
        # Without a name, a list of texts is an input, too.
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string", "answer")]),
        params=ParamSchema(
            [
                ParamSpec("system", "string", defaults["system"]),
                ParamSpec("seed", "long", defaults["seed"]),
                ParamSpec("max_new_tokens", "long", defaults["max_new_tokens"]),
            ]
        ),
    )
    pyfunc.save_model(
        str(out),
        python_model=str(_CODE),
        artifacts={"model": str(folder)} if upload else None,
        code_paths=[str(Path(canvastune.__file__).parent)],
        signature=signature,
        input_example=(_EXAMPLE, defaults),
        pip_requirements=requirements(),
        model_config={
            "folder": str(folder.absolute()),
            "base": _base(config) if kind == "adapter" else None,
            "sampling": {
                "sampler": config.evaluate.sampler.model_dump(),
                "batch_size": config.evaluate.batch_size,
            },
            "defaults": defaults,
        },
        metadata={
            "inputs": "questions: each is the user's turn of a new chat",
            "outputs": "answers, one to each question",
        },
        mlflow_model=Model(
            artifact_path=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model.model_id,
            model_uuid=model.model_id,
        ),
    )


def requirements() -> list[str]:
    """Return the installed versions of what answering needs, as pip takes them."""
    # A local part such as +cpu is of the index that a wheel came from, not of the version.
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _base(config: RunConfig) -> dict[str, Any]:
    """Return the base of an adapter; a local folder by its absolute path."""
    path = Path(config.model.id)
    name = str(path.absolute()) if path.is_dir() else config.model.id
    return {"id": name, "revision": config.model.revision}

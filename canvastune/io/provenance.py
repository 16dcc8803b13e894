"""Record what made an output: config, versions, seed, hashes of the inputs."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from canvastune import __version__
from canvastune.config import RunConfig, write_config
from canvastune.config.data import MixtureSource
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import write_json

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "mlflow", "numpy")


def local_inputs(sources: Mapping[str, MixtureSource]) -> dict[str, Path]:
    """Return the local files and folders among data sets, which are given by the recipe's keys, by
    their names in `provenance.json`.
    """
    named = {
        "data" if key == "data.source" else key: Path(source.source).expanduser()
        for key, source in sources.items()
    }
    return {name: path for name, path in named.items() if path.exists()}


def write_provenance(
    folder: Path, step: str, config: RunConfig, inputs: Mapping[str, Path]
) -> None:
    """Write `config.yaml` and `provenance.json`: config, versions, seed, hashes of the inputs."""
    write_config(config, folder / "config.yaml")
    record = {
        "step": step,
        "canvastune": __version__,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "seed": config.seed,
        "inputs": {name: hash_path(path) for name, path in inputs.items()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "provenance.json", record)

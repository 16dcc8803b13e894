"""A recipe of an evaluation that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from canvastune.config import RunConfig, parse_config


def recipe(problems: Path, **evaluation: Any) -> RunConfig:
    """Six rows of `problems`, in batches of four; `evaluation` changes keys of its section."""
    settings = {
        "rows": 6,
        "batch_size": 4,
        "max_new_tokens": 16,
        "sampler": {"steps": 2},
    } | evaluation
    data = {"source": str(problems), "seq_length": 96, "validation_fraction": 0.3}
    return parse_config({"name": "test", "data": data, "evaluate": settings})

"""The held-out rows of a prepared dataset. Opening them loads no `torch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_from_disk

from canvastune.data.sample_order import sample_order
from canvastune.errors import UserError


def select_rows(dataset: Path, count: int) -> Any:
    """Return the prepared rows of the questions, in their order. Raises: as `open_validation`."""
    rows = open_validation(dataset)
    return rows.select(sample_order(rows["id"], rows["origin"])[:count])


def open_validation(dataset: Path) -> Any:
    """Open the held-out rows of a prepared dataset. Raises: UserError, there is none."""
    folder = dataset / "validation"
    if not (folder / "state.json").is_file():
        raise UserError(
            f"{dataset}: no prepared dataset, expected a folder `validation` in it",
            hint="Use the output folder of `canvastune prepare`.",
        )
    return load_from_disk(str(folder))

"""The files of a prepared data set."""

from __future__ import annotations

import json
from pathlib import Path

FORGETTING = "forgetting"  # folder of the rows of evaluate.forgetting, with a validation split


def missing_files(folder: Path) -> list[Path]:
    """Return the files that a prepared data set names or has, and that are not there."""
    expected = [folder / "card.json"]
    splits = ["train", "validation"]
    if (folder / FORGETTING).is_dir():
        splits.append(f"{FORGETTING}/validation")
    for split in splits:
        state = folder / split / "state.json"
        expected += [state, state.with_name("dataset_info.json")]
        if state.is_file():
            named = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
            expected += [state.with_name(file["filename"]) for file in named]
    return [file for file in expected if not file.is_file()]

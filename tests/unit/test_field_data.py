"""Claims about data as teams have it: each form that was reported from the field, and what becomes
of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets

from canvastune.config.schema import DataConfig
from canvastune.preparation.sources import open_source
from tests.support.data_fixtures import write_lines


def test_messages_that_datasets_stores_as_json_text_are_messages(tmp_path: Path) -> None:
    """`load_dataset("json")` gives messages with different keys the type Json, which is JSON text
    to every other reader of the Parquet or Arrow file.
    """
    arguments = ({"city": "Bonn"}, {"day": 1, "note": None})
    calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        }
        for call in calls
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    table = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache")
    )
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for kind in ("rows.jsonl", "rows.parquet", "saved"):
        found = [row.value for row in open_source(DataConfig(source=str(tmp_path / kind))).rows()]
        assert json.dumps(found) == json.dumps(rows), kind

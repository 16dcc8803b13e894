"""Rows as teams have them, a name in each, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from canvastune.errors import UserError
from canvastune.preparation.prepare import prepare_data
from tests.support.data_fixtures import run_config, write_lines

NAMES = [f"{first}{last}" for first in ("Ana", "Tom", "Eva", "Ben") for last in "1234567"]
ASK, SAY = "<bos><|turn>user\nGreet Ana1.<turn|>\n<|turn>model\n", "Hello Ana1.<turn|>"
Form = Callable[[str], dict[str, Any]]


class Prepared(NamedTuple):
    card: dict[str, Any]
    prefix: str
    """Of the first row's last example."""
    response: str
    examples: int


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def chat(name: str, **more: Any) -> dict[str, Any]:
    return {"messages": [user(f"Greet {name}."), says(f"Hello {name}.", **more)]}


def write(folder: Path, form: Form, kind: str = "jsonl") -> Path:
    """Write a row of this form for each name."""
    rows = [form(name) for name in NAMES]
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    return write_lines(file, rows)


def prepare(source: Path, model: Path, name: str = "out", **data: Any) -> Prepared:
    out = source.parent / name
    card = prepare_data(run_config(source, seq_length=1024, **data), model, out)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [row for name in ("train", "validation") for row in load_from_disk(str(out / name))]
    first = [row for row in rows if row["origin"].partition("#")[0].endswith(":1")][-1]
    length = first["prefix_length"]
    prefix, response = (
        tokenizer.decode(tokens)
        for tokens in (first["input_ids"][:length], first["input_ids"][length:])
    )
    return Prepared(card, str(prefix), str(response), len(rows))


def refusal(source: Path, model: Path, **data: Any) -> str:
    with pytest.raises(UserError) as raised:
        prepare_data(run_config(source, **data), model, source.parent / "refused")
    return f"{raised.value}\n{raised.value.hint}"

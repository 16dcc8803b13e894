"""Fine-tuning on tool conversations teaches calls: real preparation, training and stock generation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_from_disk
from transformers import AutoTokenizer

from canvastune.checkpoint.hf_inference import load_stock
from canvastune.config import RunConfig
from canvastune.preparation import prepare_data
from canvastune.preparation.stats import BEYOND, CALLS
from canvastune.tiny_model import make_tiny_model, write_problems
from tests.support.training import train

ROWS, ASKED = 500, 20
STEPS = 80
CALL = re.compile(
    r'<\|tool_call>call:count\{who:<\|"\|>[^<]+<\|"\|>\}<tool_call\|><\|tool_response>.*', re.DOTALL
)


def rows_ending_in_a_call(folder: Path, count: int) -> Path:
    """Different questions, each with the call that answers it as the last turn."""
    file = folder / "rows.jsonl"
    write_problems(file, "tools", count, 0)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    cut = [{**row, "messages": row["messages"][:2]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in cut), encoding="utf-8")
    return file


def well_formed(model: Path, prompts: list[list[int]]) -> float:
    """The fraction of answers by stock `generate` that are one complete call of the tool."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded = load_stock(model, torch.device("cpu"))
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    torch.manual_seed(0)
    answers = loaded.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=32)
    texts = tokenizer.batch_decode(answers.sequences[:, width:])
    return sum(CALL.fullmatch(text) is not None for text in texts) / len(texts)


@pytest.mark.timeout(900)
def test_a_model_tuned_on_tool_rows_writes_calls(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    recipe = {
        "name": "tools",
        "model": {"id": str(tmp_path / "tiny")},
        "data": {
            "source": str(rows_ending_in_a_call(tmp_path, ROWS + ASKED)),
            "seq_length": 128,
            "validation_fraction": 0.15,
            "validation_rows": ASKED,
        },
        "train": {
            "method": "full",
            "steps": STEPS,
            "global_batch_size": 8,
            "precision": "float32",
            "activation_checkpointing": False,
            "validate_every": STEPS,
            "validation_levels": [0.5],
            "checkpoint_every": STEPS,
            "async_checkpoints": False,
        },
        "optimizer": {"lr": 5e-3, "min_lr": 5e-4, "warmup_steps": 20},
        "parallel": {"nproc_per_node": 1, "ep": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config = RunConfig.model_validate(recipe)
    card = prepare_data(config, tmp_path / "tiny", tmp_path / "data")
    assert card["turns"][CALLS] == card["kept"] + card["dropped"].get(BEYOND, 0)
    held_out: Any = load_from_disk(str(tmp_path / "data" / "validation"))
    prompts = [row["input_ids"][: row["prefix_length"]] for row in held_out]
    assert well_formed(tmp_path / "tiny", prompts) < 0.2
    trained = train(tmp_path, tmp_path / "run", ranks=1)
    assert trained.returncode == 0, trained.stderr
    assert well_formed(tmp_path / "run" / "model", prompts) >= 0.8

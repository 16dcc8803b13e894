"""The planner lists the engine's weights without building them: the same ones, or it asks transformers."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from canvastune.checkpoint.load import read_model_config
from canvastune.config.model_sizes import read_sizes
from canvastune.config.schema import LoraConfig
from canvastune.errors import UserError
from canvastune.perf_model import architecture
from canvastune.perf_model.architecture import Architecture
from canvastune.planner.planner import SHIPPED_CONFIG
from canvastune.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
Edit = dict[str, Any]
MISSING = object()


@functools.cache
def tiny_tree(folder: Path) -> str:
    make_tiny_model(folder / "tiny")
    return (folder / "tiny" / "config.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


def written(folder: Path, text: dict[str, Any] | None = None, **top: Any) -> Path:
    """The tiny model's config.json with other values of its sections; MISSING removes a key."""
    tree = json.loads(tiny_tree(folder))
    edits = {"text_config": text or {}, "vision_config": top.pop("vision", {}), "": top}
    for section, values in edits.items():
        into = tree[section] if section else tree
        into.update(values)
        for key in [key for key, value in values.items() if value is MISSING]:
            del into[key]
    path = folder / "config.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def both(path: Path, method: str, lora: LoraConfig, precision: str) -> list[dict[str, Any]]:
    """The architecture as the planner lists it, and as it is read from the built model."""
    sizes = read_sizes(path)
    assert sizes is not None, "only transformers can read this file"
    text = read_model_config(path).to_json_string()
    found = [
        architecture._listed(sizes, method, lora, precision),
        architecture._built(text, method, lora, precision),
    ]
    return [_fields(each) for each in found]


def _fields(found: Architecture) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


@pytest.mark.parametrize(
    ("method", "lora", "precision"),
    [
        ("full", {}, "bfloat16"),
        ("full", {}, "float32"),
        ("lora", {"rank": 16}, "bfloat16"),
        ("lora", {"rank": 8, "experts": True, "dropout": 0.1}, "bfloat16"),
        ("lora", {"rank": 4, "experts": True}, "float32"),
    ],
)
def test_listed_weights_are_those_of_the_built_model(
    folder: Path, method: str, lora: dict[str, Any], precision: str
) -> None:
    settings = LoraConfig(**lora)
    listed, built = both(written(folder), method, settings, precision)
    assert listed == built
    if precision == "bfloat16" and "experts" not in lora:
        listed, built = both(SHIPPED_CONFIG, method, settings, precision)
        assert listed == built


@pytest.mark.parametrize(
    "edit",
    [
        {"text": {"num_key_value_heads": 4, "num_attention_heads": 8}},
        {"text": {"num_global_key_value_heads": 4, "global_head_dim": 32}},
        {"text": {"layer_types": ["full_attention"] * 4, "sliding_window": 5}},
        {"text": {"pad_token_id": None, "eos_token_id": [1, 2], "dtype": "bfloat16"}},
        {"text": {"rope_parameters": MISSING, "rms_norm_eps": MISSING, "model_type": MISSING}},
        {"vision": {"num_key_value_heads": 1, "patch_size": MISSING}},
        {"vision": {"position_embedding_size": MISSING, "num_hidden_layers": 3}},
        {"canvas_length": MISSING, "architectures": MISSING, "dtype": "float16"},
        {"transformers_version": "5.23.0", "eos_token_id": [1]},
    ],
)
def test_other_sizes_are_read_as_transformers_reads_them(folder: Path, edit: Edit) -> None:
    listed, built = both(written(folder, **edit), "full", LoraConfig(), "float32")
    assert listed == built


@pytest.mark.parametrize(
    "edit",
    [
        {"text": {"use_bidirectional_attention": "all"}},  # it halves the window
        {"text": {"per_layer_config": {}}},
        {"text": {"attention_k_eq_v": False}},
        {"text": {"attention_bias": True}},
        {"text": {"num_key_value_heads": 3, "num_attention_heads": 8}},
        {"text": {"num_experts": MISSING}},
        {"text": {"num_experts": None}},
        {"text": {"global_head_dim": MISSING}},
        {"text": {"hidden_size": "128"}},
        {"text": {"hidden_size": 0}},
        {"text": {"hidden_size": 128.0}},
        {"text": {"num_hidden_layers": True}},
        {"text": {"num_hidden_layers": 5}},
        {"text": {"layer_types": ["sliding_attention"] * 4}},  # the last one must be full
        {"text": {"layer_types": ["other"] * 4}},
        {"text": {"pad_token_id": 10**6}},
        {"text": {"pad_token_id": -1}},
        {"text": {"hidden_activation": "relu"}},
        {"text": {"rms_norm_eps": 1}},
        {"text": {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}},
        {"text": {"tie_word_embeddings": False}},
        {"text": {"no_such_key": 1}},
        {"vision": {"head_dim": MISSING}},
        {"vision": {"model_type": "siglip"}},
        {"vision": {"output_proj_dims": 8}},
        {"canvas_length": None},
        {"canvas_length": 0},
        {"model_type": "gemma4"},
        {"quantization_config": {}},
        {"text_config": None},
        {"vision_config": MISSING},
    ],
)
def test_what_needs_judgment_is_left_to_transformers(folder: Path, edit: Edit) -> None:
    assert read_sizes(written(folder, **edit)) is None


def test_a_file_that_cannot_be_read_is_left_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert read_sizes(tmp_path) is None
    assert read_sizes(tmp_path / "nothing.json") is None


def test_a_rank_that_experts_cannot_have_is_refused_alike(folder: Path) -> None:
    path, lora = written(folder), LoraConfig(rank=6, experts=True)
    said = []
    for read in (
        lambda: architecture._listed(read_sizes(path), "lora", lora, "bfloat16"),
        lambda: architecture._built(
            read_model_config(path).to_json_string(), "lora", lora, "bfloat16"
        ),
    ):
        with pytest.raises(UserError, match=r"lora\.rank: found 6") as error:
            read()
        said.append((str(error.value), error.value.hint))
    assert said[0] == said[1]


@pytest.mark.parametrize("program", ["help", "plan", "step"])
def test_a_plan_imports_no_library_of_models(folder: Path, program: str) -> None:
    recipe = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"
    programs = {
        "help": "main(['--help'])",
        "plan": f"main(['plan', {str(recipe)!r}, '--set', 'model.id={written(folder).parent}'])",
        "step": "import components.plan.step",
    }
    heavy = ("torch", "transformers", "datasets", "mlflow", "huggingface_hub", "kfp", "numpy")
    code = (
        "import sys, contextlib; from pipelines.cli import main\n"
        f"with contextlib.suppress(SystemExit): {programs[program]}\n"
        f"print('loaded', sorted(set({heavy}) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.endswith("loaded []\n"), done.stdout[-200:] + done.stderr[-500:]

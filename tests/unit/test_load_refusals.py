"""A wrong or damaged base checkpoint ends a run before it trains, with one line.

The file, the tensor, what was found and expected.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file

from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.hf_format import INDEX, WEIGHTS, CheckpointReader, SafetensorsFile
from canvastune.checkpoint.load import DECODER_SCALAR, ENCODER_SCALAR
from canvastune.config import load_config
from canvastune.errors import UserError
from canvastune.training.run import train
from tests.support.small import run_config, shared_model
from tools.loss_compare.side import Side

GATE = "model.decoder.layers.1.mlp.gate_proj.weight"
SCALE = "model.decoder.layers.1.router.per_expert_scale"


def load(folder: Path) -> None:
    shared_model(folder, run_config("lora"))


def refuse(folder: Path, *said: str) -> None:
    with pytest.raises(UserError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message
    for text in said:
        assert text in message, f"the message does not name {text!r}: {message}"
    assert error.value.hint.endswith("."), f"no hint: {message}"


def shard_of(folder: Path, name: str) -> Path:
    return CheckpointReader(folder).path(name)


def change(folder: Path, name: str, *changed: tuple[str, torch.Tensor]) -> str:
    """Replace a tensor in its shard by others, index included.

    Return the shard's path as a message shows it.
    """
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    del tensors[name]
    save_file({**tensors, **dict(changed)}, shard, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    index["weight_map"] |= {new: shard.name for new, _ in changed}
    (folder / INDEX).write_text(json.dumps(index))
    return str(shard)


def rewrite_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> dict[str, str]:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return index["weight_map"]


def test_the_unbroken_copy_loads(broken: Path) -> None:
    load(broken)


def test_a_tensor_of_another_shape_is_named_with_its_file_and_both_shapes(broken: Path) -> None:
    shard = change(broken, GATE, (GATE, torch.zeros(64, 48)))
    refuse(broken, shard, repr(GATE), "[64, 48]", "[64, 32]", "config.json")


def test_a_missing_tensor_is_named_with_the_shape_that_is_wanted(broken: Path) -> None:
    change(broken, GATE)
    refuse(broken, str(broken), repr(GATE), "[64, 32]")


@pytest.mark.parametrize("form", [DECODER_SCALAR, ENCODER_SCALAR])
def test_a_missing_layer_scalar_is_named(broken: Path, form: str) -> None:
    change(broken, form.format(1))
    refuse(broken, repr(form.format(1)), "[1]")


def test_a_tensor_that_the_model_does_not_have_is_named_with_its_file(broken: Path) -> None:
    shard = change(broken, GATE, (GATE, torch.zeros(64, 32)), (f"{GATE}_scale", torch.zeros(64)))
    refuse(broken, shard, repr(f"{GATE}_scale"), "config.json")


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int8, "int8"), (torch.bool, "bool"), (torch.float8_e4m3fn, "float8_e4m3fn")],
)
def test_a_tensor_that_does_not_hold_plain_numbers_is_named_with_its_file_and_dtype(
    broken: Path, dtype: torch.dtype, said: str
) -> None:
    shard = change(broken, GATE, (GATE, torch.zeros(64, 32).to(dtype)))
    refuse(broken, shard, repr(GATE), said, "bfloat16, float16, float32, float64")


def test_layer_scalars_that_differ_are_both_loaded(broken: Path) -> None:
    name = ENCODER_SCALAR.format(0)
    change(broken, name, (name, torch.tensor([0.5])))
    layers = shared_model(broken, run_config("lora")).model.decoder.layers
    own = CheckpointReader(broken).get(DECODER_SCALAR.format(0))
    assert torch.equal(layers[0].layer_scalar, own)
    assert layers[0].encoder_scalar.tolist() == [0.5]
    assert all(layer.encoder_scalar is None for layer in layers if layer is not layers[0])


def test_values_that_are_not_finite_do_load(broken: Path) -> None:
    change(broken, SCALE, (SCALE, torch.full((8,), torch.nan)))
    load(broken)


def test_a_missing_shard_is_named(broken: Path) -> None:
    shard = shard_of(broken, GATE)
    shard.unlink()
    refuse(broken, str(shard), "missing", INDEX)


@pytest.mark.parametrize(
    "where", ["in the middle of a tensor", "in the middle of the header", "in the header's length"]
)
def test_a_truncated_shard_is_named(broken: Path, where: str) -> None:
    shard = shard_of(broken, GATE)
    data = shard.read_bytes()
    header = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header])[GATE]["data_offsets"][0]
    cut = {
        "in the middle of a tensor": 8 + header + start + 100,
        "in the middle of the header": header // 2,
        "in the header's length": 5,
    }
    shard.write_bytes(data[: cut[where]])
    named = {
        "in the middle of a tensor": (repr(GATE),),
        "in the middle of the header": (str(8 + header),),
    }
    refuse(broken, str(shard), f"{cut[where]} bytes", *named.get(where, ()))


def header_with(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + bytes(64)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {}}', "dtype"),
        ('{"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}', '"4"'),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}', "-16"),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}', "header"),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}', "shape"),
        ('{"a": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}}', "Q4"),
        (
            '{"a": {"dtype": "F8_E8M0", "shape": [64], "data_offsets": [0, 64]}}',
            "'a': found dtype F8_E8M0",
        ),
        (
            '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
            '"b": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]}}',
            "b",
        ),
    ],
)
def test_an_impossible_header_is_refused_with_its_file_and_the_reason(
    tmp_path: Path, text: str, named: str
) -> None:
    (tmp_path / WEIGHTS).write_bytes(header_with(text))
    with pytest.raises(UserError, match=re.escape(named)) as error:
        SafetensorsFile(tmp_path / WEIGHTS)
    assert str(tmp_path / WEIGHTS) in str(error.value)


def test_an_index_that_places_a_tensor_in_a_wrong_file_is_refused(broken: Path) -> None:
    shard = shard_of(broken, GATE)

    def elsewhere(weight_map: dict[str, str]) -> None:
        weight_map[GATE] = next(other for other in weight_map.values() if other != shard.name)

    wrong = rewrite_index(broken, elsewhere)[GATE]
    refuse(broken, str(broken / wrong), repr(GATE), INDEX)


def test_an_index_that_names_a_tensor_twice_is_refused(broken: Path) -> None:
    text = (broken / INDEX).read_text()
    name = f'"{GATE}": '
    (broken / INDEX).write_text(
        text.replace(name, f'{name}"model-00001-of-00004.safetensors", {name}', 1)
    )
    refuse(broken, str(broken / INDEX), repr(GATE), "duplicate")


def test_a_tensor_that_two_shards_hold_or_the_index_does_not_name_is_refused(broken: Path) -> None:
    holder = shard_of(broken, GATE)
    other = next(file for file in sorted(broken.glob("*.safetensors")) if file != holder)
    tensors = load_file(other)
    save_file({**tensors, GATE: torch.zeros(64, 32)}, other, metadata={"format": "pt"})
    refuse(broken, str(other), repr(GATE), INDEX, holder.name)
    save_file({**tensors, "stray": torch.zeros(1)}, other, metadata={"format": "pt"})
    refuse(broken, str(other), "'stray'", INDEX)


def test_pickled_weights_are_refused(broken: Path) -> None:
    for file in [*broken.glob("*.safetensors"), broken / INDEX]:
        file.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"never opened")
    refuse(broken, str(broken), "pickled", "pytorch_model.bin")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3', expected 'diffusion_gemma'"),
        ({"model_type": None}, "model_type None"),
        (
            {"text_config": {"model_type": "diffusion_gemma_text", "hidden_size": "wide"}},
            "hidden_size",
        ),
        ({"text_config": 7}, "text_config"),
    ],
)
def test_a_config_of_another_model_is_refused_by_its_key(
    broken: Path, changed: dict[str, Any], said: str
) -> None:
    tree = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**tree, **changed}))
    refuse(broken, str(broken / "config.json"), said)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_not_json_is_refused(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    refuse(broken, str(broken / "config.json"))


@pytest.fixture
def ground(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a recipe for the broken checkpoint."""
    folder = tmp_path_factory.mktemp("ground")
    rows = [
        {"input_ids": [2, 7, 8, 9, 10, 11], "prefix_length": 3, "complete": True, "id": str(index)}
        for index in range(8)
    ]
    for part in ("train", "validation"):
        Dataset.from_list(rows).save_to_disk(str(folder / "data" / part))
    recipe = {
        "name": "small",
        "model": {"id": str(broken)},
        "data": {"source": "unused"},
        "train": {"steps": 1, "global_batch_size": 2, "precision": "float32"},
        "parallel": {"ep": 2},
        "lora": {"rank": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_a_run_on_a_wrong_checkpoint_ends_with_one_line_before_it_trains(
    commands: Side, broken: Path, ground: Path
) -> None:
    shard = change(broken, GATE, (GATE, torch.zeros(64, 48)))
    arguments = ("-c", "recipe.yaml", "--data", "data", "--output", "run")
    code, said = commands.run("canvastune.train", *arguments, ranks=2, expect=None, folder=ground)
    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith("canvastune: error")]
    assert len(errors) == 1, said
    assert shard in errors[0]
    assert repr(GATE) in errors[0]
    assert not list((ground / "run").glob("metrics.jsonl")), "a step was made"


def one_rank_cannot_read(folder: Path, ground: Path) -> None:
    signal.alarm(60)  # a rank that is left waiting for the other would wait for hours
    get_slice = CheckpointReader.get_slice

    def unreadable(reader: CheckpointReader, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        if name == GATE and dist.get_rank() == 1:
            raise UserError(f"{reader.path(name)}: tensor {name!r} cannot be read")
        return get_slice(reader, name, slices)

    with (
        mock.patch.object(CheckpointReader, "get_slice", unreadable),
        pytest.raises(UserError, match=re.escape(GATE)),
    ):
        train(load_config(ground / "recipe.yaml"), ground / "data", ground / "run")


def test_a_slice_that_one_rank_cannot_read_ends_all_ranks_with_its_words(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(one_rank_cannot_read, 2, tmp_path, ground)

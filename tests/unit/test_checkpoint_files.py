"""Checkpoints on disk: what is written is what transformers reads, and what is broken is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from canvastune.checkpoint.hf_format import (
    INDEX,
    WEIGHTS,
    CheckpointReader,
    CheckpointWriter,
    SafetensorsFile,
)
from canvastune.checkpoint.hub import SIDE_FILES, copy_files
from canvastune.errors import UserError
from tests.support.small import stock_model

SLIDING_LAYERS = 3  # for several shards


def tensors() -> dict[str, torch.Tensor]:
    """Every kind that a checkpoint may hold.

    Odd sizes before wide types, a scalar, an empty one.
    """
    torch.manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(5, 3, dtype=torch.float64),
        "brain": torch.randn(7, 3, 2).to(torch.bfloat16),
        "small": torch.randn(9).to(torch.float8_e4m3fn),
        "plain": torch.randn(4, 6),
        "half": torch.randn(3).to(torch.float16),
        "counts": torch.arange(11),
        "scalar": torch.tensor(0.75),
        "none": torch.empty(0, 4),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def specs(values: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in values.items()}


def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    values = tensors()
    with CheckpointWriter(tmp_path, specs(values)) as writer:
        for name in reversed(values):  # in any order
            writer.write(name, values[name])
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]
    read = load_file(tmp_path / WEIGHTS)
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert same(read[name], value), f"{name} changed on its way through the file"
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}, (
            "transformers refuses a file that does not say it holds PyTorch tensors"
        )


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    assert set(reader.names()) == set(values)
    assert reader.specs() == specs({name: values[name] for name in reader.names()})
    for name, value in values.items():
        assert same(reader.get(name), value), f"{name} is read wrongly"


def test_changing_a_tensor_that_was_read_leaves_its_file_unchanged(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    for name in ("plain", "brain"):
        reader.get(name).fill_(7)
        reader.get_slice(name, (slice(0, 2),)).fill_(7)
        assert same(reader.get(name), tensors()[name])


def test_slices_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    for slices in (
        (slice(2, 5),),
        (slice(0, 7), slice(1, 2)),
        (slice(3, 4), slice(0, 3), slice(1, 2)),
        (slice(4, 4),),
    ):
        assert same(
            reader.get_slice("brain", slices).contiguous(), values["brain"][slices].contiguous()
        ), f"brain[{slices}] is read wrongly"


def test_shards_and_index_load_in_transformers_with_every_value(
    checkpoint: Path, tmp_path: Path
) -> None:
    limit = 120_000
    reader = CheckpointReader(checkpoint)
    copy_files(checkpoint, tmp_path, SIDE_FILES)
    with CheckpointWriter(tmp_path, reader.specs(), limit) as writer:
        finished = [
            shard for name in reader.names() if (shard := writer.write(name, reader.get(name)))
        ]
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert sorted(finished) == shards
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= limit, (
            f"{shard} is larger than was asked for"
        )
    index = json.loads((tmp_path / INDEX).read_text())
    theirs = json.loads((checkpoint / INDEX).read_text())
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    expected, found = stock_model(checkpoint).state_dict(), stock_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert CheckpointReader(tmp_path).fingerprint() == reader.fingerprint(), (
        "the fingerprint depends on the sharding"
    )


def test_fingerprint_sees_one_changed_value(checkpoint: Path, broken: Path) -> None:
    before = CheckpointReader(broken).fingerprint()
    shard = sorted(broken.glob("*.safetensors"))[0]
    values = load_file(shard)
    first = sorted(values)[0]
    values[first].view(-1)[0] += 1
    save_file(values, shard, metadata={"format": "pt"})
    assert (
        CheckpointReader(broken).fingerprint()
        != before
        == CheckpointReader(checkpoint).fingerprint()
    )


def test_writer_refuses_what_its_specs_do_not_say(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"a": ((2, 3), torch.float32), "b": ((1,), torch.float32)})
    with pytest.raises(ValueError, match=r"'a'.*\[3, 2\].*\[2, 3\]"):
        writer.write("a", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"'a'.*bfloat16.*float32"):
        writer.write("a", torch.zeros(2, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="'c'"):
        writer.write("c", torch.zeros(1))
    writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'a'"):
        writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'b'"):
        writer.close()


def test_checkpoint_larger_than_the_disk_is_refused_before_a_byte_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"4,000 TB"):
        CheckpointWriter(tmp_path, {"a": ((10**15,), torch.float32)})
    assert not list(tmp_path.iterdir())


def test_a_small_disk_and_a_small_checkpoint_are_not_called_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_200_000})
    monkeypatch.setattr("canvastune.checkpoint.hf_format.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 14\.2 MB\b.* 1\.20 MB free"):
        CheckpointWriter(tmp_path, {"a": ((3_550_000,), torch.float32)})


def test_a_folder_that_was_removed_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: no such folder\b"):
        CheckpointReader(tmp_path / "gone")


def refuse(folder: Path, *said: str) -> None:
    with pytest.raises(UserError) as error:
        CheckpointReader(folder)
    for text in said:
        assert text in str(error.value), f"the message does not name {text!r}: {error.value}"


def test_missing_shard_is_named(broken: Path) -> None:
    (broken / "model-00002-of-00004.safetensors").unlink()
    refuse(broken, "model-00002-of-00004.safetensors", "missing")


def test_truncated_file_is_named_with_its_tensor(broken: Path) -> None:
    shard = broken / "model-00003-of-00004.safetensors"
    last = list(SafetensorsFile(shard).specs)[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    refuse(broken, shard.name, "truncated", repr(last), f"{len(data) - 10} bytes")
    shard.write_bytes(data[:200])
    refuse(broken, shard.name, "truncated", "200 bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        (7).to_bytes(8, "little") + b"nothing",
    ],
)
def test_file_that_is_not_safetensors_is_named(broken: Path, content: bytes) -> None:
    shard = broken / "model-00001-of-00004.safetensors"
    shard.write_bytes(content)
    refuse(broken, shard.name, "not a safetensors file")


def test_index_that_points_elsewhere_is_refused(broken: Path) -> None:
    index = json.loads((broken / INDEX).read_text())
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (broken / INDEX).write_text(json.dumps(index))
    refuse(broken, repr(names[0]), index["weight_map"][names[-1]], INDEX)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (broken / INDEX).write_text(json.dumps(index))
    refuse(broken, "'../elsewhere.safetensors'", "same folder")
    (broken / INDEX).write_text("{}")
    refuse(broken, INDEX, "weight_map")


def test_missing_tensor_is_named_with_its_folder(checkpoint: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape(str(checkpoint)) + r".*'model\.decoder\.layers\.9\.x'"
    ):
        CheckpointReader(checkpoint).get("model.decoder.layers.9.x")


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    refuse(tmp_path, str(tmp_path), WEIGHTS, INDEX)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    refuse(tmp_path, "pickled", "pytorch_model.bin", "safetensors")


def test_side_files_are_copied_byte_for_byte_and_weights_are_not(
    broken: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out")
    (broken / "config.json").write_text('{ "kept":   "as it stands" }')
    (broken / "additional_chat_templates").mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "provenance.json",
    ):
        (broken / name).write_text(name)
    copied = copy_files(broken, out, SIDE_FILES)
    kept = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    }
    assert set(copied) == kept
    assert all((out / name).read_bytes() == (broken / name).read_bytes() for name in kept)
    assert {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()} == kept

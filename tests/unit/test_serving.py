"""`canvastune serve`: a folder that a server would refuse, or serve wrongly, is refused with the way
out; the command is the one that docs/serving.md says was run or read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from canvastune.checkpoint.generation_config import read_generation_file, sglang_text
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import ENCODER_SCALAR
from canvastune.errors import UserError
from canvastune.serving import BACKENDS, Server, find_server
from pipelines.cli import main
from pipelines.parser import build_parser
from tests.support.documents import ROOT, blocks, commands

GENERATION = "generation_config.json"
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "my model"))


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(file.read_text())
    edit(tree)
    file.write_text(json.dumps(tree))


def refused(folder: Path, backend: str, *said: str) -> None:
    with pytest.raises(UserError) as error:
        find_server(folder, backend, "127.0.0.1", 8000)
    text = f"{error.value} {error.value.hint}"
    for part in said:
        assert part in text, f"{part!r} is not in: {text}"


@every_backend
def test_a_complete_model_gives_a_command_with_its_folder_and_address(
    model: Path, backend: str
) -> None:
    server = find_server(model, backend, "0.0.0.0", 8123, ["--more", "a b"])
    assert str(model) in server.command
    at = server.command.index("--port")
    assert server.command[at - 2 : at + 2] == ("--host", "0.0.0.0", "--port", "8123")
    assert str(server).endswith("--more 'a b'")
    assert f"'{model}'" in str(server), "a shell would split the folder's name"
    assert server.remarks


def test_the_parser_offers_every_backend() -> None:
    for backend in BACKENDS:
        build_parser().parse_args(["serve", "x", "--backend", backend])
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "x", "--backend", "llama.cpp"])


def test_vllm_keeps_float32_weights_and_leaves_bfloat16_ones_to_itself(model: Path) -> None:
    assert "--dtype float32" in str(find_server(model, "vllm", "h", 1))
    change(model / "config.json", lambda tree: tree.update(dtype="bfloat16"))
    assert "--dtype" not in str(find_server(model, "vllm", "h", 1))


@every_backend
def test_an_adapter_is_refused_with_the_command_that_merges_it(
    backend: str, tmp_path: Path
) -> None:
    folder = tmp_path / "an adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, backend, "found an adapter", f"canvastune merge '{folder}' --output")


def test_a_run_is_refused_with_its_model_and_a_name_on_the_hub_with_its_download(
    model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model, run / "model")
    refused(run, "vllm", "found a run", str(run / "model"))
    (run / "train").mkdir()
    (run / "model").rename(run / "train" / "model")
    refused(run, "vllm", "found a run", str(run / "train" / "model"))
    refused(Path("google/model"), "mlx", "no such folder", "hf download")


@every_backend
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_missing_file_is_named(model: Path, backend: str, name: str) -> None:
    (model / name).unlink()
    refused(model, backend, name)


@every_backend
def test_a_broken_download_is_found_before_the_server_starts(model: Path, backend: str) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(model, backend, shard.name, "truncated")


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_servers_that_build_a_processor_need_its_file(model: Path, backend: str) -> None:
    (model / "processor_config.json").unlink()
    refused(model, backend, "no processor_config.json", "Copy processor_config.json from the base")
    find_server(model, "mlx", "h", 1)
    find_server(model, "sglang", "h", 1)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ({"temperature": 0.7}, "Remove"),
        ({"max_length": 20}, "Remove"),
        ({"cache_implementation": "static"}, "Remove"),
        ({"confidence_threshold": 1}, '"confidence_threshold": 1.0'),
    ],
    ids=str,
)
def test_a_generation_config_that_stock_does_not_follow_is_refused_for_it(
    model: Path, given: dict[str, Any], way_out: str
) -> None:
    change(model / GENERATION, lambda tree: tree.update(return_dict_in_generate=False))
    find_server(model, "transformers", "h", 1)
    change(model / GENERATION, lambda tree: tree.update(given))
    refused(model, "transformers", *given, way_out)


@pytest.mark.parametrize("token", ["boa_token", "eoa_token"])
def test_a_tokenizer_without_audio_tokens_is_refused_where_the_processor_wants_them(
    model: Path, token: str
) -> None:
    value = json.loads((model / "tokenizer_config.json").read_text())[token]
    change(model / "tokenizer_config.json", lambda tree: tree.pop(token))
    refused(model, "transformers", f"no {token}", "--backend vllm")
    find_server(model, "vllm", "h", 1)
    extra = {"extra_special_tokens": {token: value}}
    change(model / "tokenizer_config.json", lambda tree: tree.update(extra))
    find_server(model, "transformers", "h", 1)


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_servers_that_choose_code_by_the_architecture_need_it(model: Path, backend: str) -> None:
    change(model / "config.json", lambda tree: tree.pop("architectures"))
    refused(model, backend, "architectures", "DiffusionGemmaForBlockDiffusion")
    find_server(model, "mlx", "h", 1)


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
@pytest.mark.parametrize("section", ["", "text_config"])
def test_untied_embeddings_are_refused_where_the_server_has_one_tensor(
    model: Path, backend: str, section: str
) -> None:
    def untie(tree: dict[str, Any]) -> None:
        (tree[section] if section else tree)["tie_word_embeddings"] = False

    change(model / "config.json", untie)
    refused(model, backend, "tie_word_embeddings", "found False")


@pytest.mark.parametrize(
    "key", ["t_min", "t_max", "stability_threshold", "confidence_threshold", "sampler_config"]
)
def test_sampler_keys_that_vllm_looks_up_are_named_with_their_values(model: Path, key: str) -> None:
    change(model / GENERATION, lambda tree: tree.pop(key))
    default = {"t_min": 0.4, "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005}
    value = default.get(key, {"entropy_bound": 0.1, "_cls_name": "EntropyBoundSamplerConfig"})
    refused(model, "vllm", f"no usable {key}", json.dumps({key: value})[1:-1])
    find_server(model, "mlx", "h", 1)


def test_a_model_without_a_generation_config_is_refused_for_vllm_with_all_of_it(
    model: Path,
) -> None:
    (model / GENERATION).unlink()
    refused(model, "vllm", "max_denoising_steps", "t_min", "entropy_bound")
    change_to = {"sampler_config": {"entropy_bound": 0.1}}
    (model / GENERATION).write_text(json.dumps(change_to))
    refused(model, "vllm", "_cls_name")


def test_scalars_that_differ_are_refused_only_where_one_of_them_is_lost(model: Path) -> None:
    name = ENCODER_SCALAR.format(1)
    shard = CheckpointReader(model).path(name)
    values = load_file(shard)
    values[name] = torch.full_like(values[name], 0.5)
    save_file(values, shard, metadata={"format": "pt"})
    refused(model, "vllm", "layer 1", "0.5", "--backend sglang")
    for backend in ("sglang", "mlx", "transformers"):
        find_server(model, backend, "h", 1)


def test_sglang_gets_the_sampler_of_generation_config_json(model: Path) -> None:
    server = find_server(model, "sglang", "h", 1)
    file = Path(server.command[server.command.index("--dllm-algorithm-config") + 1])
    assert file == model / "sglang.yaml"
    assert yaml.safe_load(file.read_text()) == {
        "max_denoising_steps": 16,
        "sampler_config": {"entropy_bound": 0.1},
        "temperature_schedule": {"t_min": 0.2, "t_max": 0.4},
        "stopping_config": {"stability_threshold": 1, "confidence_threshold": 0.005},
    }
    change(model / GENERATION, lambda tree: tree.update(max_denoising_steps=9))
    find_server(model, "sglang", "h", 1)
    assert file.read_text() == sglang_text(read_generation_file(model).sampler)
    assert "max_denoising_steps: 9\n" in file.read_text(), "an outdated file was kept"


def test_what_sglang_refuses_is_refused_before_it_starts(model: Path) -> None:
    change(model / "config.json", lambda tree: tree.update(quantization_config={"bits": 4}))
    refused(model, "sglang", "quantization_config", "--backend vllm")


def test_run_becomes_the_server_and_prints_its_command_alone_on_standard_output(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append((program, command)))
    program = tmp_path / "bin" / "mlx_vlm.server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    given = ["serve", str(model), "--backend", "mlx", "--port", "8080"]
    assert main(given) == 0
    assert started == []
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        f"mlx_vlm.server --model '{model}' --host 127.0.0.1 --port 8080"
    ]
    assert main([*given, "--run", "--", "--max-tokens", "64"]) == 0
    assert started[0][0] == str(program)
    assert started[0][1][-2:] == ("--max-tokens", "64")


def test_a_server_that_is_not_installed_is_named_with_its_installation(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["serve", str(model), "--backend", "vllm", "--run"]) == 1
    with pytest.raises(UserError, match=r"^vllm: .* PATH\b") as error:
        Server(("vllm", "serve"), (), "pip install vllm==0.33.0").run()
    assert " vllm==0.33.0" in error.value.hint


@every_backend
def test_the_page_on_serving_has_the_command_and_its_installation(
    model: Path, backend: str
) -> None:
    change(model / "config.json", lambda tree: tree.update(dtype="bfloat16"))
    server = find_server(model, backend, "127.0.0.1", 8000)
    shown = "workspace/runs/rank16/model"
    expected = [word.replace(str(model), shown) for word in server.command]
    page = ROOT / "docs" / "serving.md"
    found = [
        [Path(words[0]).name, *words[1:]]
        for block in blocks(page, "sh")
        for words in commands(block.text)
    ]
    assert expected in found, f"{page.name} lacks: {' '.join(expected)}"
    versions = re.findall(r"([a-z-]+)(?:\[\w+\])?==([\d.]+)", server.install)
    assert versions
    text = page.read_text(encoding="utf-8")
    for name, version in versions:
        assert version in text, f"{page.name} does not name version {version} of {name}"

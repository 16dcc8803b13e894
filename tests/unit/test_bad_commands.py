"""Every command refuses what it cannot do in one message, with exit code 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.support.bad_inputs import LINES, Ground, ends_well
from tests.support.warm import Popen

COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a workspace that is a file": (
        ["run", "recipe.yaml", "--workspace", "data.jsonl"],
        ("--workspace", "cannot create", "a folder"),
    ),
    "a tiny model over existing files": (
        ["make-tiny-model", "model"],
        ("model", "not empty", "output directory"),
    ),
    "a model without experts": (
        ["plan", "recipe.yaml", "--set", "model.id=dense"],
        ("config.json", "moe_intermediate_size", "the checkpoint"),
    ),
    "a plan for no GPU": (
        ["plan", "recipe.yaml", "--gpus", "0"],
        ("--gpus", "found 0", "at least 1"),
    ),
    "a plan for less than no GPU": (
        ["plan", "recipe.yaml", "--gpus", "-1"],
        ("--gpus", "found -1", "at least 1"),
    ),
    "a pipeline in a file of another kind": (
        ["compile", "-o", "pipeline.txt"],
        ("-o pipeline.txt", ".yaml", " finetune.yaml"),
    ),
    "a pipeline below a file": (
        ["compile", "-o", "data.jsonl/finetune.yaml"],
        ("data.jsonl/finetune.yaml", "cannot write", "a file"),
    ),
    "a pipeline in place of a folder": (
        ["compile", "-o", "dense.yaml"],
        ("-o dense.yaml", "a directory", "a file"),
    ),
    "a pipeline where nothing can be made": (
        ["compile", "-o", "/proc/x/finetune.yaml"],
        ("/proc/x/", "cannot write", "a file"),
    ),
    "a report of no run": (
        ["report", "model"],
        ("model: ", "run.json", "WORKSPACE/runs/RUN"),
    ),
    "an unknown accelerator": (
        ["plan", "recipe.yaml", "--gpus", "8", "--set", "hardware.accelerator=h1000"],
        ("hardware.accelerator", "'h1000'", "'h100'?"),
    ),
    "ranks that do not divide": (
        ["plan", "recipe.yaml", "--gpus", "3"],
        ("parallel.ep: found 8", "one of"),
    ),
    "data that is a link to nothing": (
        ["prepare", "recipe.yaml", "--output", "out", "--set", "data.source=link.jsonl"],
        ("data.source: link.jsonl: ", "/unmounted/rows.jsonl", "another path"),
    ),
    "a host that is no address": (
        ["submit", "hub.yaml", "--host", "localhost"],
        ("--host localhost", "http", "For example"),
    ),
    "a host without a server": (
        ["submit", "hub.yaml", "--host", "http://127.0.0.1:1"],
        ("127.0.0.1:1", "no response", "the address"),
    ),
    "data that no pod sees": (
        ["submit", "recipe.yaml", "--host", "http://127.0.0.1:1"],
        ("data.source", "no pod", "Copy it"),
    ),
    "a token file that is not there": (
        ["submit", "hub.yaml", "--host", "http://127.0.0.1:1", "--token-file", "no-token"],
        ("token file no-token", "No such", "the token"),
    ),
    "a token file with more than a token": (
        ["submit", "hub.yaml", "--host", "http://127.0.0.1:1", "--token-file", "hub.yaml"],
        ("token file hub.yaml", "one token", "the token"),
    ),
    "cluster settings that are not there": (
        ["submit", "hub.yaml", "--host", "http://127.0.0.1:1", "--cluster-file", "none.yaml"],
        ("none.yaml", "No such", "the path"),
    ),
    "cluster settings with an unknown key": (
        ["submit", "hub.yaml", "--host", "http://127.0.0.1:1", "--cluster-file", "hub.yaml"],
        ("hub.yaml", "unknown key 'cluster.name'", "cluster"),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_refuses_in_one_message(
    case: str, ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ground.folder)
    (ground.folder / "hub.yaml").write_text(
        yaml.safe_dump({"name": "hub", "data": {"source": "openai/gsm8k"}})
    )
    dense = json.loads((ground.model / "config.json").read_text())
    dense["text_config"]["moe_intermediate_size"] = None
    (ground.folder / "link.jsonl").symlink_to("/unmounted/rows.jsonl")
    (ground.folder / "dense").mkdir()
    (ground.folder / "dense.yaml").mkdir()
    (ground.folder / "dense" / "config.json").write_text(json.dumps(dense))
    command, words = COMMANDS[case]
    ends_well(ground, command, words, capsys)


def test_a_user_sees_the_same_from_a_shell(ground: Ground) -> None:
    (ground.folder / "data.jsonl").write_bytes(LINES[:-20])
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "pipelines.cli", *ground.command()]
    with Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        said, errors = process.communicate()
    assert process.returncode == 1
    assert "data.max_bad_row_fraction" in errors.splitlines()[-1]
    assert "Traceback" not in errors + said
    assert not (ground.folder / "out").exists()


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)  # as of `| head` that has ended
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "completion", "bash"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")

"""`canvastune fetch` with the Hub's real client: killed, repeated, and the Hub then switched off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub_downloads import DownloadHub

FILES = {
    "config.json": b"{}",
    "one.safetensors": b"1" * 3_000_000,
    "two.safetensors": b"2" * 3_000_000,
}
COMMIT = "a" * 40
MODEL = "team/model"
Process = subprocess.Popen[str]


def _rows(word: str, count: int) -> bytes:
    rows = [{"question": f"Question {n}?", "answer": f"{word} {n}"} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# of a data set, whose rows another commit changes
OLD, NEW = "b" * 40, "c" * 40
DATA = {
    OLD: {"README.md": b"# Data\n", "train.jsonl": _rows("old", 3), "test.jsonl": _rows("test", 2)},
    NEW: {"README.md": b"# Data\n", "train.jsonl": _rows("new", 4), "test.jsonl": _rows("test", 2)},
}
_FETCH = f"""
from canvastune.checkpoint.fetch import fetch_model
from canvastune.checkpoint.hub import resolve_model
from canvastune.config.schema import ModelConfig
from canvastune.logging import configure_logging
import sys
configure_logging()
model = ModelConfig(id={MODEL!r}, revision="main")
print((fetch_model if sys.argv[1] == "fetch" else resolve_model)(model))
"""


@pytest.fixture
def hub() -> Iterator[DownloadHub]:
    with DownloadHub({f"models/{MODEL}": {COMMIT: FILES}, "datasets/team/data": DATA}) as made:
        yield made


def _run(hub: DownloadHub, home: Path, program: str, *what: str, **more: str) -> Process:
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-c", program, *what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process: Process) -> str:
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    return said


def test_a_killed_fetch_goes_on_with_the_files_that_lack_and_runs_then_need_no_hub(
    hub: DownloadHub, tmp_path: Path
) -> None:
    blobs = tmp_path / "hub" / "models--team--model" / "blobs"
    hub.stalls = "two.safetensors"
    killed = _run(hub, tmp_path, _FETCH, "fetch")
    assert hub.stalled.wait(60)
    deadline = time.monotonic() + 30
    while len([file for file in blobs.glob("*") if file.suffix != ".incomplete"]) < 2:
        assert time.monotonic() < deadline, (hub.sent, list(blobs.glob("*")))
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    hub.stalls = ""
    hub.go_on.set()
    (part,) = blobs.glob("*.incomplete")
    os.utime(part, (time.time() - 60,) * 2)

    said = _end(_run(hub, tmp_path, _FETCH, "fetch"))
    assert hub.sent.count("one.safetensors") == hub.sent.count("two.safetensors") == 1
    assert not list(blobs.glob("*.incomplete")), "what the killed one left fills the claim"
    assert "removed" in said
    assert "3 files" in said
    assert "verified" in said

    hub.close()
    said = _end(_run(hub, tmp_path, _FETCH, "resolve", HF_HUB_OFFLINE="1"))
    folder = Path(said.splitlines()[-1])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


# Each argument is a recipe as JSON. Prints the rows of each as JSON, the last line of all.
_READ = """
import json, sys
from canvastune.config import parse_config
from canvastune.preparation.sources import open_sources
read = []
for recipe in sys.argv[1:]:
    config = parse_config(json.loads(recipe))
    read.append([row.value["answer"] for s in open_sources(config.data) for row in s.source.rows()])
print(json.dumps(read))
"""
_FETCHES = """
import sys
from pipelines.cli import main
sys.exit(any(main(["fetch", recipe]) for recipe in sys.argv[1:]))
"""


def test_a_run_reads_the_data_that_was_fetched_and_needs_no_hub(
    hub: DownloadHub, tmp_path: Path
) -> None:
    """Of two commits of one data set, each recipe gets its own, whichever was fetched last."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    recipes = []
    for revision in (OLD, "main"):
        data = {"source": "team/data", "revision": revision, "validation": "test"}
        recipes.append(json.dumps({"name": "a", "model": {"id": str(model)}, "data": data}))
    files = [tmp_path / f"{number}.yaml" for number in range(2)]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(recipe)
    said = _end(_run(hub, tmp_path / "home", _FETCHES, *map(str, files)))
    assert said.count("team/data[train]") == said.count("team/data[test]") == 2
    rows = [["test 0", "test 1", *(f"old {n}" for n in range(3))]]
    rows += [["test 0", "test 1", *(f"new {n}" for n in range(4))]]

    hub.close()
    said = _end(_run(hub, tmp_path / "home", _READ, *recipes, HF_HUB_OFFLINE="1"))
    assert json.loads(said.splitlines()[-1]) == rows

"""`canvastune fetch`: room is checked before, every file after, and a damaged one is removed."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from canvastune.checkpoint import fetch
from canvastune.checkpoint.hub import hub_reason
from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError, one_line

CONTENTS = {"config.json": b"{}", "model-1.safetensors": b"one", "model-2.safetensors": b"two"}
MODEL = ModelConfig(id="team/model", revision="main")
Usage = namedtuple("Usage", "total used free")


class Hub:
    """A repository, and a download that writes what it is given into the cache."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "models--team--model" / "snapshots" / "abc"
        self.blobs = cache / "models--team--model" / "blobs"
        self.served = dict(CONTENTS)
        self.downloads = 0

    def model_info(self, name: str, **_: Any) -> Any:
        assert name == "team/model"
        files = [self._file(name, content) for name, content in CONTENTS.items()]
        return SimpleNamespace(siblings=[*files, self._file("readme.md", b"not read")])

    @staticmethod
    def _file(name: str, content: bytes) -> Any:
        lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())
        large = name.endswith(".safetensors")
        return SimpleNamespace(rfilename=name, size=len(content), lfs=lfs if large else None)

    def download(self, _: ModelConfig) -> Path:
        self.downloads += 1
        for path in (self.folder, self.blobs):
            path.mkdir(parents=True, exist_ok=True)
        for name, content in self.served.items():
            if not (self.folder / name).exists():
                blob = self.blobs / f"{name}-{self.downloads}"
                blob.write_bytes(content)
                (self.folder / name).symlink_to(blob)
        return self.folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr(fetch.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "HfApi", lambda: made)
    monkeypatch.setattr(fetch, "resolve_model", made.download)
    monkeypatch.setattr(fetch, "_REPORT_SECONDS", 0.01)
    return made


def test_a_model_is_downloaded_and_verified(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.fetch_model(MODEL) == hub.folder
    assert "3 files" in capsys.readouterr().err, "the readme is not read by a run"


@pytest.mark.parametrize("content", [b"xxx", b"longer than it should be"])
def test_a_damaged_file_is_removed_and_only_it_is_downloaded_again(
    hub: Hub, content: bytes
) -> None:
    hub.served["model-2.safetensors"] = content
    with pytest.raises(UserError, match=r"model-2\.safetensors is damaged") as refused:
        fetch.fetch_model(MODEL)
    assert "same command" in refused.value.hint
    assert sorted(file.name for file in hub.folder.iterdir()) == [
        "config.json",
        "model-1.safetensors",
    ]
    assert sorted(file.name for file in hub.blobs.iterdir()) == [
        "config.json-1",
        "model-1.safetensors-1",
    ]
    hub.served = dict(CONTENTS)
    fetch.fetch_model(MODEL)
    assert {file.name for file in hub.blobs.iterdir()} == {
        "config.json-1",
        "model-1.safetensors-1",
        "model-2.safetensors-2",
    }


def test_too_little_room_is_named_before_anything_is_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: Usage(10, 6, 4))
    with pytest.raises(UserError, match=rf"{MODEL.id} .* B, .* B free") as refused:
        fetch.fetch_model(MODEL)
    assert "workspace.size" in refused.value.hint
    assert not hub.downloads


def test_what_is_there_already_needs_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "try_to_load_from_cache", lambda *_, **__: "there")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    assert fetch.fetch_model(MODEL) == hub.folder


def test_progress_is_logged_while_it_downloads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said, logged = [], threading.Event()

    def info(text: str, **_: Any) -> None:
        said.append(text)
        logged.set()

    def slow(config: ModelConfig) -> Path:
        folder = hub.download(config)
        assert logged.wait(20), "nothing was logged while it downloads"
        return folder

    monkeypatch.setattr(fetch.logger, "info", info)
    monkeypatch.setattr(fetch, "resolve_model", slow)
    fetch.fetch_model(MODEL)
    assert re.match(r"team/model: \d+ B of \d+ B, [\d.,]+ k?B/s", said[0]), said[0]


def test_a_local_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fetch.fetch_model(ModelConfig(id=str(tmp_path))) == tmp_path


def test_the_reason_is_what_failed_and_not_what_the_client_looked_for_then() -> None:
    with pytest.raises(LocalEntryNotFoundError) as caught:
        raise LocalEntryNotFoundError("not on the local disk") from OSError("no route\nto host.")
    assert hub_reason(caught.value) == "no route to host"
    assert hub_reason(LocalEntryNotFoundError("not on the local disk")) == "not on the local disk"


def test_a_longer_reason_says_that_it_is_cut() -> None:
    assert one_line("word " * 100, 20) == "word word word w ..."
    assert one_line(OSError()) == "OSError"

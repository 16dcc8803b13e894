"""`canvastune fetch` with the Hub's real client: killed, repeated, and the Hub then switched off."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FILES = {
    "config.json": b"{}",
    "one.safetensors": b"1" * 3_000_000,
    "two.safetensors": b"2" * 3_000_000,
}
COMMIT = "a" * 40
MODEL = "team/model"
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


class Hub:
    """A repository, over HTTP."""

    def __init__(self) -> None:
        self.stalls = ""  # a file of which only half is sent
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.sent: list[str] = []  # files that were downloaded
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if not self.path.startswith((f"/api/models/{MODEL}", f"/{MODEL}/resolve/")):
                    self.send_error(404)  # other requests of the client
                    return
                if self.path.startswith("/api/"):
                    listed = hub.tree() if "/tree/" in self.path else hub.about()
                    self._send(json.dumps(listed).encode(), {})
                    return
                name = self.path.rpartition("/")[2]
                digest = hashlib.sha256(FILES[name]).hexdigest()
                about = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
                self._send(FILES[name], about, name)

            def _send(self, data: bytes, headers: dict[str, str], name: str = "") -> None:
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if name and name == hub.stalls:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    hub.stalled.set()
                    hub.go_on.wait(60)
                    self.close_connection = True
                    return
                if name:
                    hub.sent.append(name)
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def tree(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": name,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
                "lfs": {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 1,
                },
            }
            for name, data in FILES.items()
        ]

    def about(self) -> dict[str, object]:
        siblings = [
            {
                "rfilename": file["path"],
                "size": file["size"],
                "blobId": file["oid"],
                "lfs": {"sha256": file["lfs"]["oid"], "size": file["size"], "pointerSize": 1},
            }
            for file in self.tree()
        ]
        return {"id": MODEL, "_id": "1", "sha": COMMIT, "siblings": siblings, "tags": []}

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


def _start(hub: Hub, home: Path, what: str = "fetch", **more: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-c", _FETCH, what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    return said


def test_a_killed_fetch_goes_on_with_the_files_that_lack_and_runs_then_need_no_hub(
    hub: Hub, tmp_path: Path
) -> None:
    blobs = tmp_path / "hub" / "models--team--model" / "blobs"
    hub.stalls = "two.safetensors"
    killed = _start(hub, tmp_path)
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

    said = _end(_start(hub, tmp_path))
    assert hub.sent.count("one.safetensors") == hub.sent.count("two.safetensors") == 1
    assert not list(blobs.glob("*.incomplete")), "what the killed one left fills the claim"
    assert "removed" in said
    assert "3 files" in said
    assert "verified" in said

    hub.close()
    said = _end(_start(hub, tmp_path, "resolve", HF_HUB_OFFLINE="1"))
    folder = Path(said.splitlines()[-1])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES

"""A real MLflow server in a separate process, which a test can kill, freeze and start again on the
same port.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import warm

# MLflow's own application on a small HTTP server: `mlflow server` takes twenty seconds to start on
# two cores, this takes two.
_SERVE = """
import sys
from werkzeug.serving import make_server
from mlflow.server import app
make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()
"""


class TrackingServer:
    """Use as a context manager; `uri` stays the same over restarts, and so does what is stored."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        store = f"sqlite:///{self.folder / 'server.db'}"
        environment = os.environ | {
            "_MLFLOW_SERVER_FILE_STORE": store,
            "_MLFLOW_SERVER_REGISTRY_STORE": store,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("ab") as output:
            self._process = warm.Popen(
                [sys.executable, "-c", _SERVE, str(self.port)],
                env=environment,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.05)
        raise TimeoutError(
            f"no MLflow server after a minute: {(self.folder / 'server.log').read_text()}"
        )

    def kill(self) -> None:
        """As a node that is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def requests(self, *methods: str) -> list[str]:
        """Return the requests that changed something, as `METHOD PATH`, as the server logged them."""
        found = re.findall(r'"(\w+) (\S+) HTTP', (self.folder / "server.log").read_text())
        return [
            f"{method} {path}"
            for method, path in found
            if method in methods and "search" not in path
        ]

    def freeze(self) -> None:
        """Accepts connections and never answers, until thawed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue to answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def no_outer_mlflow() -> Iterator[None]:
    """No MLflow but a test's own, whatever the environment or an earlier test says; the environment
    is then as it was.
    """
    with mock.patch.dict(os.environ):
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            os.environ.pop(name, None)
        yield


def train_record(step: int, **values: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "time": 1.7e9 + step,
        "loss": 1 / step,
        "lr": 1e-3,
        **values,
    }


def prepared(folder: Path, samples: Sequence[dict[str, Any]] = ()) -> Path:
    """What is logged of a prepared data set.

    Args:
        samples: the data card's first rows.
    """
    card = {
        "source": "openai/gsm8k",
        "format": "gsm8k",
        "fingerprint": "ab" * 32,
        "content_hash": "cd" * 32,
        "rows_read": 100,
        "kept": 90,
    }
    card |= {
        "train": 80,
        "validation": 10,
        "cut": 1,
        "dropped": {"empty answer": 3, "duplicate": 7},
        "samples": list(samples),
    }
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "card.json").write_text(json.dumps(card))
    (data / "card.html").write_text(f"<p>{[each['prefix'] for each in samples]}")
    return data


@contextlib.contextmanager
def refusing(status: int, body: str = "", healthy: bool = True) -> Iterator[str]:
    """The address of a server that gives every call the same answer; but /health, if it is healthy."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code = 200 if healthy and self.path == "/health" else status
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """The address of a server that accepts every call and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"

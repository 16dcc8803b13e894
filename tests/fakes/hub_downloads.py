"""Repositories of models and data sets over HTTP, as the Hub's client downloads them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]
_ROUTE = re.compile(
    r"/(?P<api>api/)?(?:(?P<kind>models|datasets)/)?(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info|resolve)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)


class DownloadHub:
    """Use as a context manager; `close` takes it off the network before.

    Attributes:
        commits: by `models/team/model` or `datasets/team/data`, the files of each commit; the last
            one is `main`.
        sent: files that were downloaded as a whole.
        stalls: a file of which only half is sent, until `go_on` is set.
    """

    def __init__(self, commits: dict[str, dict[str, Files]]) -> None:
        self.commits, self.sent, self.stalls = commits, list[str](), ""
        self.stalled, self.go_on = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(b"")

            def do_GET(self) -> None:
                self._answer(b"")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def _answer(self, body: bytes) -> None:
                status, data, headers, name = hub.answer(self.path, body)
                self.send_response(status)
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

    def answer(self, address: str, body: bytes) -> tuple[int, bytes, dict[str, str], str]:
        """Return status, content, headers, and the name of a file that this sends."""
        route = _ROUTE.fullmatch(urllib.parse.urlsplit(address).path)
        repository = f"{route['kind'] or 'models'}/{route['name']}" if route else ""
        if route is None or repository not in self.commits:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}, ""
        commits = self.commits[repository]
        revision = urllib.parse.unquote(route["revision"] or "main")
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, ""
        files, path = commits[commit], urllib.parse.unquote(route["path"] or "")
        if route["what"] == "resolve":
            if path not in files:
                about = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                return 404, b"{}", about, ""
            digest = hashlib.sha256(files[path]).hexdigest()
            return 200, files[path], {"ETag": f'"{digest}"', "X-Repo-Commit": commit}, path
        if route["what"] == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths", [])
            listed: Any = [_entry(name, files[name]) for name in asked if name in files]
        elif route["what"] == "tree":
            folder = f"{path}/" if path else ""
            listed = [_entry(name, data) for name, data in files.items() if name.startswith(folder)]
        else:
            listed = _about(repository.partition("/")[2], commit, files)
        return 200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, ""

    def close(self) -> None:
        """Stop answering."""
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> DownloadHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    return {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
        "lfs": {"oid": digest, "size": len(data), "pointerSize": 1},
    }


def _about(name: str, commit: str, files: Files) -> dict[str, object]:
    siblings = [
        {
            "rfilename": file["path"],
            "size": file["size"],
            "blobId": file["oid"],
            "lfs": {"sha256": file["lfs"]["oid"], "size": file["size"], "pointerSize": 1},
        }
        for file in (_entry(path, data) for path, data in files.items())
    ]
    return {"id": name, "_id": "1", "sha": commit, "siblings": siblings, "tags": []}

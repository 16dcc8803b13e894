"""What a push needs of the Hub's API, on this machine."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_writes"


class FakeHub:
    """Use as a context manager. Files go into the commit itself, as small ones do on the Hub."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}  # by repository
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []  # repositories, one for each commit
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(b"")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def _answer(self, body: bytes) -> None:
                status, tree = hub.answer(
                    self.path.partition("?")[0], self.headers.get("authorization"), body
                )
                text = json.dumps(tree).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        """Return the status and the content of a response."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if self.down or authorization != f"Bearer {TOKEN}":
            return (400 if self.down else 401), {"error": "closed for today, or to you"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "ada", "orgs": [{"name": "engines"}]}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.files:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}
            self.files[name], self.private[name] = {}, asked["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}"}
        _, _, _, owner, repository, action, *_ = path.split("/")
        return 200, getattr(self, f"_{action}")(f"{owner}/{repository}", body)

    def _preupload(self, name: str, body: bytes) -> dict[str, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        about = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        return {"files": [{"path": path, **about} for path in paths]}

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.files[name][value["path"]] = base64.b64decode(value["content"])
        self.commits.append(name)
        oid = f"{len(self.commits):040x}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

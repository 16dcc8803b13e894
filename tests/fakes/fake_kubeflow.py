"""A Kubeflow Pipelines API server on the loopback, as far as the client of kfp 2.17 calls it; it
records every call.

Answers as the real server does: a pipeline's first version has the pipeline's name and description;
uploads, lists, runs
and errors have its fields. It keeps no more than the tests look at.
"""

from __future__ import annotations

import email
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

API = "/apis/v2beta1"
_NOW = "2026-01-01T00:00:00Z"


@dataclass
class Call:
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    body: Any  # JSON decoded, or the text of an uploaded file
    token: str | None


@dataclass
class FakeKubeflow:
    """Use as a context manager.

    Attributes:
        token: the one that is accepted; None: any.
        version: as healthz names it; "" as servers that were built without one.
        page: requests go through the server of Kubeflow's page, as a port-forward's do.
        namespaces: those of a server with several teams; empty: it has one for all.
        script: what `GET runs/ID` answers, one after the other, the last one for ever: the run's
            state and its tasks'.
        started: called with each run that is created.
        watched: by run id, what returns the run's state instead of the script.
        broken: path parts and the (status, body, headers) that a request to them gets instead.
    """

    token: str | None = None
    version: str = "2.17.0"
    page: bool = False
    namespaces: tuple[str, ...] = ()
    script: list[dict[str, Any]] = field(default_factory=lambda: [{"state": "SUCCEEDED"}])
    started: Callable[[dict[str, Any]], object] | None = None
    watched: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    broken: dict[str, tuple[int, str, dict[str, str]]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> FakeKubeflow:
        self.listen()
        return self

    def listen(self, port: int = 0) -> None:
        """Answer on a port, or on any free one."""
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self})
        )
        self.host = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def called(self, method: str, path: str) -> list[Call]:
        """The requests of a method whose path ends so."""
        return [call for call in self.calls if call.method == method and call.path.endswith(path)]

    def answer(self, call: Call) -> tuple[int, Any]:
        """Status and JSON for a request."""
        if self.token is not None and call.token != self.token:
            return 401, {
                "code": 16,
                "message": "Request header error: there is no user identity header.",
            }
        where = call.query.get("namespace") or (
            call.body.get("namespace") if isinstance(call.body, dict) else None
        )
        if self.namespaces and where is not None and where not in self.namespaces:
            return 403, {
                "code": 7,
                "message": (
                    "User 'ann' is not authorized with reason: cannot list in the namespace"
                    f" {where}"
                ),
            }
        for (method, pattern), handle in _ROUTES.items():
            if method == call.method and (found := re.fullmatch(API + pattern, call.path)):
                return 200, handle(self, call, *found.groups())
        return 404, {"code": 5, "message": f"Not Found: {call.method} {call.path}"}

    def health(self, _: Call) -> Any:
        """Answer as the API server does, or (`page`) as the server of Kubeflow's page in front."""
        versions: dict[str, Any] = {"commit_sha": "0" * 40, "tag_name": self.version}
        if self.page:
            versions = {"apiServerTagName": self.version, "apiServerReady": True}
        return {**versions, "multi_user": bool(self.namespaces)}

    def list_pipelines(self, call: Call) -> Any:
        """By display name, in a namespace."""
        return {
            "pipelines": [
                p
                for p in _named(self.pipelines, call)
                if p["namespace"] == call.query.get("namespace", "")
            ]
        }

    def upload(self, call: Call) -> Any:
        """A pipeline and its first version."""
        number = str(len(self.pipelines) + 1)
        made = {"pipeline_id": f"pipeline-{number}", "namespace": call.query.get("namespace", "")}
        made |= {
            "display_name": call.query["name"],
            "description": call.query.get("description", ""),
            "created_at": _NOW,
        }
        self.pipelines.append(made)
        self._add_version(made["pipeline_id"], call)
        return made

    def upload_version(self, call: Call) -> Any:
        """One more."""
        return self._add_version(call.query["pipelineid"], call)

    def _add_version(self, pipeline_id: str, call: Call) -> Any:
        spec, *platform = yaml.safe_load_all(call.body)
        made: dict[str, Any] = {
            "pipeline_id": pipeline_id,
            "pipeline_version_id": f"version-{len(self.versions) + 1}",
            "display_name": call.query["name"],
        }
        made["description"] = call.query.get("description", "")
        made["pipeline_spec"] = (
            {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec
        )
        made["created_at"] = f"2026-01-01T00:00:{len(self.versions):02d}Z"
        self.versions.append(made)
        return made

    def list_versions(self, call: Call, pipeline_id: str) -> Any:
        """In the order that is asked for: newest first."""
        return {
            "pipeline_versions": [
                v for v in reversed(self.versions) if v["pipeline_id"] == pipeline_id
            ]
        }

    def list_experiments(self, call: Call) -> Any:
        """By display name."""
        return {"experiments": _named(self.experiments, call)}

    def create_experiment(self, call: Call) -> Any:
        """With an id."""
        self.experiments.append(
            {
                "experiment_id": f"experiment-{len(self.experiments) + 1}",
                "created_at": _NOW,
                **call.body,
            }
        )
        return self.experiments[-1]

    def list_runs(self, call: Call) -> Any:
        """By display name, the newest first."""
        return {"runs": list(reversed(_named(self.runs, call)))}

    def create_run(self, call: Call) -> Any:
        """With an id."""
        self.runs.append(
            {
                "run_id": f"run-{len(self.runs) + 1}",
                "state": "PENDING",
                "created_at": _NOW,
                **call.body,
            }
        )
        if self.started is not None:
            self.started(self.runs[-1])
        return self.runs[-1]

    def get_run(self, _: Call, run_id: str) -> Any:
        """As it is watched, or the next answer of the script."""
        (run,) = [run for run in self.runs if run["run_id"] == run_id]
        if run_id in self.watched:
            return run | self.watched[run_id]()
        return run | (self.script.pop(0) if len(self.script) > 1 else self.script[0])


_ROUTES: dict[tuple[str, str], Callable[..., Any]] = {
    ("GET", "/healthz"): FakeKubeflow.health,
    ("GET", "/pipelines"): FakeKubeflow.list_pipelines,
    ("POST", "/pipelines/upload"): FakeKubeflow.upload,
    ("POST", "/pipelines/upload_version"): FakeKubeflow.upload_version,
    ("GET", "/pipelines/([^/]+)/versions"): FakeKubeflow.list_versions,
    ("GET", "/experiments"): FakeKubeflow.list_experiments,
    ("POST", "/experiments"): FakeKubeflow.create_experiment,
    ("GET", "/runs"): FakeKubeflow.list_runs,
    ("POST", "/runs"): FakeKubeflow.create_run,
    ("GET", "/runs/([^/]+)"): FakeKubeflow.get_run,
}


def _named(things: list[dict[str, Any]], call: Call) -> list[dict[str, Any]]:
    predicates = json.loads(call.query.get("filter") or "{}").get("predicates", [])
    wanted = [predicate["stringValue"] for predicate in predicates]
    return [thing for thing in things if all(thing["display_name"] == name for name in wanted)]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeKubeflow
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        address = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        call = Call(
            self.command,
            unquote(address.path),
            query,
            self._decoded(raw),
            token if scheme == "Bearer" else None,
        )
        self.fake.calls.append(call)
        headers = {"Content-Type": "application/json"}
        status, text = next(
            (
                (code, said)
                for part, (code, said, _) in self.fake.broken.items()
                if part in call.path
            ),
            (0, ""),
        )
        if status:
            headers = next(
                extra for part, (_, _, extra) in self.fake.broken.items() if part in call.path
            )
        else:
            status, tree = self.fake.answer(call)
            text = json.dumps(tree)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def _decoded(self, raw: bytes) -> Any:
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
            (part,) = [
                p
                for p in message.walk()
                if p.get_param("name", header="content-disposition") == "uploadfile"
            ]
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            return content.decode()
        return json.loads(raw) if raw else None

"""A fake Kubernetes API server for real Helm: discovery, objects of the chart's kinds, watches.

It sets the API server's defaults, tracks which manager applied which field, and rejects (422)
changes of immutable fields. Jobs and pods end immediately.
"""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests.support.object_merging import apply, merge

NAMESPACE = "team-a"
_KINDS = {  # by group and version
    "v1": [
        "Namespace",
        "ConfigMap",
        "Event",
        "PersistentVolumeClaim",
        "Pod",
        "Secret",
        "ServiceAccount",
        "Service",
    ],
    "apps/v1": ["Deployment", "ReplicaSet"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "batch/v1": ["Job", "CronJob"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
    "trainer.kubeflow.org/v1alpha1": ["TrainingRuntime"],
    "kubeflow.org/v1": ["PyTorchJob"],
    "argoproj.io/v1alpha1": ["Workflow"],
    "monitoring.coreos.com/v1": ["ServiceMonitor", "PrometheusRule"],
    "snapshot.storage.k8s.io/v1": ["VolumeSnapshot"],
    "networking.istio.io/v1beta1": ["VirtualService"],
    "security.istio.io/v1beta1": ["AuthorizationPolicy"],
}
_ALL = itertools.chain.from_iterable(_KINDS.values())
_PLURALS = {kind: f"{kind.lower()}s".replace("sss", "sses").replace("cys", "cies") for kind in _ALL}
_KIND_OF = {plural: kind for kind, plural in _PLURALS.items()}
_FIXED = {
    "Deployment": "selector",
    "Job": "template",
    "Service": "clusterIP",
}  # fields of the spec that never change
_BEGAN = "2026-11-24T12:00:00Z"


class Call(NamedTuple):
    """A call that changes something, or tries to."""

    verb: str
    kind: str
    name: str
    status: int


class Refused(Exception):
    """The API server's response to a bad call."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }


class _Target(NamedTuple):
    version: str  # group and version
    kind: str
    namespace: str
    name: str
    sub: str

    @classmethod
    def of(cls, path: str) -> _Target:
        parts = path.strip("/").split("/")
        version, rest = (
            ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        )
        namespace, rest = (
            (rest[1], rest[2:]) if rest[:1] == ["namespaces"] and len(rest) > 2 else ("", rest)
        )
        plural, name, sub = [*rest, "", "", ""][:3]
        if plural not in _KIND_OF:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return cls(version, _KIND_OF[plural], namespace, name, sub)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.namespace, self.name


class FakeApiServer(ThreadingHTTPServer):
    """The API server; a context manager. `calls` has every call that changes something."""

    def __init__(self, namespace: str = NAMESPACE) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.namespace = namespace
        self.calls: list[Call] = []
        self.failing: set[str] = set()  # names of jobs and pods that fail
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}  # by kind, namespace and name
        self._applied: dict[
            tuple[str, str], Any
        ] = {}  # what a manager applied last, by uid and manager
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._version = 0
        self.changed = threading.Condition(threading.RLock())
        self._closed = False

    def __enter__(self) -> FakeApiServer:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self.shutdown()
        self.server_close()

    @property
    def kubeconfig(self) -> str:
        """Return a kubeconfig file's content."""
        cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {
            "name": "fake",
            "context": {"cluster": "fake", "user": "", "namespace": self.namespace},
        }
        return json.dumps(
            {
                "kind": "Config",
                "clusters": [cluster],
                "contexts": [context],
                "current-context": "fake",
            }
        )

    # --- for tests

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return every object of a kind, by name."""
        with self.changed:
            return {
                name: copy.deepcopy(one)
                for (its, _, name), one in self.objects.items()
                if its == kind
            }

    def names(self) -> set[str]:
        """Return `Kind/name` of every object in the namespace."""
        with self.changed:
            return {f"{kind}/{name}" for kind, namespace, name in self.objects if namespace}

    def put(self, body: Mapping[str, Any]) -> None:
        """Store an object that another client created or changed."""
        namespace = "" if body["kind"] == "Namespace" else self.namespace
        with self.changed:
            self._store(
                _Target(body["apiVersion"], body["kind"], namespace, body["metadata"]["name"], ""),
                body,
            )

    # --- the API

    def answer(
        self, method: str, url: str, content_type: str, data: bytes, account: str = ""
    ) -> tuple[int, Any]:
        """Return status and content of a response; `account` is the calling service account, "" an
        admin.
        """
        path, _, query = url.partition("?")
        if (found := _discovery(path)) is not None:
            return 200, found
        target, given = _Target.of(path), dict(urllib.parse.parse_qsl(query))
        with self.changed:
            if method == "GET":
                return 200, self._read(target, given)
            patch = "apply" if "apply-patch" in content_type else "patch"
            verb = {"POST": "create", "PUT": "update", "PATCH": patch, "DELETE": "delete"}[method]
            body = (
                {}
                if verb == "delete"
                else _secret(data)
                if "protobuf" in content_type
                else json.loads(data)
            )
            target = target._replace(name=target.name or body["metadata"]["name"])
            try:
                code, made = self._change(
                    verb, target, body, content_type, given.get("fieldManager", "")
                )
            except Refused as refusal:
                code, made = refusal.code, refusal.status
            self.calls.append(Call(verb, target.kind, target.name, code))
            return code, made

    def watch(self, url: str) -> Iterator[dict[str, Any]]:
        """Yield the existing objects, then their changes."""
        path, _, query = url.partition("?")
        target, given = _Target.of(path), dict(urllib.parse.parse_qsl(query))
        assert given["sendInitialEvents"] == "true", (
            "Helm would first list, then watch: that is not built here"
        )
        with self.changed:
            there, seen = self._read(target, given)["items"], self._version
        yield from ({"type": "ADDED", "object": one} for one in there)
        metadata = {
            "resourceVersion": str(seen),
            "annotations": {"k8s.io/initial-events-end": "true"},
        }
        yield {
            "type": "BOOKMARK",
            "object": {"kind": target.kind, "apiVersion": target.version, "metadata": metadata},
        }
        while not self._closed:
            with self.changed:
                new = [event for number, event in self._events if number > seen]
                seen = self._version
                if not new:
                    self.changed.wait(1)
            yield from (event for event in new if _selected(event["object"], target, given))

    def _read(self, target: _Target, query: Mapping[str, str]) -> Any:
        if target.name:
            return (
                f"{target.name} has spoken\n"
                if target.sub == "log"
                else copy.deepcopy(self._find(target))
            )
        items = [
            copy.deepcopy(one) for one in self.objects.values() if _selected(one, target, query)
        ]
        metadata = {"resourceVersion": str(self._version)}
        return {
            "kind": f"{target.kind}List",
            "apiVersion": target.version,
            "metadata": metadata,
            "items": items,
        }

    def _find(self, target: _Target) -> dict[str, Any]:
        if target.key not in self.objects:
            raise Refused(404, "NotFound", f'{_PLURALS[target.kind]} "{target.name}" not found')
        return self.objects[target.key]

    def _change(
        self, verb: str, target: _Target, body: dict[str, Any], content_type: str, manager: str
    ) -> tuple[int, Any]:
        if verb == "apply":
            live = self.objects.get(target.key, {})
            before = self._applied.get((live.get("metadata", {}).get("uid", ""), manager), {})
            made = self._store(target, apply(live, before, body))
            self._applied[made["metadata"]["uid"], manager] = body
            return 200 if live else 201, made
        if verb == "create":
            if target.key in self.objects:
                raise Refused(
                    409, "AlreadyExists", f'{_PLURALS[target.kind]} "{target.name}" already exists'
                )
            return 201, self._store(target, body)
        live = self._find(target)
        if verb == "delete":
            del self.objects[target.key]
            self._happened("DELETED", live)
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        return 200, self._store(
            target,
            body if verb == "update" else merge(live, body, by_item="strategic" in content_type),
        )

    def _store(self, target: _Target, body: Mapping[str, Any]) -> dict[str, Any]:
        """Store an object as the API server and its controllers do.

        Raises: Refused, if it is invalid.
        """
        old = self.objects.get(target.key)
        made = copy.deepcopy(dict(body)) | {"apiVersion": target.version, "kind": target.kind}
        _fill_in(made)
        _check(target, old, made)
        own: dict[str, Any] = (
            old["metadata"] if old else {"uid": f"uid-{self._version + 1}", "generation": 0}
        )
        generation = own["generation"] + (old is None or old.get("spec") != made.get("spec"))
        made["metadata"] |= {
            "uid": own["uid"],
            "creationTimestamp": _BEGAN,
            "generation": generation,
            "namespace": target.namespace,
        }
        made |= self._controlled(made)
        self.objects[target.key] = made
        self._happened("MODIFIED" if old else "ADDED", made)
        return copy.deepcopy(made)

    def _controlled(self, one: Mapping[str, Any]) -> dict[str, Any]:
        """Return the status that the controllers set on a stored object."""
        return _status(one, one["metadata"]["name"] in self.failing)

    def _happened(self, what: str, one: dict[str, Any]) -> None:
        self._version += 1
        one["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, {"type": what, "object": copy.deepcopy(one)}))
        self.changed.notify_all()


def _discovery(path: str) -> Any:
    """Return the discovery document of a path; None if the path is an object's."""
    places = {f"/{'apis' if '/' in version else 'api'}/{version}": version for version in _KINDS}
    versions = [
        {"groupVersion": name, "version": name.split("/")[1]} for name in _KINDS if "/" in name
    ]
    groups = [
        {"name": one["groupVersion"].split("/")[0], "versions": [one], "preferredVersion": one}
        for one in versions
    ]
    version = places.get(path.removeprefix("/openapi/v3"), "")
    if path in places:
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {
                "name": _PLURALS[kind],
                "kind": kind,
                "namespaced": kind != "Namespace",
                "verbs": verbs,
            }
            for kind in _KINDS[version]
        ]
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": version,
            "resources": resources,
        }
    if version:
        # No schemas: Helm only asks whether the server validates fields.
        group, _, number = version.rpartition("/")
        checked = {"parameters": [{"name": "fieldValidation", "in": "query"}]}
        which = [{"group": group, "version": number, "kind": kind} for kind in _KINDS[version]]
        paths = {
            f"/{one['kind']}": {"patch": checked | {"x-kubernetes-group-version-kind": one}}
            for one in which
        }
        return {"openapi": "3.0.0", "info": {"title": "fake", "version": "1"}, "paths": paths}
    return {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        "/openapi/v3": {
            "paths": {place[1:]: {"serverRelativeURL": f"/openapi/v3{place}"} for place in places}
        },
    }.get(path)


def _selected(one: Mapping[str, Any], target: _Target, query: Mapping[str, str]) -> bool:
    """Return whether a list or watch selects an object."""
    own = one["metadata"]
    labels = dict(pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair)
    in_place = one["kind"] == target.kind and target.namespace in ("", own.get("namespace"))
    return in_place and labels.items() <= (own.get("labels") or {}).items()


def _secret(data: bytes) -> dict[str, Any]:
    """Decode Helm's record of a release, which its client writes in Kubernetes' protobuf."""
    assert data.startswith(b"k8s\0"), data[:20]
    secret = list(_fields(dict(_fields(data[4:]))[2]))
    metadata = list(_fields(dict(secret)[1]))
    labels, content = (
        [dict(_fields(value)) for number, value in pairs if number == its]
        for pairs, its in ((metadata, 11), (secret, 2))
    )
    return {
        "metadata": {
            "name": dict(metadata)[1].decode(),
            "labels": {label[1].decode(): label[2].decode() for label in labels},
        },
        "type": dict(secret)[3].decode(),
        "data": {entry[1].decode(): base64.b64encode(entry[2]).decode() for entry in content},
    }


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message."""
    rest = iter(data)

    def number() -> int:
        byte = next(rest, 0)
        return byte if byte < 128 else byte - 128 + (number() << 7)

    while tag := number():
        value = number()
        yield tag >> 3, bytes(itertools.islice(rest, value)) if tag & 7 == 2 else value


def _fill_in(one: dict[str, Any]) -> None:
    """Set the API server's defaults, as far as later changes depend on them."""
    spec = one.get("spec", {})
    if one["kind"] == "Deployment":
        spec.setdefault("replicas", 1)
        strategy = spec["strategy"] = spec.get("strategy") or {}
        if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
            strategy["rollingUpdate"] = {"maxSurge": "25%", "maxUnavailable": "25%"} | (
                strategy.get("rollingUpdate") or {}
            )
    elif one["kind"] == "PersistentVolumeClaim":
        one["spec"] = {
            "storageClassName": "standard",
            "volumeMode": "Filesystem",
            "volumeName": "volume",
        } | spec
    elif one["kind"] == "Service":
        spec.setdefault("clusterIP", "10.96.0.7")


def _check(target: _Target, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> None:
    """Reject an invalid change with the message of a real API server. Raises: Refused."""
    spec, wrong = new.get("spec", {}), ""
    before = old["spec"] if old and "spec" in old else spec
    fixed = _FIXED.get(target.kind, "")
    if (
        target.kind == "Deployment"
        and spec["strategy"]["type"] == "Recreate"
        and spec["strategy"].get("rollingUpdate") is not None
    ):
        wrong = (
            "spec.strategy.rollingUpdate: Forbidden: "
            "may not be specified when strategy `type` is 'Recreate'"
        )
    if target.kind == "PersistentVolumeClaim" and {**before, "resources": ...} != {
        **spec,
        "resources": ...,
    }:
        wrong = (
            "spec: Forbidden: spec is immutable after creation except resources.requests "
            "and volumeAttributesClassName for bound claims"
        )
    if before.get(fixed) != spec.get(fixed):
        wrong = f"spec.{fixed}: Invalid value: field is immutable"
    if wrong:
        group = f".{target.version.partition('/')[0]}" if "/" in target.version else ""
        raise Refused(422, "Invalid", f'{target.kind}{group} "{target.name}" is invalid: {wrong}')


def _status(one: Mapping[str, Any], fails: bool) -> dict[str, Any]:
    """Update the status as the controllers do, immediately."""
    if one["kind"] == "Job":
        end = (
            {"type": "Failed", "message": "Job has reached the specified backoff limit"}
            if fails
            else {"type": "Complete"}
        )
        return {
            "status": {
                "startTime": _BEGAN,
                "conditions": [end | {"status": "True"}],
                "failed": int(fails),
                "succeeded": int(not fails),
            }
        }
    if one["kind"] == "Deployment":
        ready = dict.fromkeys(
            ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"),
            one["spec"]["replicas"],
        )
        ready |= {
            "observedGeneration": one["metadata"]["generation"],
            "conditions": [{"type": "Available", "status": "True"}],
        }
        return {"status": ready}
    if one["kind"] == "VolumeSnapshot":
        if one["spec"].get("volumeSnapshotClassName") == "missing":
            return {"status": {"error": {"message": "failed to get snapshot class missing"}}}
        return {"status": {"creationTime": _BEGAN, "readyToUse": False}}
    phase = {"Pod": "Failed" if fails else "Succeeded", "PersistentVolumeClaim": "Bound"}.get(
        one["kind"]
    )
    return {"status": {"phase": phase}} if phase else {}


class _Handler(BaseHTTPRequestHandler):
    server: FakeApiServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # a response in one packet: two would delay each other by 40 ms

    def _serve(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "GET" and "watch=true" in self.path:
            self._stream()
            return
        try:
            account = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = self.server.answer(
                self.command, self.path, self.headers.get("Content-Type") or "", data, account
            )
        except Refused as refusal:
            status, content = refusal.code, refusal.status
        answer = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self._begin(
            status, {"Content-Type": "application/json", "Content-Length": str(len(answer))}
        )
        self.wfile.write(answer)

    def _stream(self) -> None:
        self._begin(200, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
        self.close_connection = True
        try:
            for event in self.server.watch(self.path):
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
        except OSError:  # the client has disconnected
            self.wfile = io.BytesIO()

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        pass

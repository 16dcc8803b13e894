"""A fake Kubernetes API server on loopback, and fake operators: as much as the launcher needs.

It keeps objects in memory, sets uid and resourceVersion, returns 409, 404, 403 (by a Role's rules)
and 422 (by the CRDs' schemas, if they are in this checkout), prunes fields that the CRDs lack,
deletes objects with their owner, and can be down. Time is the clock's: nothing waits.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests.support import cluster_rules

_KINDS = {"pytorchjobs": "PyTorchJob", "trainjobs": "TrainJob", "pods": "Pod", "events": "Event"}
_CRDS = {"pytorchjobs": cluster_rules.PYTORCHJOB_CRD, "trainjobs": cluster_rules.TRAINJOB_CRD}
_BUILT_IN = ("pods", "events", "secrets", "persistentvolumeclaims", "jobs")
_POD_OF_PATCH = (
    "spec.runtimePatches[0].trainingRuntimeSpec.template.spec.replicatedJobs[0].template.spec."
    "template.spec"
)
# What older Trainers do not store of the launcher's job; tools.apiserver compares it with their CRDs.
NOT_STORED = {
    "2.1.0": ("spec.activeDeadlineSeconds", "spec.runtimePatches"),
    "2.2.1": (f"{_POD_OF_PATCH}.terminationGracePeriodSeconds",),
}
ACCOUNT = "system:serviceaccount:team-a:pipeline-runner"


class Clock:
    """A clock that a test advances; actions run when it passes their time."""

    def __init__(self) -> None:
        self.now = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC).timestamp()
        self.start = self.now
        self.plan: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        until = self.now + seconds
        while self.plan and min(self.plan)[0] <= until:
            due = min(self.plan)
            self.plan.remove(due)
            self.now = max(self.now, due[0])
            due[2]()
        self.now = until
        assert self.now < self.start + 400 * 86400, "waits forever"

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        """Run an action so many seconds after the start."""
        self.plan.append((self.start + seconds, next(self._numbers), action))

    def stamp(self) -> str:
        """Return the time as Kubernetes writes it."""
        return f"{datetime.datetime.fromtimestamp(self.now, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


class _Path(NamedTuple):
    group: str
    namespace: str
    plural: str
    name: str
    sub: str

    @classmethod
    def of(cls, path: str) -> _Path:
        parts = path.strip("/").split("/")
        group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
        namespace, plural, name, sub = [*rest[1:], "", ""][:4]
        return cls(group, namespace, plural, name, sub)


class FakeKubernetes:
    """The API server. `calls` lists every `VERB plural[/name]` with a response."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}  # by plural and name
        self.logs: dict[str, list[tuple[str, str]]] = {}  # by pod: time and line
        self.previous_logs: dict[str, list[tuple[str, str]]] = {}
        self.installed = {"pytorchjobs", "trainjobs", "trainingruntimes", "workflows"}
        self.installed |= {"jobsets", "workloads"}
        # paths of a job's fields that the installed CRD lacks, as those of an older operator do
        self.unknown: dict[str, tuple[str, ...]] = {}
        self.version = "v1.36.2"
        self.rules: list[Mapping[str, Any]] | None = None  # of the Role; None allows everything
        self.outage: int | str | None = (
            None  # a status for every call, or "drop": connections are closed without a response
        )
        self.refuses_jobs: tuple[int, str] | None = None  # status and message for each creation
        self.lose_response = 0  # so many responses are lost after the change
        self.linger = 0.0  # seconds that a deleted job's pods take to end
        self.calls: list[str] = []
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # a response in one packet: two would delay each other by 40 ms

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with fake._lock:
                    answer = fake._answer(self.command, self.path, body)
                if answer is None:
                    self.close_connection = True
                    return
                status, content = answer
                data = (
                    content.encode() if isinstance(content, str) else json.dumps(content).encode()
                )
                self.send_response(status)
                self.send_header(
                    "Content-Type", "text/plain" if isinstance(content, str) else "application/json"
                )
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_PATCH = _serve

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        """Go down permanently, also for open connections."""
        self.outage = "drop"
        self._server.shutdown()
        self._server.server_close()

    # --- what tests do

    def put(self, plural: str, name: str, **content: Any) -> dict[str, Any]:
        """Store an object that another client created."""
        metadata = {"name": name, "namespace": "team-a", **content.pop("metadata", {})}
        return self._store(
            plural, {"kind": _KINDS.get(plural, plural), "metadata": metadata, **content}
        )

    def all(self, plural: str) -> list[dict[str, Any]]:
        """Return every object of a kind."""
        return [found for (kind, _), found in self.objects.items() if kind == plural]

    def remove(self, plural: str, name: str) -> None:
        """Delete an object and what it owns."""
        gone = self.objects.pop((plural, name), None)
        if gone is None:
            return
        for kind, child in list(self.objects):
            owners = (
                self.objects.get((kind, child), {}).get("metadata", {}).get("ownerReferences") or ()
            )
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.remove(kind, child)

    def warn(
        self, name: str, reason: str, message: str, kind: str = "Pod", uid: str | None = None
    ) -> None:
        """Add an event on a pod, or on another object."""
        about = {"kind": kind, "name": name, **({"uid": uid} if uid else {})}
        self.put(
            "events",
            f"event-{next(self._numbers)}",
            type="Warning",
            reason=reason,
            message=message,
            involvedObject=about,
            lastTimestamp=self.clock.stamp(),
        )

    def log(self, pod: str, line: str, *, fraction: str = "123456789") -> None:
        """Add a line to a pod's log."""
        self.logs.setdefault(pod, []).append((f"{self.clock.stamp()[:-1]}.{fraction}Z", line))

    # --- the API

    def _store(self, plural: str, content: Mapping[str, Any]) -> dict[str, Any]:
        made = copy.deepcopy(dict(content))
        number = next(self._numbers)
        made["metadata"] |= {
            "uid": f"uid-{number}",
            "resourceVersion": str(number),
            "creationTimestamp": self.clock.stamp(),
        }
        self.objects[plural, made["metadata"]["name"]] = made
        return made

    def _answer(self, method: str, url: str, body: Any) -> tuple[int, Any] | None:
        return None if self.outage == "drop" else self._respond(method, url, body)

    def _respond(self, method: str, url: str, body: Any) -> tuple[int, Any] | None:
        if self.outage is not None:
            assert isinstance(self.outage, int)
            return self.outage, _status(self.outage, "etcdserver: request timed out")
        parts = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if parts.path == "/version":
            return 200, {"gitVersion": self.version}
        path = _Path.of(parts.path)
        verb = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}.get(method) or (
            "get" if path.name else "list"
        )
        resource = f"{path.plural}/{path.sub}" if path.sub else path.plural
        self.calls.append(f"{verb} {path.plural}{'/' + path.name if path.name else ''}")
        if path.plural not in {*self.installed, *_BUILT_IN}:
            return 404, "404 page not found\n"
        if not self._allowed(verb, path.group, resource):
            message = (
                f'{path.plural} is forbidden: User "{ACCOUNT}" cannot {verb} '
                f'resource "{resource}" in API group "{path.group}"'
            )
            return 403, _status(403, f'{message} in the namespace "{path.namespace}"')
        answer = getattr(self, f"on_{verb}")(path, query, body)
        if self.lose_response > 0:
            self.lose_response -= 1
            return None
        return answer

    def _allowed(self, verb: str, group: str, resource: str) -> bool:
        return self.rules is None or any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in self.rules
        )

    def on_create(self, path: _Path, _: Mapping[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if (path.plural, body["metadata"]["name"]) in self.objects:
            return 409, _status(
                409, f'{path.plural}.{path.group} "{body["metadata"]["name"]}" already exists'
            )
        crd = _CRDS.get(path.plural)
        if crd is not None and self.refuses_jobs is not None:
            return self.refuses_jobs[0], _status(*self.refuses_jobs)
        if crd is not None and crd.exists():
            body = cluster_rules.pruned(body, crd)
            if problems := cluster_rules.crd_problems(body, crd):
                return 422, _status(422, "; ".join(problems))
        made = self._store(path.plural, body)
        for field in self.unknown.get(path.plural, ()):
            _drop(made, field)
        return 201, made

    def on_get(self, path: _Path, query: Mapping[str, str], _: Any) -> tuple[int, Any]:
        found = self.objects.get((path.plural, path.name))
        if found is None:
            return 404, _status(404, f'{path.plural}.{path.group} "{path.name}" not found')
        return self._pod_log(found, query) if path.sub == "log" else (200, found)

    def _pod_log(self, pod: Mapping[str, Any], query: Mapping[str, str]) -> tuple[int, Any]:
        name = pod["metadata"]["name"]
        spec = pod.get("spec", {})
        every = [*spec.get("initContainers", ()), *spec.get("containers", ())]
        containers = [one["name"] for one in every]
        if len(containers) > 1 and query.get("container") not in containers:
            return 400, _status(
                400,
                f"a container name must be specified for pod {name}, choose one of: "
                f"[{' '.join(containers)}]",
            )
        if pod["status"]["phase"] == "Pending" and query.get("container") == every[-1]["name"]:
            return 400, _status(
                400, f'container "pytorch" in pod "{name}" is waiting to start: ContainerCreating'
            )
        logs = self.previous_logs if query.get("previous") == "true" else self.logs
        lines = logs.get(f"{name}/{query.get('container')}", logs.get(name, []))
        lines = [
            (when, words) for when, words in lines if when[:19] >= query.get("sinceTime", "")[:19]
        ]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :]
        return 200, "".join(f"{when} {words}\n" for when, words in lines)

    def on_list(self, path: _Path, query: Mapping[str, str], _: Any) -> tuple[int, Any]:
        labels = _pairs(query.get("labelSelector", ""))
        fields = _pairs(query.get("fieldSelector", ""))
        found = [
            one
            for one in self.all(path.plural)
            if labels.items() <= (one["metadata"].get("labels") or {}).items()
            and all(_field(one, key) == value for key, value in fields.items())
        ]
        return 200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": found}

    def on_patch(
        self, path: _Path, _: Mapping[str, str], body: Mapping[str, Any]
    ) -> tuple[int, Any]:
        found = self.objects.get((path.plural, path.name))
        if found is None:
            return 404, _status(404, f'{path.plural} "{path.name}" not found')
        _merge(found, body)
        return 200, found

    def on_delete(self, path: _Path, _: Mapping[str, str], __: Any) -> tuple[int, Any]:
        found = self.objects.get((path.plural, path.name))
        if found is None:
            return 404, _status(404, f'{path.plural} "{path.name}" not found')
        found["metadata"]["deletionTimestamp"] = self.clock.stamp()
        if self.linger:
            self.clock.at(
                self.clock.now - self.clock.start + self.linger,
                lambda: self.remove(path.plural, path.name),
            )
        else:
            self.remove(path.plural, path.name)
        return 200, {"kind": "Status", "status": "Success"}


def _drop(tree: Any, path: str) -> None:
    """Remove the field at a path such as spec.a[0].b."""
    *branches, last = re.findall(r"[^.\[\]]+", path)
    for branch in branches:
        tree = tree[int(branch)] if isinstance(tree, list) else tree[branch]
    del tree[last]


def _status(code: int, message: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "message": message,
    }


def _pairs(selector: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in selector.split(",") if pair)


def _field(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key, {})
    return tree


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


class Operator:
    """Moves the only job of a kind through its states, with real operators' pods and status."""

    def __init__(self, api: FakeKubernetes, plural: str, role: str | None = None) -> None:
        self._api, self.plural, self._role = api, plural, role
        self.init_containers: list[str] = []  # that webhooks or the operator add to each pod
        self.sidecars: list[str] = []

    @property
    def job(self) -> dict[str, Any]:
        """The only job (in the operator's role, if it has one)."""
        (job,) = [
            job
            for job in self._api.all(self.plural)
            if self._role in (None, job["metadata"]["labels"]["app.kubernetes.io/component"])
        ]
        return job

    @property
    def first_pod(self) -> str:
        """The pod of rank 0."""
        return self._pod_names()[0]

    def created(self) -> None:
        self._conditions(Created=True)

    def suspended(self) -> None:
        """Suspend the job, as Kueue does before it admits a job and when it preempts it."""
        for pod in self._pod_names():
            self._api.remove("pods", pod)
        self._conditions(Suspended=True, Running=False)
        self._counts()

    def pending(self, **status: Any) -> None:
        """Create the job's pods, which are not running yet."""
        self._conditions(Suspended=False)
        if self._is_pytorchjob:
            self.created()
        self._counts(active=1)
        for name in self._pod_names():
            self._pod(name, phase="Pending", **status)

    def refused(self, message: str) -> None:
        """Let the API server refuse the pods: the operator reports it where real ones do."""
        name, uid = self.job["metadata"]["name"], self.job["metadata"]["uid"]
        if self._is_pytorchjob:
            self.created()
            text = f'Error creating: pods "{name}-worker-0" {message}'
            self._api.warn(name, "FailedCreatePod", text, "PyTorchJob", uid)
            return
        self._counts(active=1)
        jobs = self._api.all("jobs")
        job = jobs[0] if jobs else self._jobset()
        attempt = sum(event["reason"] == "FailedCreate" for event in self._api.all("events"))
        text = f'Error creating: pods "{name}-node-0-0-{attempt:05}" {message}'  # another each time
        self._api.warn(job["metadata"]["name"], "FailedCreate", text, "Job", job["metadata"]["uid"])

    def _jobset(self) -> dict[str, Any]:
        """Create what Trainer and JobSet put between a TrainJob and its pods; return the Job."""
        name, owner = self.job["metadata"]["name"], self.job["metadata"]["uid"]
        jobset = self._api.put("jobsets", name, metadata={"ownerReferences": [{"uid": owner}]})
        owned = {"ownerReferences": [{"uid": jobset["metadata"]["uid"]}]}
        return self._api.put("jobs", f"{name}-node-0", metadata=owned)

    def in_queue(
        self, message: str, reason: str = "Pending", active: bool = True, **status: Any
    ) -> None:
        """Suspend the job with a Workload that Kueue does not admit."""
        self.suspended()
        metadata = self.job["metadata"]
        condition = {
            "type": "QuotaReserved",
            "status": "False",
            "reason": reason,
            "message": message,
        }
        self._api.put(
            "workloads",
            f"{self.job['kind'].lower()}-{metadata['name']}-1a2b3",
            metadata={"ownerReferences": [{"uid": metadata["uid"]}]},
            spec={
                "queueName": metadata["labels"].get("kueue.x-k8s.io/queue-name"),
                "active": active,
            },
            status={"conditions": [condition], **status},
        )

    def running(self, restarts: int = 0) -> None:
        if self._is_pytorchjob:
            self._conditions(Running=True, Restarting=False)
        self._counts(active=1, ready=1)
        for name in self._pod_names():
            self._pod(
                name,
                phase="Running",
                containerStatuses=[
                    *self._of_sidecars(),
                    {"name": self._container, "restartCount": restarts, "state": {"running": {}}},
                ],
            )

    def restarting(self) -> None:
        if self._is_pytorchjob:
            self._conditions(Restarting=True, Running=False)
        self._counts(failed=1)

    def restart_in_place(self, code: int, reason: str) -> None:
        """Restart rank 0's container in its pod, with a new log."""
        name = self.first_pod
        self._api.previous_logs[name] = self._api.logs.pop(name, [])
        end = {"exitCode": code, "reason": reason, "finishedAt": self._api.clock.stamp()}
        status = {
            "name": self._container,
            "restartCount": 1,
            "state": {"running": {}},
            "lastState": {"terminated": end},
        }
        self._pod(name, phase="Running", containerStatuses=[status])

    def succeeded(self) -> None:
        self._conditions(Running=False)
        self._conditions(Succeeded=True) if self._is_pytorchjob else self._conditions(Complete=True)
        self._end_pods("Succeeded", 0, "Completed")

    def failed(
        self,
        code: int = 1,
        why: str = "Error",
        reason: str = "BackoffLimitExceeded",
        message: str = "too many restarts",
    ) -> None:
        self._conditions(Failed=True, Running=False, reason=reason, message=message)
        self._end_pods("Failed", code, why)

    def evicted(self) -> None:
        """Evict the pods, as under node pressure or for a pod of higher priority."""
        self.failed(137, "Error")
        for pod in self._api.all("pods"):
            pod["status"] |= {
                "reason": "Evicted",
                "message": "The node was low on resource: ephemeral-storage.",
            }

    def _of_sidecars(self) -> list[dict[str, Any]]:
        """Return the statuses of sidecars, which were restarted, with other images."""
        status = {"restartCount": 3, "state": {"running": {}}, "imageID": "sidecar@sha256:1"}
        return [{"name": name, **status} for name in self.sidecars]

    @property
    def _is_pytorchjob(self) -> bool:
        return self.plural == "pytorchjobs"

    @property
    def _container(self) -> str:
        return "pytorch" if self._is_pytorchjob else "node"

    def _end_pods(self, phase: str, code: int, why: str) -> None:
        end = {"exitCode": code, "reason": why, "finishedAt": self._api.clock.stamp()}
        for name in self._pod_names():
            self._pod(
                name,
                phase=phase,
                containerStatuses=[
                    *self._of_sidecars(),
                    {"name": self._container, "restartCount": 0, "state": {"terminated": end}},
                ],
            )

    def _conditions(self, *, reason: str = "", message: str = "", **types: bool) -> None:
        conditions = self.job.setdefault("status", {}).setdefault("conditions", [])
        for name, holds in types.items():
            conditions[:] = [condition for condition in conditions if condition["type"] != name]
            conditions.append(
                {
                    "type": name,
                    "status": str(holds),
                    "reason": reason or f"Job{name}",
                    "message": message,
                }
            )

    def _counts(self, **counts: int) -> None:
        if not self._is_pytorchjob:
            self.job.setdefault("status", {})["jobsStatus"] = [
                {
                    "name": "node",
                    **dict.fromkeys(("active", "failed", "ready", "succeeded", "suspended"), 0),
                    **counts,
                }
            ]

    def _pod_names(self) -> list[str]:
        name, spec = self.job["metadata"]["name"], self.job["spec"]
        if self._is_pytorchjob:
            return [
                f"{name}-worker-{number}"
                for number in range(spec["pytorchReplicaSpecs"]["Worker"]["replicas"])
            ]
        return [f"{name}-node-0-{number}" for number in range(spec["trainer"]["numNodes"])]

    def _pod(self, name: str, **status: Any) -> None:
        metadata, spec = self.job["metadata"], self.job["spec"]
        if self._is_pytorchjob:
            template = spec["pytorchReplicaSpecs"]["Worker"]["template"]
            resources = template["spec"]["containers"][0]["resources"]
            role = {
                "training.kubeflow.org/replica-type": "worker",
                "training.kubeflow.org/replica-index": name.rsplit("-", 1)[1],
            }
        else:
            (replicated,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"][
                "replicatedJobs"
            ]
            template = replicated["template"]["spec"]["template"]
            resources = spec["trainer"]["resourcesPerNode"]
            role = {"batch.kubernetes.io/job-completion-index": name.rsplit("-", 1)[1]}
        pod = self._api.objects.get(("pods", name))
        if pod is None:
            owner = {"kind": self.job["kind"], "name": metadata["name"], "uid": metadata["uid"]}
            labels = {**template["metadata"]["labels"], **role}
            pod = self._api.put(
                "pods",
                name,
                metadata={"labels": labels, "ownerReferences": [owner]},
                spec={
                    "initContainers": [{"name": one} for one in self.init_containers],
                    "containers": [
                        *({"name": one} for one in self.sidecars),
                        {"name": self._container, "resources": resources},
                    ],
                },
                status={},
            )
        pod["status"] = status

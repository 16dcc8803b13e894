"""Check what chart, launcher and upload send against a real Kubernetes API server.

`make test-apiserver` runs this. KUBEBUILDER_ASSETS names the folder with the programs etcd and
kube-apiserver, as for controller-runtime's envtest. Admission is the server's own: ResourceQuota,
LimitRanger, PodSecurity, ServiceAccount and the others that it enables by default. Operators and
controllers do not run: the pods and statuses that they would send are sent by this program.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError, format_error
from components.jobs import job_diagnostics
from components.jobs.client import KubernetesClient
from components.jobs.launcher import launch
from components.jobs.manifests import JobContext
from components.jobs.states import KINDS, PYTORCHJOB, TRAINJOB
from pipelines.submit import compile_pipeline
from tests.support.api_server import ApiServer, find_assets
from tests.support.cluster_rules import CRDS, pod_specs
from tests.support.object_merging import merge
from tests.support.rendered_chart import FILES, cluster, named, of_kind, render
from tools.image_builds import Refused
from tools.images import Report

PLUGINS = ("LimitRanger", "PodSecurity", "Priority", "ResourceQuota", "ServiceAccount")
ACCOUNT = "pipeline-runner"
WANTED = {  # the name of a CRD, and what is checked with it
    "pytorchjobs.kubeflow.org": "PyTorchJobs",
    "trainjobs.trainer.kubeflow.org": "TrainJobs",
    "trainingruntimes.trainer.kubeflow.org": "the chart's TrainingRuntime",
    "jobsets.jobset.x-k8s.io": "events on what lies between a TrainJob and its pods",
    "workloads.kueue.x-k8s.io": "places in Kueue's queue",
}
# A quota on all four of CPU and memory, and a LimitRange, in which every pod must fit.
QUOTA = {
    f"{kind}.{name}": "100000" if name == "cpu" else "1000Ti"
    for kind in ("requests", "limits")
    for name in ("cpu", "memory")
}
LIMIT_RANGE = {
    "type": "Container",
    "min": {"cpu": "10m", "memory": "32Mi"},
    "max": {"cpu": "128", "memory": "2Ti"},
    "maxLimitRequestRatio": {"cpu": "10", "memory": "10"},
}
STAMP = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class Crd:
    """A CRD of a file: GROUP_PLURAL.vVERSION.yaml."""

    version: tuple[int, ...]
    document: dict[str, Any]

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))


def read_crds(folder: Path) -> dict[str, list[Crd]]:
    """Return the CRDs of a folder by name, the oldest version first."""
    found: dict[str, list[Crd]] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.glob("*.yaml")):
        version = re.search(r"\.v(\d+)\.(\d+)\.(\d+)\.yaml$", path.name)
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        if version and document["kind"] == "CustomResourceDefinition":
            crd = Crd(tuple(map(int, version.groups())), document)
            found.setdefault(document["metadata"]["name"], []).append(crd)
    return {name: sorted(crds, key=lambda crd: crd.version) for name, crds in found.items()}


# --- namespaces


def make_namespace(server: ApiServer, name: str, level: str = "restricted") -> None:
    """Create a namespace with a level of PodSecurity, and the accounts that controllers make."""
    labels = {"pod-security.kubernetes.io/enforce": level}
    server.must_create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    )
    for account in ("default", ACCOUNT, "default-editor"):
        server.must_create(_object("v1", "ServiceAccount", account), name)


def add_quota(server: ApiServer, namespace: str, hard: Mapping[str, str]) -> None:
    """Create a ResourceQuota with the status that its controller would set."""
    quota = {**_object("v1", "ResourceQuota", "team-quota"), "spec": {"hard": hard}}
    server.must_create(quota, namespace)
    server.set_status(quota, namespace, hard=hard, used=dict.fromkeys(hard, "0"))
    # the server keeps quotas of a namespace for some seconds
    deadline = time.monotonic() + 30
    probe = {**_object("v1", "Pod", "probe"), "spec": _probe_spec()}
    while time.monotonic() < deadline:
        _, answer = server.create(probe, namespace, dry_run=True)
        if "status unknown for quota" not in str(answer.get("message")):
            return
        time.sleep(0.5)
    raise AssertionError(f"namespace {namespace}: the server does not see the quota's status")


def add_limit_range(server: ApiServer, namespace: str, limit: Mapping[str, Any]) -> None:
    """Create a LimitRange, and wait until the server applies it."""
    document = {**_object("v1", "LimitRange", "team-limits"), "spec": {"limits": [limit]}}
    server.must_create(document, namespace)
    time.sleep(1)  # the plug-in's informer


def _delete_namespace(server: ApiServer, namespace: str) -> None:
    server.call("DELETE", f"/api/v1/namespaces/{namespace}")
    time.sleep(1)  # the plug-in's informer


# --- what operators and controllers would do


class Clock:
    """Each sleep of the launcher lets the cluster do its next step; nothing waits."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step, self._now, self._number = step, time.time(), 0

    def time(self) -> float:
        return self._now

    def sleep(self, seconds: float, /) -> None:
        self._now += seconds
        self._step(self._number)
        self._number += 1
        assert self._number < 20_000, "the launcher waits for ever"


class Operators:
    """Sends the pods, objects and statuses of a job's operator and of the controllers below it."""

    def __init__(self, server: ApiServer, namespace: str, backend: str) -> None:
        self.server, self.namespace, self.kind = server, namespace, KINDS[backend]
        self.injected: list[dict[str, Any]] = []  # containers that a webhook adds to each pod
        self._made = False

    @property
    def job(self) -> dict[str, Any]:
        path = self.server.path(
            {"apiVersion": self.kind.api_version, "kind": self.kind.kind}, self.namespace
        )
        _, found = self.server.call("GET", str(path))
        (job,) = found["items"]
        return {**job, "apiVersion": self.kind.api_version, "kind": self.kind.kind}

    def jobs(self) -> list[dict[str, Any]]:
        path = self.server.path(
            {"apiVersion": self.kind.api_version, "kind": self.kind.kind}, self.namespace
        )
        return list(self.server.call("GET", str(path))[1]["items"])

    def kept_jobs(self) -> list[dict[str, Any]]:
        """Return the jobs that were not deleted: no garbage collector runs here, so that a deleted
        one stays with its time of deletion.
        """
        return [job for job in self.jobs() if "deletionTimestamp" not in job["metadata"]]

    def make_pods(self) -> None:
        """Create the job's pods once; a refusal becomes the event that the operator would file."""
        if self._made:
            return
        self._made, job = True, self.job
        parent = job if self.kind is PYTORCHJOB else self._make_job_of_set(job)
        reason = "FailedCreatePod" if self.kind is PYTORCHJOB else "FailedCreate"
        for number in range(self._nodes(job)):
            pod = self._pod(job, parent, number)
            status, made = self.server.create(pod, self.namespace)
            if status != 201:
                self.warn(parent, reason, f"Error creating: {made['message']}")

    def warn(self, about: Mapping[str, Any], reason: str, message: str) -> None:
        """File a warning about an object."""
        keys = ("name", "namespace", "uid")
        involved = {key: about["metadata"][key] for key in keys} | {"kind": about["kind"]}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": "warning-"},
            "type": "Warning",
            "reason": reason,
            "message": message,
            "involvedObject": involved | {"apiVersion": about["apiVersion"]},
            "lastTimestamp": STAMP,
        }
        self.server.must_create(event, self.namespace)

    def condition(self, name: str) -> None:
        """Set a condition of the job, as its operator does."""
        job = self.job
        condition = {
            **{"type": name, "status": "True", "reason": f"Job{name}", "message": name},
            "lastTransitionTime": STAMP,
        }
        more: dict[str, Any] = (
            {"replicaStatuses": {"Worker": {}}} if self.kind is PYTORCHJOB else {}
        )
        self.server.set_status(job, self.namespace, conditions=[condition], **more)

    def _nodes(self, job: Mapping[str, Any]) -> int:
        spec = job["spec"]
        return int(
            spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
            if self.kind is PYTORCHJOB
            else spec["trainer"]["numNodes"]
        )

    def _template(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the pod template that the operator makes of a job and, for a TrainJob, its runtime."""
        spec = job["spec"]
        if self.kind is PYTORCHJOB:
            replica = spec["pytorchReplicaSpecs"]["Worker"]
            template = copy.deepcopy(replica["template"])
            template["spec"]["restartPolicy"] = replica["restartPolicy"]
            return template
        runtime = {"apiVersion": self.kind.api_version, "kind": "TrainingRuntime"}
        path = f"{self.server.path(runtime, self.namespace)}/{spec['runtimeRef']['name']}"
        _, found = self.server.call("GET", path)
        (patch,) = spec["runtimePatches"]
        of_runtime, of_patch = (
            node["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
            for node in (found["spec"], patch["trainingRuntimeSpec"])
        )
        template = merge(of_runtime, of_patch, by_item=True)
        (container,) = template["spec"]["containers"]
        trainer = spec["trainer"]
        container |= {key: trainer[key] for key in ("image", "command", "env")}
        container["resources"] = trainer["resourcesPerNode"]
        template["spec"].setdefault("restartPolicy", "Never")
        return dict(template)

    def _pod(self, job: dict[str, Any], parent: dict[str, Any], number: int) -> dict[str, Any]:
        template, name = self._template(job), job["metadata"]["name"]
        suffix, role = (
            (f"worker-{number}", "training.kubeflow.org/replica-index")
            if self.kind is PYTORCHJOB
            else (f"node-0-{number}", "batch.kubernetes.io/job-completion-index")
        )
        labels = {**template["metadata"].get("labels", {}), role: str(number)}
        spec = {**template["spec"], "containers": [*template["spec"]["containers"], *self.injected]}
        metadata = {
            "name": f"{name}-{suffix}",
            "labels": labels,
            "ownerReferences": [_owner(parent)],
        }
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def _make_job_of_set(self, job: dict[str, Any]) -> dict[str, Any]:
        """Create a TrainJob's JobSet and its Job; return the Job."""
        name, nodes = job["metadata"]["name"], self._nodes(job)
        spec = {"parallelism": nodes, "completions": nodes, "template": self._template(job)}
        replicated = {"name": "node", "replicas": 1, "template": {"spec": spec}}
        jobset = {
            **_object("jobset.x-k8s.io/v1alpha2", "JobSet", name, job),
            "spec": {"replicatedJobs": [replicated]},
        }
        made = self.server.must_create(jobset, self.namespace)
        child = {
            **_object("batch/v1", "Job", f"{name}-node-0", made),
            "spec": {**spec, "completionMode": "Indexed", "backoffLimit": 0},
        }
        return dict(self.server.must_create(child, self.namespace))


@contextlib.contextmanager
def launcher_log() -> Iterator[list[str]]:
    """Collect what the launcher logs."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, log = Handler(), logging.getLogger("components.jobs")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@dataclass
class Launch:
    """A namespace in which the chart is installed for a kind of job, and a launcher in it."""

    server: ApiServer
    namespace: str
    backend: str
    settings: dict[str, Any]  # the chart's training defaults
    operators: Operators
    token: str

    @classmethod
    def prepared(
        cls, server: ApiServer, namespace: str, backend: str, level: str = "restricted"
    ) -> Launch:
        """Create the namespace and what the chart puts there for runs."""
        make_namespace(server, namespace, level)
        documents = render({"training": {"backend": backend}}, namespace=namespace)
        kinds = (
            "ServiceAccount",
            "PersistentVolumeClaim",
            "Role",
            "RoleBinding",
            "TrainingRuntime",
        )
        for kind in kinds:
            for document in of_kind(documents, kind):
                server.must_create(document, namespace)
        operators = Operators(server, namespace, backend)
        token = server.token_of(ACCOUNT, namespace)
        return cls(server, namespace, backend, cluster(documents), operators, token)

    def config(self, **changes: Any) -> RunConfig:
        section = {**self.settings, "queue_hours": 24, **changes}
        return parse_config(
            {"name": "check", "data": {"source": "openai/gsm8k"}, "cluster": section}
        )

    def run(self, config: RunConfig, step: Callable[[int], None]) -> list[str]:
        """Run the launcher with the steps' account; return what it logged.

        Raises: UserError, as the launcher.
        """
        context = JobContext(
            run_id=self.namespace,
            output=PurePosixPath("/workspace/runs/a/train"),
            module=("canvastune.train", "-c", "/workspace/runs/a/train/recipe.yaml"),
        )
        client = self.server.api_client(self.token)
        api = KubernetesClient(client, self.namespace, KINDS[self.backend], Clock(step))
        with launcher_log() as lines:
            launch(api, config, context)
        return lines

    def fails(self, config: RunConfig, step: Callable[[int], None]) -> str:
        """Return the error of a launcher that must fail."""
        try:
            self.run(config, step)
        except UserError as error:
            return format_error(error)
        raise AssertionError("the launcher did not fail")


# --- claims


def check_chart(server: ApiServer, report: Report) -> None:
    """Send every object of every values file, and every pod of them."""
    unknown: set[str] = set()
    for name, values in FILES.items():
        namespace = f"chart-{name}"
        with report.claim(f"chart, {name}: every object is accepted, with strict validation"):
            make_namespace(server, namespace)
            documents = render(values, namespace=namespace)
            for document in of_kind(documents, "ServiceAccount"):
                server.must_create(document, namespace)
            for document in documents:
                if server.path(document, namespace) is None:
                    unknown.add(f"{document['kind']} ({document['apiVersion']})")
                    continue
                status, answer = server.create(document, namespace, dry_run=True)
                known = document["kind"] == "ServiceAccount" and status == 409
                assert status == 201 or known, f"{document['kind']}: {answer['message']}"
        with report.claim(
            f"chart, {name}: every pod is admitted with a quota on all four of CPU and memory, "
            f"a LimitRange{' and PodSecurity restricted' if 'PodSecurity' in server.plugins else ''}"
        ):
            add_quota(server, namespace, QUOTA)
            add_limit_range(server, namespace, LIMIT_RANGE)
            refusals = [
                f"{where}: {answer['message']}"
                for where, pod in chart_pods(documents)
                if (answer := _admitted(server, namespace, pod)) is not None
            ]
            assert not refusals, "\n".join(refusals)
    for kind in sorted(unknown):
        with report.claim(f"chart: {kind}"):
            raise Refused("this server has no such kind, and no CRD of it was given")


def chart_pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pods of the chart's objects."""
    for document in documents:
        for path, spec in pod_specs(document):
            yield f"{document['kind']} {document['metadata']['name']} {path}", spec


def check_steps(server: ApiServer, report: Report) -> None:
    """Admit the pods of the compiled graph's steps, with all that upload was given."""
    values = FILES["company"]
    with (
        report.claim("upload: every step's pod is admitted with quota and LimitRange"),
        tempfile.TemporaryDirectory() as folder,
    ):
        make_namespace(server, "steps")
        add_quota(server, "steps", QUOTA)
        add_limit_range(server, "steps", LIMIT_RANGE)
        documents = render(values, namespace="steps")
        text = named(documents, "ConfigMap", "canvastune-training")["data"]["steps.json"]
        file = Path(folder) / "pipeline.yaml"
        compile_pipeline(file, {"steps": text, "cluster": json.dumps(cluster(documents))})
        graph, platform = yaml.safe_load_all(file.read_text(encoding="utf-8"))
        pods = dict(step_pods(graph, platform))
        assert len(pods) >= 8, f"found {len(pods)} steps"
        for name, pod in pods.items():
            refusal = _admitted(server, "steps", pod)
            assert refusal is None, f"{name}: {refusal['message'] if refusal else ''}"


def step_pods(
    graph: Mapping[str, Any], platform: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pod of each step with what Kubeflow's driver takes from the compiled graph.

    Kubeflow's own containers and security contexts are its own: the latter are those of PodSecurity
    restricted here.
    """
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in graph["deploymentSpec"]["executors"].items():
        own, given = settings.get(name, {}), executor["container"]["resources"]
        mounts = [
            {"name": f"mount-{number}", "mountPath": one["mountPath"], **_sub_path(one)}
            for number, one in enumerate(own.get("pvcMount", ()))
        ]
        volumes: list[dict[str, Any]] = [
            {"name": mount["name"], "persistentVolumeClaim": {"claimName": "workspace"}}
            for mount in mounts
        ]
        for key, source, field in (
            ("configMapAsVolume", "configMap", "name"),
            ("secretAsVolume", "secret", "secretName"),
        ):
            for number, one in enumerate(own.get(key, ())):
                label = f"{source.lower()}-{number}"
                volumes.append({"name": label, source: {field: "company-ca"}})
                mounts.append({"name": label, "mountPath": one["mountPath"]})
        container = {
            "name": "main",
            "image": "registry.example.com/pipeline:1",
            "command": ["true"],
            "env": executor["container"].get("env", []),
            "resources": {
                "requests": {
                    "cpu": given["resourceCpuRequest"],
                    "memory": given["resourceMemoryRequest"],
                },
                "limits": {
                    "cpu": given["resourceCpuLimit"],
                    "memory": given["resourceMemoryLimit"],
                },
            },
            "volumeMounts": mounts,
            "securityContext": _RESTRICTED,
        }
        pod = {
            "containers": [container],
            "volumes": volumes,
            "serviceAccountName": "default-editor",
            "tolerations": [
                {key: value for key, value in one.items() if key != "tolerationJson"}
                for one in own.get("tolerations", ())
            ],
            "restartPolicy": "Never",
        }
        yield name, pod


def check_launcher(server: ApiServer, report: Report, crds: Mapping[str, list[Crd]]) -> None:
    """Launch jobs with the chart's permissions: one that is accepted, and one for each refusal."""
    for backend in ("pytorchjob", "trainjob"):
        if f"{KINDS[backend].plural}.{KINDS[backend].group}" not in crds:
            continue
        with report.claim(f"launcher, {backend}: accepted, adopted by pods, succeeded"):
            launch_ = Launch.prepared(server, f"well-{backend}", backend)
            ends = {"pytorchjob": "Succeeded", "trainjob": "Complete"}

            def well(number: int, launch_: Launch = launch_, end: str = ends[backend]) -> None:
                if number == 0:
                    launch_.operators.make_pods()
                elif number == 1:
                    launch_.operators.condition(end)

            lines = launch_.run(launch_.config(), well)
            assert any("reason=JobSucceeded" in line for line in lines), lines
            assert not any("reason=Quota" in line or "refused" in line for line in lines), lines
        with report.claim(
            f"launcher, {backend}: without the chart's Role, the permission is named"
        ):
            bare = Launch.prepared(server, f"bare-{backend}", backend)
            path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{bare.namespace}/rolebindings"
            server.call("DELETE", f"{path}/canvastune-launcher")
            time.sleep(1)  # the authorizer's informer
            error = bare.fails(bare.config(), lambda _: None)
            assert "may not list pods" in error, error
            assert "permissions.create=true" in error, error
        for case in REFUSALS:
            if case.only not in (None, backend) or case.plugin not in server.plugins:
                continue
            with report.claim(f"launcher, {backend}: {case.what} is explained with its setting"):
                check_refusal(server, backend, case)


@dataclass(frozen=True)
class Refusal:
    """Something that the API server refuses, and what the launcher must say."""

    what: str
    plugin: str
    words: str  # of the error
    hint: str
    settings: Mapping[str, Any]  # of the run's section `cluster`
    prepare: Callable[[ApiServer, str], None] = lambda *_: None
    sidecar: bool = False  # a webhook adds a container that PodSecurity restricted refuses
    level: str = "restricted"
    only: str | None = None  # backend


_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_NO_CPU_LIMIT: dict[str, Any] = {"resources": {"requests": {}, "limits": {}}}
REFUSALS = (
    Refusal(
        "a quota on limits.cpu",
        "ResourceQuota",
        "must specify limits.cpu",
        "cluster.resources.limits.cpu",
        _NO_CPU_LIMIT,
        lambda server, namespace: add_quota(server, namespace, {"limits.cpu": "1000"}),
    ),
    Refusal(
        "a quota that is too small",
        "ResourceQuota",
        "never has room",
        "or have the quota raised",
        {},
        lambda server, namespace: add_quota(server, namespace, {"requests.memory": "1Gi"}),
    ),
    Refusal(
        "a LimitRange's maximum",
        "LimitRanger",
        "maximum memory usage per Container is 1Gi",
        "within the namespace's LimitRange",
        {},
        lambda server, namespace: add_limit_range(
            server, namespace, {"type": "Container", "max": {"memory": "1Gi"}}
        ),
    ),
    Refusal(
        "a LimitRange's default below the request",
        "LimitRanger",
        "must be less than or equal to cpu limit",
        "cluster.resources.limits.cpu",
        _NO_CPU_LIMIT,
        lambda server, namespace: add_limit_range(
            server, namespace, {"type": "Container", "default": {"cpu": "1"}}
        ),
    ),
    Refusal(
        "a sidecar that PodSecurity refuses",
        "PodSecurity",
        'violates PodSecurity "restricted',
        "webhook that injects a sidecar",
        {},
        sidecar=True,
    ),
    Refusal(
        "a missing service account",
        "ServiceAccount",
        'serviceaccount "absent" not found',
        "cluster.service_account",
        {"service_account": "absent"},
    ),
    Refusal(
        "a missing priority class",
        "Priority",
        "no PriorityClass with name absent",
        "cluster.priority_class",
        {"priority_class": "absent"},
        only="pytorchjob",  # a TrainJob's is its runtime's
    ),
    Refusal(
        "a quota on the number of jobs",
        "ResourceQuota",
        "exceeded quota: team-quota",
        "quota",
        {},
        lambda server, namespace: add_quota(
            server,
            namespace,
            {"count/pytorchjobs.kubeflow.org": "0", "count/trainjobs.trainer.kubeflow.org": "0"},
        ),
    ),
    Refusal(
        "a namespace that is being deleted",
        "NamespaceLifecycle",
        "is being terminated",
        "use another one",
        {},
        _delete_namespace,
    ),
)


def check_refusal(server: ApiServer, backend: str, case: Refusal) -> None:
    """Let the server refuse, and hold what the launcher says against what it must say."""
    name = re.sub("[^a-z]+", "-", case.what.lower()).strip("-")[:40].strip("-")
    launch_ = Launch.prepared(server, f"{name}-{backend}", backend, case.level)
    case.prepare(server, launch_.namespace)
    if case.sidecar:
        launch_.operators.injected = [
            {"name": "proxy", "image": "proxy:1", "securityContext": {"runAsUser": 0}}
        ]
    config = launch_.config(**case.settings)
    began = time.time()
    error = launch_.fails(config, lambda _: launch_.operators.make_pods())
    assert time.time() - began < 120, "nothing is waited for here"
    assert case.words in error, error
    assert case.hint in error, error
    assert not launch_.operators.kept_jobs(), "the job was kept"


def check_pruning(server: ApiServer, report: Report, crds: list[Crd]) -> None:
    """Launch with the CRD of each older Trainer: what it lacks is a refusal that names it."""
    floor = tuple(map(int, TRAINJOB.floor.version.split(".")))
    older = [crd for crd in crds if crd.version[:2] < floor]
    if not older:
        with report.claim("launcher, trainjob: what an older Trainer's CRD lacks is named"):
            raise Refused("no CRD of an older Trainer was given; --crds FOLDER")
    for crd in older:
        with report.claim(f"launcher, trainjob: what Trainer {crd.text} lacks is named"):
            server.install_crd(crd.document)
            time.sleep(3)  # the server replaces the kind's handler
            launch_ = Launch.prepared(server, f"trainer-{crd.text.replace('.', '-')}", "trainjob")
            error = launch_.fails(launch_.config(), lambda _: None)
            fields = re.search(r"did not store (spec\.[^:]*)", error)
            assert fields is not None, error
            assert f"Kubeflow Trainer {TRAINJOB.floor.version} or newer" in error, error
            assert not launch_.operators.kept_jobs(), "the job was kept"
            print(f"         not stored: {fields[1]}")
    server.install_crd(crds[-1].document)
    time.sleep(3)


def check_queue(server: ApiServer, report: Report) -> None:
    """Launch a job that Kueue queues: the launcher reads a Workload as Kueue writes it."""
    with report.claim("launcher, in Kueue's queue: says what it waits for and since when"):
        launch_ = Launch.prepared(server, "queue", "pytorchjob")
        message = "couldn't assign flavors to pod set worker: insufficient unused quota for cpu"

        def queued(number: int) -> None:
            operators = launch_.operators
            if number == 0:
                job = operators.job
                path = server.path(job, launch_.namespace)
                server.call(
                    "PATCH",
                    f"{path}/{job['metadata']['name']}",
                    {"spec": {"runPolicy": {"suspend": True}}},
                    content_type="application/merge-patch+json",
                )
                template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
                pod_set = {"name": "worker", "count": 1, "template": template}
                workload = {
                    **_object("kueue.x-k8s.io/v1beta1", "Workload", "pytorchjob-check", job),
                    "spec": {"queueName": "team-a", "podSets": [pod_set]},
                }
                server.must_create(workload, launch_.namespace)
                pending = {
                    **{"type": "QuotaReserved", "status": "False", "reason": "Pending"},
                    **{"message": message, "lastTransitionTime": STAMP},
                }
                server.set_status(workload, launch_.namespace, conditions=[pending])

        with launcher_log() as lines:
            error = launch_.fails(launch_.config(queue="team-a", queue_hours=0.1), queued)
        assert message in error, error
        said = [line for line in lines if job_diagnostics.WAITING_IN_QUEUE in line]
        assert len(said) == 1, lines
        assert re.search(r"queued in LocalQueue team-a since \d{4}-\d\d-\d\dT[\d:]+Z: ", said[0])


# --- the command


def check(server: ApiServer, report: Report, crds: Mapping[str, list[Crd]]) -> None:
    """Check every claim for which the server has what it needs."""
    for plugin in PLUGINS:
        if plugin not in server.plugins:
            with report.claim(f"admission by {plugin}"):
                raise Refused(f"Kubernetes {server.version} does not have it")
    for name, what in WANTED.items():
        if name in crds:
            server.install_crd(crds[name][-1].document)
        else:
            with report.claim(what):
                raise Refused(f"no CRD {name} was given; --crds FOLDER")
    for name in sorted(set(crds) - set(WANTED)):
        server.install_crd(crds[name][-1].document)
    for name in sorted(set(_values(list(map(render, FILES.values())), "priorityClassName"))):
        document = {**_object("scheduling.k8s.io/v1", "PriorityClass", name), "value": 1}
        server.must_create(document)
    check_chart(server, report)
    check_steps(server, report)
    check_launcher(server, report, crds)
    if "trainjobs.trainer.kubeflow.org" in crds:
        check_pruning(server, report, crds["trainjobs.trainer.kubeflow.org"])
    if "workloads.kueue.x-k8s.io" in crds and "pytorchjobs.kubeflow.org" in crds:
        check_queue(server, report)


def main() -> int:
    """Check every claim; return 1 if one failed or the programs are not there."""
    parser = argparse.ArgumentParser(prog="python -m tools.apiserver", description=__doc__)
    parser.add_argument(
        "--crds",
        type=Path,
        default=CRDS,
        metavar="FOLDER",
        help="CRDs as GROUP_PLURAL.vVERSION.yaml, of one version or several (default: %(default)s)",
    )
    options, report = parser.parse_args(), Report()
    try:
        assets = find_assets()
        crds = read_crds(options.crds)
        with (
            tempfile.TemporaryDirectory(prefix="canvastune-apiserver-") as folder,
            ApiServer(assets, Path(folder) / "server") as server,
        ):
            print(f"Kubernetes {server.version}; admission: {', '.join(sorted(server.plugins))}")
            versions = [
                f"{name} {', '.join(c.text for c in found)}" for name, found in crds.items()
            ]
            print(f"CRDs: {'; '.join(versions) or 'none'}", flush=True)
            check(server, report, crds)
    except Refused as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped")
    return int(report.failed > 0)


def _object(
    version: str, kind: str, name: str, owner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if owner is not None:
        metadata["ownerReferences"] = [_owner(owner)]
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _owner(one: Mapping[str, Any]) -> dict[str, Any]:
    names = {key: one["metadata"][key] for key in ("name", "uid")}
    return {key: one[key] for key in ("apiVersion", "kind")} | names | {"controller": True}


def _admitted(server: ApiServer, namespace: str, spec: Mapping[str, Any]) -> Any | None:
    """Return the server's refusal of a pod; None if it is admitted."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "check-"},
        "spec": {"restartPolicy": "Always", **spec},
    }
    status, answer = server.create(pod, namespace, dry_run=True)
    return None if status == 201 else answer


def _probe_spec() -> dict[str, Any]:
    resources = {"cpu": "10m", "memory": "32Mi"}
    container = {
        "name": "probe",
        "image": "probe:1",
        "resources": {"requests": resources, "limits": resources},
        "securityContext": _RESTRICTED,
    }
    return {"containers": [container]}


def _sub_path(mount: Mapping[str, Any]) -> dict[str, str]:
    return {"subPath": mount["subPath"]} if mount.get("subPath") else {}


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Yield every value under a key, anywhere in a tree."""
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            if name == key:
                yield branch
            else:
                yield from _values(branch, key)
    elif isinstance(tree, list):
        for branch in tree:
            yield from _values(branch, key)


if __name__ == "__main__":
    sys.exit(main())

"""Claims about the launcher: what it starts, and what it says of each refusal."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from components.jobs import job_diagnostics
from components.jobs.states import KINDS, TRAINJOB
from tests.fakes.fake_kubernetes import NOT_STORED
from tests.support.api_server import ApiServer
from tools.apiserver.crds import Crd
from tools.apiserver.objects import STAMP, add_limit_range, add_quota, delete_namespace, object_of
from tools.apiserver.operators import Launch, launcher_log
from tools.image_builds import Refused
from tools.images import Report


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
        delete_namespace,
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
            known = NOT_STORED.get(crd.text, ())
            assert fields[1] == ", ".join(known) or not known, "the fake forgets other fields"
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
                    **object_of("kueue.x-k8s.io/v1beta1", "Workload", "pytorchjob-check", job),
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

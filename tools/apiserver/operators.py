"""What operators and controllers would do, and a launcher whose jobs they run."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError, format_error
from components.jobs.backends import JobContext
from components.jobs.client import KubernetesClient
from components.jobs.launcher import launch
from components.jobs.states import KINDS, PYTORCHJOB
from tests.support.api_server import ApiServer
from tests.support.every_pod import trainjob_template
from tests.support.rendered_chart import cluster, of_kind, render
from tools.apiserver.objects import ACCOUNT, STAMP, make_namespace, object_of, owner_of


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
        (job,) = self.jobs()
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
        return trainjob_template(job, found)

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
            "ownerReferences": [owner_of(parent)],
        }
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def _make_job_of_set(self, job: dict[str, Any]) -> dict[str, Any]:
        """Create a TrainJob's JobSet and its Job; return the Job."""
        name, nodes = job["metadata"]["name"], self._nodes(job)
        spec = {"parallelism": nodes, "completions": nodes, "template": self._template(job)}
        replicated = {"name": "node", "replicas": 1, "template": {"spec": spec}}
        jobset = {
            **object_of("jobset.x-k8s.io/v1alpha2", "JobSet", name, job),
            "spec": {"replicatedJobs": [replicated]},
        }
        made = self.server.must_create(jobset, self.namespace)
        child = {
            **object_of("batch/v1", "Job", f"{name}-node-0", made),
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

"""What a followed run waits for: its jobs' reports, steps that do not start or have no pod."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from canvastune.errors import UserError
from components.jobs.client import Clock, Forbidden, KubernetesClient, connect_to_cluster
from components.jobs.job_diagnostics import read_refusals
from components.jobs.log_stream import LogPosition
from components.jobs.pod_diagnostics import containers
from components.jobs.states import PYTORCHJOB, Object, conditions
from components.versions import RESTRICTED_STEPS

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_RUN = "pipeline/runid"  # Kubeflow's label on the pods of a run's steps
_CONTAINER = "main"  # Argo's name of the container with the step's program
_REPORT = re.compile(r"^(?:WARNING )?(.*\(reason=\w+\).*)$")
_STARTING = ("ContainerCreating", "PodInitializing")
# What Argo writes into the node of a step whose pod it could not create.
_REFUSED = re.compile(r'"[^"]*" is (?:forbidden|invalid): |denied the request|calling webhook "')
_REFUSALS = read_refusals("steps")
_OTHER = "Correct what the message names (chart: steps), or ask the cluster's administrator."
_RETRY_SECONDS = 60.0  # between two attempts to read logs that could not be read


class JobReports:
    """The states of a run's jobs, what they wait for in their queue, and what blocks pods.

    Kubeflow's API has none of it, so it is read from the cluster of the kubeconfig. Where that
    cannot be done, one line says why, and which command shows it.
    """

    def __init__(
        self,
        run_id: str,
        namespace: str,
        connect: Callable[[], tuple[ApiClient, str]] | None = None,
        clock: Clock = time,
    ) -> None:
        self._label, self._namespace = f"{_RUN}={run_id}", namespace
        self._connect, self._clock = connect or connect_to_cluster, clock
        self._api: KubernetesClient | None = None
        self._positions: dict[str, LogPosition] = {}  # by the uid of a pod
        self._stuck: dict[str, str] = {}  # by the uid of a pod: why it does not start
        self.refusals: dict[str, tuple[str, str]] = {}  # by step: why it has no pod, and what helps
        self._reported: set[str] = set()  # steps whose refusal was reported
        self._next_attempt = 0.0
        self._said = False  # that nothing can be shown
        self._reads_workflows = True

    def new(self, *, running: bool = True) -> list[str]:
        """Return what the launchers have reported since the last call, and which steps are stuck.

        Args:
            running: Kubeflow reports that a step runs, so that there must be a pod.
        """
        if self._clock.time() < self._next_attempt:
            return []
        try:
            if self._api is None:
                client, _ = self._connect()
                # The launchers log the kind of job; pods and their logs are read the same for both.
                self._api = KubernetesClient(client, self._namespace, PYTORCHJOB, self._clock)
                self._api.timeout = 0.0  # the next call is the next attempt
            pods = self._api.pods(self._label)
            lines = [line for pod in pods for line in self._lines(self._api, pod)]
            lines += self._new_refusals(self._api)
        except UserError as error:
            permanent = isinstance(error, Forbidden) or self._api is None
            self._next_attempt = float("inf") if permanent else self._clock.time() + _RETRY_SECONDS
            return self._say_unreadable(self._reason(error))
        if pods or self.refusals or not running:
            self._said = self._said and not pods  # another outage is reported again
            return lines
        return self._say_unreadable(
            f"namespace {self._namespace} of the kubeconfig's cluster has no pod of this run"
        )

    def _lines(self, api: KubernetesClient, pod: Object) -> list[str]:
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        if pod["status"].get("phase") == "Pending":
            reason, message = _stuck(pod, api.events(name))
            if not reason or self._stuck.get(uid) == reason:
                return []
            self._stuck[uid] = reason
            return [f"pod {name} does not start: {reason}: {message}"]
        if pod["status"].get("phase") == "Running":
            position = self._positions.setdefault(uid, LogPosition())
        elif uid in self._positions:
            position = self._positions.pop(uid)  # for the last time
        else:
            return []  # what a step that has ended once waited for
        lines = map(_report, position.new_lines(api, name, container=_CONTAINER))
        return [line for line in lines if line]

    def _new_refusals(self, api: KubernetesClient) -> list[str]:
        """Return which steps have no pod because the API server refuses it, each step once."""
        if not self._reads_workflows:
            return []
        try:
            workflows = api.workflows(self._label)
        except Forbidden:
            self._reads_workflows = False
            return [
                "steps whose pods are refused are not shown: your account may not list "
                f"workflows.argoproj.io in namespace {self._namespace}"
            ]
        known, self.refusals = self._reported, {}
        for step, message in _last_messages(workflows).items():
            if _REFUSED.search(message):
                found = (each.hint for each in _REFUSALS if each.pattern.search(message))
                hint = next(found, _OTHER).replace("{version}", RESTRICTED_STEPS.version)
                self.refusals[step] = message, hint
        self._reported = known | set(self.refusals)
        return [
            f"step {step} has no pod: {message}. {hint}"
            for step, (message, hint) in self.refusals.items()
            if step not in known
        ]

    def _reason(self, error: UserError) -> str:
        if self._api is None:
            return str(error)
        if isinstance(error, Forbidden):
            return f"your account may not read pods and their logs in namespace {self._namespace}"
        return "the Kubernetes API server does not respond"

    def _say_unreadable(self, reason: str) -> list[str]:
        if self._said:
            return []
        self._said = True
        command = f"kubectl logs -n {self._namespace} -l {self._label} -c {_CONTAINER} --tail=-1"
        return [f"what jobs wait for is not shown: {reason}. Use {command} | grep reason="]


def _last_messages(workflows: list[Object]) -> dict[str, str]:
    """Return what Argo says of the last attempt at each step, by the step's name in the graph."""
    attempts: dict[str, tuple[int, str]] = {}
    for workflow in workflows:
        for node in ((workflow.get("status") or {}).get("nodes") or {}).values():
            path = str(node.get("name") or "").partition(".")[2]
            match = re.fullmatch(r"(.*?)(?:\((\d+)\))?", path)
            if node.get("type") != "Pod" or match is None:
                continue
            number, message = int(match[2] or 0), " ".join(str(node.get("message") or "").split())
            attempts[match[1]] = max(attempts.get(match[1], (-1, "")), (number, message))
    return {step: message for step, (_, message) in attempts.items()}


def _stuck(pod: Object, warnings: list[Object]) -> tuple[str, str]:
    """Return why a pending pod does not start, as a reason and a message; ("", "") if unknown."""
    for container in containers(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, *_STARTING):
            # a pull that fails is ErrImagePull and ImagePullBackOff in turns
            reason = re.sub("^ErrImagePull$", "ImagePullBackOff", waiting["reason"])
            return reason, str(waiting.get("message") or "")
    for condition in conditions(pod):
        if condition.get("reason") == "Unschedulable":
            return "Unschedulable", str(condition.get("message") or "")
    last: Object = warnings[-1] if warnings else {}
    return str(last.get("reason") or ""), " ".join(str(last.get("message") or "").split())


def _report(line: str) -> str:
    """Return a launcher's report in a line of a step's log; "" if it is none."""
    if line.startswith("{"):
        try:
            line = str(json.loads(line).get("message", ""))
        except ValueError:
            return ""
    match = _REPORT.match(line)
    return match[1] if match else ""

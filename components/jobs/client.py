"""The Kubernetes API for the launcher: retries while the server is down, names what is missing."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import urllib3

from canvastune.errors import UserError
from components.jobs.states import Kind, Object

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

logger = logging.getLogger(__name__)

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_RETRY_TIMEOUT = 1800.0  # seconds: an API server's upgrade must not end a run of days
_MAX_PAUSE = 30.0  # seconds between two attempts
_REQUEST_TIMEOUT = (10, 60)  # seconds to connect, and to read
_RUNTIMES = "trainingruntimes"
_WORKFLOWS = ("argoproj.io", "v1alpha1", "workflows")
# What operators and queues put between a job and its pods: group and versions, the newest first.
_BETWEEN = {
    "jobsets": ("jobset.x-k8s.io", ("v1alpha2",)),
    "jobs": ("batch", ("v1",)),
    "workloads": ("kueue.x-k8s.io", ("v1beta2", "v1beta1")),
}

# RBAC, and other authorizers: `User "..." cannot create resource`, and OpenShift's `scopes`.
_NOT_AUTHORIZED = re.compile(r'User "[^"]*" cannot |^forbidden', re.IGNORECASE)

_WEBHOOK = "failed calling webhook"


class Clock(Protocol):
    """Seconds since 1970, and waiting: the module `time`, or a test's clock."""

    def time(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Conflict(Exception):
    """An object of that name exists."""


class Forbidden(UserError):
    """The service account lacks a permission."""


def connect_to_cluster() -> tuple[ApiClient, str]:
    """Return a client with this pod's service account or the kubeconfig, and the namespace.

    Raises:
        UserError: there is neither, or no `kubernetes` package.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise UserError(
            "cluster.backend: the package `kubernetes` is not installed",
            hint="Run pip install 'canvastune[pipeline]'.",
        ) from None
    settings = client.Configuration()
    settings.retries = False  # KubernetesClient retries, and logs it
    try:
        config.load_incluster_config(settings)
        settings.proxy = None  # the API server of this cluster is not behind the steps' proxy
        namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=settings)
            context = config.list_kube_config_contexts()[1]["context"]
            namespace = context.get("namespace", "default")
        except config.ConfigException:
            raise UserError(
                "cluster.backend: a job on Kubernetes needs a service account or a KUBECONFIG, "
                "found neither",
                hint="Run the pipeline on a cluster, or set cluster.backend=local.",
            ) from None
    return client.ApiClient(settings), namespace


def reading(
    client: ApiClient, path: str, response: str = "object", **query: str | int
) -> Callable[..., Any]:
    """Return a call that reads what a path of the API has, as JSON.

    The client's typed methods reject fields of other versions and lack sinceTime.
    """
    return partial(
        client.call_api,
        path,
        "GET",
        query_params=list(query.items()),
        header_params={"Accept": "*/*"},
        auth_settings=["BearerToken"],
        response_type=response,
        _return_http_data_only=True,
    )


class KubernetesClient:
    """The calls, in one namespace and for jobs of one kind. Objects are dictionaries, as in JSON.

    A call that fails because the API server is down or busy is retried, with growing pauses, for
    `timeout` seconds.

    Raises (every method):
        Forbidden: names the missing permission and how to grant it.
        UserError: the API server refuses, or stays down.
    """

    def __init__(self, client: ApiClient, namespace: str, kind: Kind, clock: Clock = time) -> None:
        from kubernetes import client as kubernetes

        self.namespace, self.clock, self.timeout = namespace, clock, _RETRY_TIMEOUT
        self._client, self._kind = client, kind
        self._unseen: set[str] = set()  # kinds that this account may not list
        self._custom = kubernetes.CustomObjectsApi(client)
        self._job_path = (kind.group, kind.version, namespace, kind.plural)
        self._workflow_path = (*_WORKFLOWS[:2], namespace, _WORKFLOWS[2])

    @classmethod
    def from_environment(cls, kind: Kind) -> KubernetesClient:
        """Connect as `connect_to_cluster` does."""
        return cls(*connect_to_cluster(), kind)

    # --- jobs

    def create(self, manifest: Mapping[str, Any]) -> Object:
        """Create a job. Raises: Conflict, if the name is taken."""
        call = partial(self._custom.create_namespaced_custom_object, *self._job_path, manifest)
        return self._request("create", self._kind.plural, call)

    def job(self, name: str) -> Object | None:
        """Return the job; None if there is none of that name."""
        return self._get(self._job_path, name)

    def jobs(self, labels: str) -> list[Object]:
        """Return the jobs that a label selector finds."""
        return self._list(self._job_path, labels)

    def delete(self, name: str) -> None:
        """Start deleting a job; its name is free once its pods have exited."""
        policy = {"propagationPolicy": "Foreground"}
        call = partial(
            self._custom.delete_namespaced_custom_object, *self._job_path, name, body=policy
        )
        self._request("delete", self._kind.plural, call, not_found=None)

    # --- what belongs to them

    def pods(self, labels: str) -> list[Object]:
        """Return the pods that a label selector finds, by name."""
        pods = self._request("list", "pods", self._core("pods", labelSelector=labels))["items"]
        return sorted(pods, key=lambda pod: pod["metadata"]["name"])

    def pod(self, name: str) -> Object | None:
        """Return one pod; None if there is none."""
        return self._request("get", "pods", self._core(f"pods/{name}"), not_found=None)

    def events(self, name: str, kind: str = "Pod", uid: str | None = None) -> list[Object]:
        """Return warnings about an object, the newest last.

        Args:
            uid: leaves out those about an earlier object of that name.
        """
        selector = f"involvedObject.kind={kind},involvedObject.name={name},type=Warning"
        call = self._core("events", fieldSelector=selector)
        events = self._request("list", "events", call)["items"]
        own = [e for e in events if uid is None or e["involvedObject"].get("uid") in (None, uid)]
        return sorted(own, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")

    def children(self, resource: str, owners: Iterable[Object]) -> list[Object]:
        """Return the objects of a kind that one of the owners owns, by uid: names are used again.

        [] also where the cluster does not have that kind, or this account may not see it.

        Args:
            resource: jobsets, jobs or workloads.
        """
        group, versions = _BETWEEN[resource]
        uids = {owner["metadata"]["uid"] for owner in owners}
        for version in versions if uids else ():
            path = (group, version, self.namespace, resource)
            call = partial(self._custom.list_namespaced_custom_object, *path)
            try:
                found = self._request("list", resource, call, not_found=None)
            except Forbidden as error:
                if resource not in self._unseen:
                    logger.warning(f"{error}; its events are not shown. {error.hint}")
                    self._unseen.add(resource)
                return []
            if found is not None:
                return [one for one in found["items"] if _is_owned(one, uids)]
        return []

    def may_list(self, resource: str) -> bool:
        """Return whether `children` has not been refused for a kind."""
        return resource not in self._unseen

    def log(
        self,
        pod: str,
        *,
        since: str | None = None,
        tail: int | None = None,
        previous: bool = False,
        container: str | None = None,
    ) -> list[str]:
        """Return lines of a pod's log, each after its timestamp and a space; [] without a log.

        Args:
            since: a time in RFC 3339, to the second.
            tail: only the last lines, so many at most.
            previous: of the container before the current one.
            container: None: the pod has only one.
        """
        query = {
            "container": container,
            "timestamps": "true",
            "sinceTime": since,
            "tailLines": tail,
            "previous": "true" if previous else None,
        }
        call = self._core(f"pods/{pod}/log", "str", **query)
        text: str = self._request("get", "pods/log", call, not_found="", not_ready="")
        return text.splitlines()

    def find(self, resource: str, name: str) -> Object | bool | None:
        """Return a claim, secret or training runtime; None if missing, True if unreadable."""
        try:
            if resource == _RUNTIMES:
                return self._get((*self._job_path[:3], resource), name)
            return self._request("get", resource, self._core(f"{resource}/{name}"), not_found=None)
        except Forbidden:
            return True

    def workflow(self, name: str) -> Object | None:
        """Return an Argo workflow; None if there is none."""
        return self._get(self._workflow_path, name)

    def workflows(self, labels: str) -> list[Object]:
        """Return the Argo workflows that a label selector finds."""
        return self._list(self._workflow_path, labels, not_found={"items": []})

    def server_version(self) -> str:
        """Return the API server's version, such as v1.36.2."""
        call = reading(self._client, "/version")
        return str((self._request("get", "version", call, not_found=None) or {}).get("gitVersion"))

    # --- requests

    def _get(self, path: tuple[str, str, str, str], name: str) -> Object | None:
        call = partial(self._custom.get_namespaced_custom_object, *path, name)
        return self._request("get", path[-1], call, not_found=None)

    def _list(self, path: tuple[str, str, str, str], labels: str, **defaults: Any) -> list[Object]:
        call = partial(self._custom.list_namespaced_custom_object, *path, label_selector=labels)
        return list(self._request("list", path[-1], call, **defaults)["items"])

    def _core(
        self, path: str, response: str = "object", **query: str | int | None
    ) -> Callable[..., Any]:
        """Return a call that reads one of Kubernetes' own kinds, as JSON."""
        given = {key: value for key, value in query.items() if value is not None}
        path = f"/api/v1/namespaces/{self.namespace}/{path}"
        return reading(self._client, path, response, **given)

    def _request(self, verb: str, resource: str, call: Callable[..., Any], **defaults: Any) -> Any:
        """Return a call's response; `not_found` for a 404 and `not_ready` for a 400, if given."""
        from kubernetes.client import ApiException

        pause, down_since = 1.0, None
        while True:
            try:
                response = call(_request_timeout=_REQUEST_TIMEOUT)
                if down_since is not None:
                    logger.info("the Kubernetes API server responds again")
                return response
            except ApiException as error:
                status = error.status or 0
                if status and status != 429 and status < 500:
                    return self._handle_refusal(verb, resource, status, error, defaults)
                reason = f"HTTP {status}" if status else str(error.reason)
                message = _status_message(error) or ""
                if _WEBHOOK in message:
                    reason = message  # the server responds, but not what it must ask first
            except urllib3.exceptions.HTTPError as error:
                reason = type(error).__name__
            if down_since is None:
                logger.warning(f"{_outage(reason)}; retrying")
                down_since = self.clock.time()
            if self.clock.time() - down_since >= self.timeout:
                minutes = f"{self.timeout / 60:.0f} minutes"
                if _WEBHOOK in reason:
                    raise UserError(
                        f"{_outage(reason)}, for {minutes}",
                        hint="Ask the cluster's administrator to repair the webhook's service.",
                    )
                raise UserError(
                    f"the Kubernetes API server did not respond for {minutes} ({reason}); the job "
                    "was not changed",
                    hint="Retry the step: it adopts the job.",
                )
            self.clock.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    def _handle_refusal(
        self, verb: str, resource: str, status: int, error: Any, defaults: Mapping[str, Any]
    ) -> Any:
        message = _status_message(error)
        if status == 404 and resource in (self._kind.plural, _RUNTIMES) and message is None:
            raise UserError(  # without a message, no such resource is served
                f"cluster.backend: this cluster has no {self._kind.kind} "
                f"({self._kind.api_version})",
                hint=f"Install {self._kind.operator}, or choose another cluster.backend.",
            )
        if status == 404 and "not_found" in defaults:
            return defaults["not_found"]
        if status == 400 and "not_ready" in defaults:
            return defaults["not_ready"]
        if status == 409 and verb == "create":
            raise Conflict
        # Admission refuses with 403 too: quotas on objects, namespaces that are being deleted.
        if status == 403 and (message is None or _NOT_AUTHORIZED.search(message)):
            raise self._forbidden(verb, resource, message)
        message = message or error.reason
        if status == 401:
            raise UserError(
                "the Kubernetes API server does not accept this pod's service account (401): "
                f"{message}",
                hint="Start the run again.",
            )
        hint = "Correct what the message names, or ask the cluster's administrator."
        if "is being terminated" in message:
            hint = "The namespace is being deleted: use another one."
        elif "exceeded quota" in message:
            hint = "Delete objects that the quota counts, or have the quota raised."
        raise UserError(
            f"the Kubernetes API server refused to {verb} {resource} (HTTP {status}): {message}",
            hint=hint,
        )

    def _forbidden(self, verb: str, resource: str, message: str | None) -> Forbidden:
        kind = self._kind
        groups = {kind.plural: kind.group, _RUNTIMES: kind.group, "workflows": _WORKFLOWS[0]}
        groups |= {resource: group for resource, (group, _) in _BETWEEN.items()}
        group = groups.get(resource)
        name = f"{resource}.{group}" if group else resource
        role = f"canvastune-{verb}-{resource.replace('/', '-')}"
        return Forbidden(
            f"the pipeline's service account may not {verb} {name} in namespace {self.namespace}: "
            f"{message or 'forbidden'}",
            hint="Grant it with the chart (permissions.create=true; permissions.serviceAccount "
            f"names the account), or run kubectl create role {role} -n {self.namespace} "
            f"--verb={verb} --resource={name} and bind it with kubectl create rolebinding.",
        )


def _outage(reason: str) -> str:
    """Return what is wrong with the API server, as part of a sentence."""
    if _WEBHOOK in reason:
        return f"the Kubernetes API server cannot create the job ({reason})"
    return f"the Kubernetes API server does not respond ({reason})"


def _is_owned(one: Object, uids: set[str]) -> bool:
    references = one["metadata"].get("ownerReferences") or ()
    return any(reference.get("uid") in uids for reference in references)


def _status_message(error: Any) -> str | None:
    """Return the message of the API server's Status; None if the response is not the API's."""
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return None

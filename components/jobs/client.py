"""The Kubernetes API as the launcher needs it: patient with an API server that is away, and plain about what it may not do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import urllib3

from canvastune.errors import UserError
from components.jobs.states import Kind, Object

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_PATIENCE = 1800.0  # seconds: an API server's upgrade does not end a run of days
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_TIMEOUT = (10, 60)  # seconds to connect, and to read
_RUNTIMES = "trainingruntimes"
_WORKFLOWS = ("argoproj.io", "v1alpha1", "workflows")


class Clock(Protocol):
    """Seconds since 1970, and waiting: the module `time`, or a test's."""

    def time(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Conflict(Exception):
    """An object of that name exists."""


class Forbidden(UserError):
    """The service account lacks a permission."""


def connect() -> tuple[ApiClient, str]:
    """A client with the rights of the pod that this runs in, or with those of the kubeconfig, and the namespace to work in.

    Raises:
        UserError: there is neither, or no `kubernetes` package.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise UserError("cluster.backend needs the package `kubernetes`: run pip install 'canvastune[pipeline]'") from None
    settings = client.Configuration()
    settings.retries = False  # Api makes them, and says so
    try:
        config.load_incluster_config(settings)
        namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=settings)
            namespace = config.list_kube_config_contexts()[1]["context"].get("namespace", "default")
        except config.ConfigException:
            raise UserError(
                "cluster.backend asks for a job on Kubernetes, and neither a service account nor a KUBECONFIG is here: "
                "run the pipeline on a cluster, or set cluster.backend=local"
            ) from None
    return client.ApiClient(settings), namespace


class KubernetesClient:
    """The calls, in one namespace and about jobs of one kind. Objects are dictionaries, as in their JSON.

    Every call that fails because the API server is away or busy is tried again, with growing pauses, for half an hour.

    Raises (every method):
        Forbidden: says which permission is missing and how it is granted.
        UserError: the API server refuses, or stays away.
    """

    def __init__(self, client: ApiClient, namespace: str, kind: Kind, clock: Clock = time) -> None:
        from kubernetes import client as kubernetes

        self.namespace, self.patience = namespace, _PATIENCE
        self._client, self._kind, self._clock = client, kind, clock
        self._custom = kubernetes.CustomObjectsApi(client)
        self._of_kind = (kind.group, kind.version, namespace, kind.plural)

    # --- jobs

    def create(self, manifest: Mapping[str, Any]) -> Object:
        """Raises: Conflict, if the name is taken."""
        return self._ask("create", self._kind.plural, partial(self._custom.create_namespaced_custom_object, *self._of_kind, manifest))

    def job(self, name: str) -> Object | None:
        """The job; None if there is none of that name."""
        return self._ask("get", self._kind.plural, partial(self._custom.get_namespaced_custom_object, *self._of_kind, name), absent=None)

    def jobs(self, labels: str) -> list[Object]:
        """The jobs that a label selector finds."""
        find = partial(self._custom.list_namespaced_custom_object, *self._of_kind, label_selector=labels)
        return self._ask("list", self._kind.plural, find)["items"]

    def delete(self, name: str) -> None:
        """Ask for the end of a job; its name is free when its pods are gone."""
        policy = {"propagationPolicy": "Foreground"}
        ask = partial(self._custom.delete_namespaced_custom_object, *self._of_kind, name, body=policy)
        self._ask("delete", self._kind.plural, ask, absent=None)

    # --- what belongs to them

    def pods(self, labels: str) -> list[Object]:
        """The pods that a label selector finds, by name."""
        found = self._ask("list", "pods", self._core("pods", labelSelector=labels))["items"]
        return sorted(found, key=lambda pod: pod["metadata"]["name"])

    def pod(self, name: str) -> Object | None:
        """One pod; None if there is none."""
        return self._ask("get", "pods", self._core(f"pods/{name}"), absent=None)

    def events(self, pod: str) -> list[Object]:
        """Warnings about a pod, the newest last."""
        of_it = f"involvedObject.kind=Pod,involvedObject.name={pod},type=Warning"
        found = self._ask("list", "events", self._core("events", fieldSelector=of_it))["items"]
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def log(self, pod: str, *, since: str | None = None, tail: int | None = None, previous: bool = False) -> list[str]:
        """Lines of a pod's log, each after its time of writing and a blank; none where there is no log (yet).

        Args:
            since: a time in RFC 3339, to the second.
            tail: at most so many lines, the last ones.
            previous: of the container before the one that runs.
        """
        query = {"timestamps": "true", "sinceTime": since, "tailLines": tail, "previous": "true" if previous else None}
        text: str = self._ask("get", "pods/log", self._core(f"pods/{pod}/log", "str", **query), absent="", unready="")
        return text.splitlines()

    def exists(self, resource: str, name: str) -> Object | bool | None:
        """Whether a claim, a secret or a training runtime exists: the object, None, or True if this pod may not know."""
        of_kind = (*self._of_kind[:3], resource, name)
        read = partial(self._custom.get_namespaced_custom_object, *of_kind) if resource == _RUNTIMES else self._core(f"{resource}/{name}")
        try:
            return self._ask("get", resource, read, absent=None)
        except Forbidden:
            return True

    def workflow(self, name: str) -> Object | None:
        """An Argo workflow; None if there is none."""
        group, version, plural = _WORKFLOWS
        ask = partial(self._custom.get_namespaced_custom_object, group, version, self.namespace, plural, name)
        return self._ask("get", plural, ask, absent=None)

    # --- asking

    def _core(self, path: str, answer: str = "object", **query: str | int | None) -> Callable[..., Any]:
        """A call that reads one of Kubernetes' own kinds, as JSON: the client's own methods for them refuse what they do not
        expect of another version, and know no sinceTime."""
        return partial(
            self._client.call_api,
            f"/api/v1/namespaces/{self.namespace}/{path}",
            "GET",
            query_params=[(key, value) for key, value in query.items() if value is not None],
            header_params={"Accept": "*/*"},
            auth_settings=["BearerToken"],
            response_type=answer,
            _return_http_data_only=True,
        )

    def _ask(self, verb: str, resource: str, call: Callable[..., Any], **instead: Any) -> Any:
        """The answer to a call; `absent` in place of a 404 and `unready` in place of a 400, where those are given."""
        from kubernetes.client import ApiException

        pause, away_since = 1.0, None
        while True:
            try:
                answer = call(_request_timeout=_TIMEOUT)
                if away_since is not None:
                    print("the Kubernetes API server answers again", flush=True)
                return answer
            except ApiException as error:
                status = error.status or 0
                if status and status != 429 and status < 500:
                    return self._refused(verb, resource, status, error, instead)
                reason = f"HTTP {status}" if status else str(error.reason)
            except urllib3.exceptions.HTTPError as error:
                reason = type(error).__name__
            away_since = away_since or self._now_and_say(reason)
            if self._clock.time() - away_since >= self.patience:
                raise UserError(
                    f"the Kubernetes API server did not answer for {self.patience / 60:.0f} minutes ({reason}). The job is left as it is: "
                    "the same step, tried again, takes it up"
                )
            self._clock.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _now_and_say(self, reason: str) -> float:
        print(f"the Kubernetes API server does not answer ({reason}); trying again", flush=True)
        return self._clock.time()

    def _refused(self, verb: str, resource: str, status: int, error: Any, instead: Mapping[str, Any]) -> Any:
        said = _message(error)
        if status == 404 and resource in (self._kind.plural, _RUNTIMES) and said is None:  # nobody serves such a path
            raise UserError(
                f"this cluster does not know {self._kind.kind} ({self._kind.api_version}): install {self._kind.operator}, "
                "or choose another cluster.backend"
            )
        if status == 404 and "absent" in instead:
            return instead["absent"]
        if status == 400 and "unready" in instead:
            return instead["unready"]
        if status == 409 and verb == "create":
            raise Conflict
        if status == 403 and "forbidden" in (said or "forbidden").lower():
            raise Forbidden(_how_to_grant(verb, resource, self._kind, self.namespace, said))
        if status == 401:
            raise UserError(
                f"the Kubernetes API server does not accept this pod's service account: {said or error.reason}. Start the run again"
            )
        raise UserError(
            f"the Kubernetes API server refuses to {verb} {resource} (HTTP {status}): {said or error.reason}. "
            "Correct what it names, or ask who runs the cluster"
        )


def _message(error: Any) -> str | None:
    """The API server's own words; None if the answer is not the API's."""
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _how_to_grant(verb: str, resource: str, kind: Kind, namespace: str, said: str | None) -> str:
    group = {kind.plural: kind.group, _RUNTIMES: kind.group, "workflows": _WORKFLOWS[0]}.get(resource)
    name = f"{resource}.{group}" if group else resource
    return (
        f"the pipeline's service account may not {verb} {name} in namespace {namespace}. Grant it with the chart (permissions.create=true; "
        "permissions.serviceAccount names the account), or: "
        f"kubectl create role canvastune-{verb}-{resource.replace('/', '-')} -n {namespace} --verb={verb} --resource={name}, "
        f"and bind it with kubectl create rolebinding. The API server said: {said or 'forbidden'}"
    )

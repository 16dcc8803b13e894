"""Check the Kubernetes cluster and Kubeflow, if a kubeconfig or a service account is available."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.errors import UserError
from components.versions import KUBERNETES, RESTRICTED_STEPS
from pipelines.doctor.finding import Finding
from pipelines.kfp_client import KubeflowClient

if TYPE_CHECKING:
    from components.jobs.states import Kind

# What the chart's Role grants, by API group: resources and verbs. A test compares it with the
# chart.
_JOB = ("create", "get", "list", "watch", "patch", "delete")
PERMISSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "kubeflow.org": {"pytorchjobs": _JOB},
    "trainer.kubeflow.org": {"trainjobs": _JOB, "trainingruntimes": ("get", "list")},
    "": {
        "pods": ("get", "list", "watch"),
        "pods/log": ("get", "list", "watch"),
        "events": ("list",),
    },
    "argoproj.io": {"workflows": ("get",)},
    # what lies between a job and its pods
    "jobset.x-k8s.io": {"jobsets": ("list",)},
    "batch": {"jobs": ("list",)},
    "kueue.x-k8s.io": {"workloads": ("list",)},
}
_COUNTED = ("cpu", "memory")
_TIMEOUT = (5, 10)  # seconds to connect, and to read


def check_cluster(namespace: str | None, backend: str) -> Iterator[Finding]:
    """Check the API server, the operators of training jobs, and the account's permissions.

    Args:
        namespace: None: the namespace of the pod, or of the kubeconfig's context.
        backend: the recipe's cluster.backend.
    """
    inside = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    files = [
        Path(name).expanduser()
        for name in (os.environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep)
        if name
    ]
    if not inside and not any(file.is_file() for file in files):
        if backend != "local":
            fix = "not needed for canvastune submit; otherwise, put a kubeconfig there or set KUBECONFIG"
            found = f"cluster.backend={backend}, but there is no kubeconfig ({files[0]})"
            yield Finding("cluster", "warning", found, fix)
        else:
            yield Finding("cluster", "skipped", f"no kubeconfig ({files[0]})")
        return
    import urllib3
    from kubernetes import client as kubernetes

    from components.jobs.client import connect_to_cluster

    client, own = connect_to_cluster()
    host, namespace = client.configuration.host, namespace or own
    try:
        version = _get(client, "/version")["gitVersion"]
    except kubernetes.ApiException as error:
        fix = (
            "get a new token, or log in again"
            if error.status == 401
            else "ask the administrator of the cluster"
        )
        yield Finding("cluster", "problem", f"{host}: HTTP {error.status}: {error.reason}", fix)
        return
    except urllib3.exceptions.HTTPError as error:
        reason = type(getattr(error, "reason", None) or error).__name__
        fix = (
            "start the cluster or its VPN, or use another context: kubectl config use-context NAME"
        )
        yield Finding("cluster", "problem", f"{host}: no response ({reason})", fix)
        return
    found = f"Kubernetes {version} at {host}, namespace {namespace}"
    if KUBERNETES.is_below(version):
        found += f"; expected {KUBERNETES.version} or newer, for {KUBERNETES.reason}"
        yield Finding("cluster", "problem", found, "upgrade it, or use another cluster")
        return
    yield Finding("cluster", "ok", found)
    served = _served_resources(client)
    yield check_operators(client, served, backend)
    yield check_permissions(client, namespace, served, inside)
    yield from check_quota(client, namespace)


def check_quota(client: Any, namespace: str) -> Iterator[Finding]:
    """Check that a quota of the namespace admits Kubeflow's own containers in the steps' pods.

    They have no requests and limits as Kubeflow is installed; nothing without such a quota.
    """
    from kubernetes.client import ApiException

    try:
        quotas, ranges = (
            _get(client, f"/api/v1/namespaces/{namespace}/{kind}")["items"]
            for kind in ("resourcequotas", "limitranges")
        )
    except ApiException as error:
        found = f"quotas of {namespace} cannot be read (HTTP {error.status})"
        yield Finding("quota", "skipped", found)
        return
    counted = {name for quota in quotas for name in quota["spec"].get("hard") or ()}
    counted = {f"requests.{name}" if name in _COUNTED else name for name in counted}
    given: set[str] = set()
    for limits in (one for each in ranges for one in each["spec"]["limits"]):
        if limits["type"] == "Container":
            given |= {f"limits.{name}" for name in limits.get("default") or ()}
            requests = {**(limits.get("default") or {}), **(limits.get("defaultRequest") or {})}
            given |= {f"requests.{name}" for name in requests}
    lacking = sorted(
        (counted & {f"{k}.{n}" for k in ("requests", "limits") for n in _COUNTED}) - given
    )
    if lacking:
        names = ", ".join(quota["metadata"]["name"] for quota in quotas)
        yield Finding(
            "quota",
            "warning",
            f"quota {names} of {namespace} counts {', '.join(lacking)}, for which no LimitRange has a "
            "default: it refuses Kubeflow's own containers in the steps' pods (init, wait), unless "
            "they were given requests and limits",
            "add a LimitRange with default and defaultRequest, or set executor.resources of Kubeflow's "
            "workflow-controller-configmap",
        )


def _get(client: Any, path: str) -> Any:
    """Get the JSON at a path."""
    from components.jobs.client import reading

    return reading(client, path)(_request_timeout=_TIMEOUT)


def _served_resources(client: Any) -> set[str]:
    """Return the resources of training jobs that this cluster serves."""
    from kubernetes.client import ApiException

    from components.jobs.states import KINDS

    found: set[str] = set()
    for group, version in {(kind.group, kind.version) for kind in KINDS.values()}:
        try:
            answer = _get(client, f"/apis/{group}/{version}")
        except ApiException as error:
            if error.status != 404:
                raise
        else:
            found |= {f"{resource['name']}.{group}" for resource in answer["resources"]}
    return found


def _outdated(client: Any, kind: Kind) -> list[str]:
    """Return the fields of a job's spec that the cluster's schema of its kind lacks.

    [] also without a schema: OpenAPI v3 can be switched off.
    """
    from kubernetes.client import ApiException

    try:
        document = _get(client, f"/openapi/v3/apis/{kind.group}/{kind.version}")
    except ApiException:
        return []
    schemas = (document.get("components") or {}).get("schemas") or {}
    for schema in schemas.values():
        kinds = {one.get("kind") for one in schema.get("x-kubernetes-group-version-kind") or ()}
        if kind.kind in kinds:
            spec = schema.get("properties", {}).get("spec", {})
            lacking = [_first_unknown(spec, name.split(".")) for name in kind.newest_fields]
            return [name for name in lacking if name]
    return []


def _first_unknown(schema: Any, path: list[str]) -> str:
    """Return the shortest part of a dotted path that a schema lacks; "" if it has all of it."""
    for number, name in enumerate(path):
        schema = schema.get("items") or schema  # of a list, its elements
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return ""
        if name not in (schema.get("properties") or {}):
            return ".".join(path[: number + 1])
        schema = schema["properties"][name]
    return ""


def check_operators(client: Any, served: set[str], backend: str) -> Finding:
    """Check that the cluster has the operator that a recipe needs, and a new enough one."""
    from components.jobs.states import KINDS

    available = [name for name, kind in KINDS.items() if f"{kind.plural}.{kind.group}" in served]
    if backend in KINDS and backend not in available:
        other = f", or --set cluster.backend={available[0]}" if available else ""
        return Finding(
            "operators",
            "problem",
            f"this cluster has no {KINDS[backend].kind}",
            f"install {KINDS[backend].operator}{other}",
        )
    if not available:
        fix = f"install {' or '.join(kind.operator for kind in KINDS.values())}"
        found = f"this cluster has neither {' nor '.join(kind.kind for kind in KINDS.values())}"
        return Finding("operators", "problem", found, fix)
    for name in [backend] if backend in KINDS else available:
        if lacking := _outdated(client, KINDS[name]):
            return Finding(
                "operators",
                "problem" if name == backend else "warning",
                f"{KINDS[name].kind} of this cluster has no {' and no '.join(lacking)}",
                f"install {KINDS[name].operator} or newer, with its CRDs",
            )
    return Finding(
        "operators",
        "ok",
        f"{', '.join(KINDS[name].kind for name in available)}: "
        f"cluster.backend={' or '.join(available)}",
    )


def check_permissions(client: Any, namespace: str, served: set[str], inside: bool) -> Finding:
    """Ask the API server whether this account has every permission of the chart's Role.

    Args:
        served: resources of training jobs that the cluster serves.
        inside: this process runs in a pod.
    """
    from kubernetes import client as kubernetes

    reviews, refused = kubernetes.AuthorizationV1Api(client), []
    for group, resources in PERMISSIONS.items():
        for resource, verbs in resources.items():
            name = f"{resource}.{group}" if group else resource
            if "kubeflow.org" in group and name not in served:
                continue  # a missing operator is a finding already
            plural, _, sub = resource.partition("/")
            denied = [
                verb
                for verb in verbs
                if not _is_allowed(reviews, namespace, group, plural, sub, verb)
            ]
            refused += [f"{', '.join(denied)} {name}"] if denied else []
    if not refused:
        return Finding(
            "permissions",
            "ok",
            f"this account has the permissions of the chart's Role in {namespace}",
        )
    found = f"this account may not {'; '.join(refused)} in {namespace}"
    chart = "helm upgrade --install canvastune charts/canvastune"
    chart += f" -n {namespace} (permissions.create=true"
    if inside:
        return Finding(
            "permissions",
            "problem",
            found,
            f"{chart}, permissions.serviceAccount names this pod's account)",
        )
    # A person who submits starts no job: the pipeline's service account does.
    fix = f"not needed for canvastune submit; for jobs that are started from here: {chart})"
    return Finding("permissions", "warning", found, fix)


def _is_allowed(
    reviews: Any, namespace: str, group: str, resource: str, subresource: str, verb: str
) -> bool:
    attributes = {
        "namespace": namespace,
        "group": group,
        "resource": resource,
        "subresource": subresource,
        "verb": verb,
    }
    review = {"spec": {"resourceAttributes": attributes}}
    return bool(
        reviews.create_self_subject_access_review(review, _request_timeout=_TIMEOUT).status.allowed
    )


def check_kubeflow(kubeflow: KubeflowClient | None) -> Iterator[Finding]:
    """Check Kubeflow Pipelines. None: no address was given.

    The namespace counts only if Kubeflow has profiles; else it is for the other checks.
    """
    if kubeflow is None:
        yield Finding("kubeflow", "skipped", "no --host was given")
        return
    try:
        health = kubeflow.health()
        namespace = kubeflow.namespace if health.get("multi_user") is True else None
        replace(kubeflow, namespace=namespace).create_kfp_client()
    except UserError as error:
        yield Finding("kubeflow", "problem", str(error), error.hint or "see the message")
    else:
        version = health["tag_name"] or "of an unknown version"
        found = f"Kubeflow Pipelines {version} responds at {kubeflow.host}"
        if RESTRICTED_STEPS.is_below(version):
            found += (
                f"; where PodSecurity restricted is enforced, {RESTRICTED_STEPS.version} is needed"
            )
        yield Finding("kubeflow", "ok", found)

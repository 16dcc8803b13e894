"""The doctor's look at a cluster: only where an account for one is at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.doctor.finding import Finding

# What the chart's Role grants, by API group: resources and verbs. A test holds it to the chart.
_JOB = ("create", "get", "list", "watch", "patch", "delete")
PERMISSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "kubeflow.org": {"pytorchjobs": _JOB},
    "trainer.kubeflow.org": {"trainjobs": _JOB, "trainingruntimes": ("get", "list")},
    "": {"pods": ("get", "list", "watch"), "pods/log": ("get", "list", "watch"), "events": ("list",)},
    "argoproj.io": {"workflows": ("get",)},
}
_TIMEOUT = (5, 10)  # seconds to connect, and to read


def cluster(namespace: str | None, backend: str) -> Iterator[Finding]:
    """The API server, the operators of training jobs, and the permissions of the account at hand.

    Args:
        namespace: None: that of the pod, or of the kubeconfig's context.
        backend: the recipe's cluster.backend.
    """
    inside = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    files = [Path(name).expanduser() for name in (os.environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep) if name]
    if not inside and not any(file.is_file() for file in files):
        if backend != "local":
            cure = "none is needed for canvastune submit; else put a kubeconfig there, or name it in KUBECONFIG"
            yield Finding("cluster", "warning", f"cluster.backend={backend}, and no account for a cluster is here ({files[0]})", cure)
        else:
            yield Finding("cluster", "skipped", f"no account for a cluster is here ({files[0]})")
        return
    import urllib3
    from kubernetes import client as kubernetes

    from components.jobs.client import connect_to_cluster

    client, own = connect_to_cluster()
    host, namespace = client.configuration.host, namespace or own
    try:
        version = _get(client, "/version")["gitVersion"]
    except kubernetes.ApiException as error:
        cure = "get a new token, or log in again" if error.status == 401 else "ask whoever runs the cluster"
        yield Finding("cluster", "problem", f"{host} answers {error.status}: {error.reason}", cure)
        return
    except urllib3.exceptions.HTTPError as error:
        reason = type(getattr(error, "reason", None) or error).__name__
        cure = "start the cluster, or its VPN; or choose another context: kubectl config use-context NAME"
        yield Finding("cluster", "problem", f"{host}: nobody answers there ({reason})", cure)
        return
    yield Finding("cluster", "ok", f"Kubernetes {version} at {host}, namespace {namespace}")
    served = _served(client)
    yield _operators(served, backend)
    yield _permissions(client, namespace, served, inside)


def _get(client: Any, path: str) -> Any:
    """The JSON at a path; the client's own classes refuse answers of servers that are older or newer than it."""
    how = {"response_type": "object", "auth_settings": ["BearerToken"], "_return_http_data_only": True, "_request_timeout": _TIMEOUT}
    return client.call_api(path, "GET", **how)


def _served(client: Any) -> set[str]:
    """Resources of PERMISSIONS' groups that this cluster has; a group that it lacks has none."""
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


def _operators(served: set[str], backend: str) -> Finding:
    from components.jobs.states import KINDS

    there = [name for name, kind in KINDS.items() if f"{kind.plural}.{kind.group}" in served]
    if backend in KINDS and backend not in there:
        other = f", or --set cluster.backend={there[0]}" if there else ""
        return Finding("operators", "problem", f"no {KINDS[backend].kind} here", f"install {KINDS[backend].operator}{other}")
    if not there:
        cure = f"install {' or '.join(kind.operator for kind in KINDS.values())}"
        return Finding("operators", "problem", f"neither {' nor '.join(kind.kind for kind in KINDS.values())} here", cure)
    return Finding("operators", "ok", f"{', '.join(KINDS[name].kind for name in there)}: cluster.backend={' or '.join(there)}")


def _permissions(client: Any, namespace: str, served: set[str], inside: bool) -> Finding:
    """Every verb of the chart's Role, asked of the API server for the account at hand."""
    from kubernetes import client as kubernetes

    reviews, refused = kubernetes.AuthorizationV1Api(client), []
    for group, resources in PERMISSIONS.items():
        for resource, verbs in resources.items():
            name = f"{resource}.{group}" if group else resource
            if "kubeflow.org" in group and name not in served:
                continue  # an operator that is not there: said above
            plural, _, sub = resource.partition("/")
            denied = [verb for verb in verbs if not _may(reviews, namespace, group, plural, sub, verb)]
            refused += [f"{', '.join(denied)} {name}"] if denied else []
    if not refused:
        return Finding("permissions", "ok", f"this account may do in {namespace} what the chart's Role grants")
    found = f"this account may not {'; '.join(refused)} in {namespace}"
    chart = f"helm upgrade --install canvastune charts/canvastune -n {namespace} (permissions.create=true"
    if inside:
        return Finding("permissions", "problem", found, f"{chart}, permissions.serviceAccount names this pod's account)")
    # A person who submits runs no job: the pipeline's own account does.
    return Finding("permissions", "warning", found, f"no matter for canvastune submit; for jobs made from here: {chart})")


def _may(reviews: Any, namespace: str, group: str, resource: str, subresource: str, verb: str) -> bool:
    from kubernetes import client as kubernetes

    attributes = {"namespace": namespace, "group": group, "resource": resource, "subresource": subresource, "verb": verb}
    spec = kubernetes.V1SelfSubjectAccessReviewSpec(resource_attributes=kubernetes.V1ResourceAttributes(**attributes))
    review = kubernetes.V1SelfSubjectAccessReview(spec=spec)
    return bool(reviews.create_self_subject_access_review(review, _request_timeout=_TIMEOUT).status.allowed)


def kubeflow(host: str | None, namespace: str | None, token_file: Path | None) -> Iterator[Finding]:
    """Kubeflow Pipelines, if an address is given.

    Args:
        namespace: a profile's; where Kubeflow has none, it is that of the checks above alone.
    """
    if host is None:
        yield Finding("kubeflow", "skipped", "no --host was given")
        return
    from canvastune.errors import UserError
    from pipelines.kfp_client import KubeflowClient

    try:
        server = KubeflowClient(host.partition("/#")[0].rstrip("/"), None, token_file)
        replace(server, namespace=namespace if server.has_profiles() else None).connect()
    except UserError as error:
        yield Finding("kubeflow", "problem", str(error), "mend it as the message says")
    else:
        yield Finding("kubeflow", "ok", f"Kubeflow Pipelines answers at {host}")

"""Namespaces, quotas and other objects that a cluster's people and controllers make."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tests.support.api_server import ApiServer
from tests.support.every_pod import RESTRICTED

ACCOUNT = "pipeline-runner"
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


def make_namespace(server: ApiServer, name: str, level: str = "restricted") -> None:
    """Create a namespace with a level of PodSecurity, and the accounts that controllers make."""
    labels = {"pod-security.kubernetes.io/enforce": level}
    server.must_create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    )
    for account in ("default", ACCOUNT, "default-editor"):
        server.must_create(object_of("v1", "ServiceAccount", account), name)


def add_quota(server: ApiServer, namespace: str, hard: Mapping[str, str]) -> None:
    """Create a ResourceQuota with the status that its controller would set."""
    quota = {**object_of("v1", "ResourceQuota", "team-quota"), "spec": {"hard": hard}}
    server.must_create(quota, namespace)
    server.set_status(quota, namespace, hard=hard, used=dict.fromkeys(hard, "0"))
    # the server caches quotas of a namespace
    deadline = time.monotonic() + 30
    probe = {**object_of("v1", "Pod", "probe"), "spec": _probe_spec()}
    while time.monotonic() < deadline:
        _, answer = server.create(probe, namespace, dry_run=True)
        if "status unknown for quota" not in str(answer.get("message")):
            return
        time.sleep(0.5)
    raise AssertionError(f"namespace {namespace}: the server does not see the quota's status")


def add_limit_range(server: ApiServer, namespace: str, limit: Mapping[str, Any]) -> None:
    """Create a LimitRange, and wait until the server applies it."""
    document = {**object_of("v1", "LimitRange", "team-limits"), "spec": {"limits": [limit]}}
    server.must_create(document, namespace)
    time.sleep(1)  # the plug-in's informer


def delete_namespace(server: ApiServer, namespace: str) -> None:
    server.call("DELETE", f"/api/v1/namespaces/{namespace}")
    time.sleep(1)  # the plug-in's informer


def object_of(
    version: str, kind: str, name: str, owner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if owner is not None:
        metadata["ownerReferences"] = [owner_of(owner)]
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def owner_of(one: Mapping[str, Any]) -> dict[str, Any]:
    names = {key: one["metadata"][key] for key in ("name", "uid")}
    return {key: one[key] for key in ("apiVersion", "kind")} | names | {"controller": True}


def refusal_of(server: ApiServer, namespace: str, spec: Mapping[str, Any]) -> Any | None:
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
        "securityContext": RESTRICTED,
    }
    return {"containers": [container]}

"""Check that the namespace has what a job needs before the job is created, where RBAC allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from canvastune.config import RunConfig
from canvastune.errors import UserError
from components.jobs.client import KubernetesClient
from components.jobs.pod_spec import RUN_ID
from components.jobs.states import Object
from components.versions import KUBERNETES


def check_prerequisites(api: KubernetesClient, config: RunConfig, job: Mapping[str, Any]) -> None:
    """Check the permissions, claims, secrets and training runtime that a job needs.

    Raises:
        UserError: one is missing or contradicts the config.
    """
    cluster, version = config.cluster, api.server_version()
    if KUBERNETES.is_below(version):
        raise UserError(
            f"cluster.backend: found Kubernetes {version}, expected {KUBERNETES.version} or newer, "
            f"for {KUBERNETES.reason}",
            hint="Upgrade the cluster, or use another one.",
        )
    api.pods(f"{RUN_ID}={job['metadata']['labels'][RUN_ID]}")
    for read in (api.events, api.log):
        read("none")  # reports a missing permission now, not when the job runs
    for claim in sorted(set(_values(job, "claimName"))):
        if api.find("persistentvolumeclaims", claim) is None:
            raise UserError(
                f"cluster.claim: no claim {claim} in namespace {api.namespace}",
                hint="Create it, or correct cluster.claim (the chart creates one).",
            )
    sources = [source for source in _values(job, "secretKeyRef") if not source.get("optional")]
    keys = {(source["name"], source["key"]) for source in sources}
    names = (*cluster.pull_secrets, *filter(None, [cluster.credentials]))
    for secret, key in sorted(keys | {(name, "") for name in names}):
        found = api.find("secrets", secret)
        if found is None:
            raise UserError(
                f"cluster: no secret {secret} in namespace {api.namespace}",
                hint="Create it, or correct cluster.secret_env, credentials or pull_secrets.",
            )
        if key and isinstance(found, Mapping) and key not in (found.get("data") or {}):
            existing = ", ".join(sorted(found.get("data") or {})) or "none"
            raise UserError(
                f"cluster: secret {secret} has no key {key}; its keys: {existing}",
                hint="Name one of those, or add the key.",
            )
    if cluster.backend == "trainjob" and cluster.runtime:
        _check_runtime(api, config, cluster.runtime)


def _check_runtime(api: KubernetesClient, config: RunConfig, name: str) -> None:
    runtime = api.find("trainingruntimes", name)
    if runtime is None:
        raise UserError(
            f"cluster.runtime: no TrainingRuntime {name} in namespace {api.namespace}",
            hint="Install the chart with training.backend=trainjob: it creates the runtime.",
        )
    if not isinstance(runtime, Mapping):
        return
    cluster, pod = config.cluster, _pod_spec(runtime)
    expected = {"schedulerName": ("scheduler", cluster.scheduler)}
    if not cluster.queue:
        expected["priorityClassName"] = ("priority_class", cluster.priority_class)
    for field, (key, wanted) in expected.items():
        if wanted is not None and pod.get(field) != wanted:
            raise UserError(
                f"cluster.{key}: found {wanted}, but TrainingRuntime {name} has {pod.get(field)}",
                hint=f"Set {field} in the TrainingRuntime: a TrainJob takes it from there.",
            )


def _pod_spec(runtime: Object) -> Mapping[str, Any]:
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return next(
        (job["template"]["spec"]["template"]["spec"] for job in jobs if job["name"] == "node"), {}
    )


def _values(tree: Any, key: str) -> list[Any]:
    """Return every value under a key, anywhere in a manifest."""
    if isinstance(tree, Mapping):
        own = [tree[key]] if key in tree else []
        return own + [value for branch in tree.values() for value in _values(branch, key)]
    return (
        [value for branch in tree for value in _values(branch, key)]
        if isinstance(tree, list)
        else []
    )

"""What a job needs of its namespace, looked for before the job is made: where this pod may look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from canvastune.config import RunConfig
from canvastune.errors import UserError
from components.jobs.client import KubernetesClient
from components.jobs.pod_spec import RUN_ID
from components.jobs.states import Object


def refuse_missing(api: KubernetesClient, config: RunConfig, job: Mapping[str, Any]) -> None:
    """Look for the claims, the secrets and the training runtime that a job names.

    Raises:
        UserError: one is not there, or contradicts the config.
    """
    cluster = config.cluster
    api.pods(f"{RUN_ID}={job['metadata']['labels'][RUN_ID]}")
    for ask in (api.events, api.log):
        ask("none")  # a permission that is missing is said now, not when the job runs
    for claim in sorted(set(_values(job, "claimName"))):
        if api.exists("persistentvolumeclaims", claim) is None:
            raise UserError(f"claim {claim} is not in namespace {api.namespace}: create it, or correct cluster.claim (the chart makes one)")
    keys = {(source["name"], source["key"]) for source in _values(job, "secretKeyRef") if not source.get("optional")}
    for secret, key in sorted(keys | {(name, "") for name in (*cluster.pull_secrets, *filter(None, [cluster.credentials]))}):
        found = api.exists("secrets", secret)
        if found is None:
            keys_of = "cluster.secret_env, credentials or pull_secrets"
            raise UserError(f"secret {secret} is not in namespace {api.namespace}: create it, or correct {keys_of}")
        if key and isinstance(found, Mapping) and key not in (found.get("data") or {}):
            there = ", ".join(sorted(found.get("data") or {})) or "none"
            raise UserError(f"secret {secret} has no key {key}: it has {there}. Name one of those, or add it")
    if cluster.backend == "trainjob" and cluster.runtime:
        _check_runtime(api, config, cluster.runtime)


def _check_runtime(api: KubernetesClient, config: RunConfig, name: str) -> None:
    runtime = api.exists("trainingruntimes", name)
    if runtime is None:
        raise UserError(
            f"TrainingRuntime {name} is not in namespace {api.namespace}: set training.backend=trainjob in the chart, which makes it"
        )
    if not isinstance(runtime, Mapping):
        return
    cluster, pod = config.cluster, _node(runtime)
    set_there = {"schedulerName": ("scheduler", cluster.scheduler)}
    if not cluster.queue:
        set_there["priorityClassName"] = ("priority_class", cluster.priority_class)
    for field, (key, wanted) in set_there.items():
        if wanted is not None and pod.get(field) != wanted:
            raise UserError(
                f"cluster.{key} is {wanted}, and TrainingRuntime {name} has {pod.get(field)}: set the same "
                "there, since a TrainJob takes it from there"
            )


def _node(runtime: Object) -> Mapping[str, Any]:
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return next((job["template"]["spec"]["template"]["spec"] for job in jobs if job["name"] == "node"), {})


def _values(tree: Any, key: str) -> list[Any]:
    """Every value under a key, anywhere in a manifest."""
    if isinstance(tree, Mapping):
        own = [tree[key]] if key in tree else []
        return own + [value for branch in tree.values() for value in _values(branch, key)]
    return [value for branch in tree for value in _values(branch, key)] if isinstance(tree, list) else []

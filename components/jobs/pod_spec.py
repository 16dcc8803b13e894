"""The parts of a job's pod that a PyTorchJob and a TrainJob share; PodSecurity `restricted` holds for all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from canvastune.config import RunConfig
from canvastune.config.cluster import ClusterConfig
from canvastune.errors import UserError

RUN_ID, ROLE = "canvastune.io/run-id", "app.kubernetes.io/component"
CREDENTIALS = ("HF_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # keys of a secret
_GRACE = 30  # seconds beyond the ranks' own in which torchrun and the container end
FIRST_RANK, RANK_MARK = "[rank 0]:", "[rank ${rank}]:"  # what torchrun puts before a line that a rank says
_SCRATCH = (("shm", "/dev/shm"), ("tmp", "/tmp"))


@dataclass(frozen=True)
class PodParts:
    """Fragments of a pod's manifest."""

    metadata: dict[str, Any]
    pod: dict[str, Any]
    container: dict[str, Any]  # without name, image, command
    env: list[dict[str, Any]]
    resources: dict[str, Any]


def labels_of(config: RunConfig, run_id: str, role: str) -> dict[str, str]:
    """Labels of a job of a run, and of its pods."""
    return {
        "app.kubernetes.io/name": "canvastune",
        ROLE: role,
        "canvastune.io/recipe": config.name,
        RUN_ID: run_label(run_id),
    }


def run_label(run_id: str) -> str:
    """A run's id as a label's value: itself where it can be one."""
    fits = re.fullmatch("[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", run_id)
    return run_id if fits else hashlib.sha256(run_id.encode()).hexdigest()[:40]


def pod_parts(
    config: RunConfig, labels: Mapping[str, str], output: PurePath, environment: Mapping[str, str], task: Mapping[str, Any]
) -> PodParts:
    """The fragments for one job.

    Args:
        labels: those of `labels_of`.
        output: a path that the pods must see: the run's folder.
        environment: variables with the run's own values.
        task: what was set on the pipeline's task, see `manifest`.

    Raises:
        UserError: as `manifest`.
    """
    cluster = config.cluster
    volumes, mounts = _claims(cluster, task)
    home = _mount_of(output, mounts)
    volumes += [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shm}}, {"name": "tmp", "emptyDir": {}}]
    mounts += [{"name": name, "mountPath": path} for name, path in _SCRATCH]
    pod: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            **({} if cluster.fs_group is None else {"fsGroup": cluster.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": config.train.stop_grace + _GRACE,
        "tolerations": _tolerations(cluster) + list(task.get("tolerations") or ()),
        "volumes": volumes,
    }
    optional = {
        "nodeSelector": {**cluster.node_selector, **(task.get("node_selector") or {})},
        "affinity": task.get("affinity"),
        "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
        "serviceAccountName": cluster.service_account,
    }
    container = {
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    no_sidecar = {"sidecar.istio.io/inject": "false"}  # it would keep a finished pod alive
    return PodParts(
        metadata={"labels": {**labels, **no_sidecar}, "annotations": no_sidecar},
        pod=pod | {key: value for key, value in optional.items() if value},
        container=container,
        env=_env(config, home, environment, task),
        resources=_resources(config, task),
    )


def _claims(cluster: ClusterConfig, task: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and mounts of the task, and the claim with the workspace, which the task may have mounted or the config may name."""
    volumes, mounts = list(task.get("volumes") or ()), list(task.get("volume_mounts") or ())
    claim = cluster.claim
    for mount in [mount for mount in mounts if PurePath(mount["mountPath"]) == PurePath(cluster.mount_path)]:
        volume = next(volume for volume in volumes if volume["name"] == mount["name"])
        mounted = volume.get("persistentVolumeClaim", {}).get("claimName")
        if mounted is None or (claim is not None and mounted != claim):
            raise UserError(
                f"the train step has {mounted or volume} at {cluster.mount_path}, and cluster.claim is {claim}: "
                "give the same claim in both places, or leave cluster.claim out"
            )
        claim = mounted
        mounts.remove(mount)
        if not any(other["name"] == volume["name"] for other in mounts):
            volumes.remove(volume)
    if claim is not None:  # under the name that the chart's TrainingRuntime gives it: a TrainJob's patch then replaces that one
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "workspace", "mountPath": cluster.mount_path})
    return volumes, mounts


def _mount_of(path: PurePath, mounts: list[dict[str, Any]]) -> str:
    """Where the volume is mounted on which the pods see a path."""
    for mount in mounts:
        if path.is_relative_to(mount["mountPath"]):
            return str(mount["mountPath"])
    seen = ", ".join(str(mount["mountPath"]) for mount in mounts) or "no volume"
    raise UserError(
        f"the training pods would not see {path}: they mount {seen}. Mount the claim with the workspace in the train step, or give "
        "cluster.claim and cluster.mount_path"
    )


def _tolerations(cluster: ClusterConfig) -> list[dict[str, Any]]:
    given = [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations]
    own = {"key": cluster.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    return given if not cluster.gpu_resource or own in given else [own, *given]


def _env(config: RunConfig, home: str, environment: Mapping[str, str], task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Later ones win: the task's that may be absent, our defaults, the run's own, the config's, the task's."""
    cluster = config.cluster
    values = {
        "HF_HOME": f"{home}/huggingface",  # one download for all pods and attempts
        "HOME": "/tmp",
        "NCCL_DEBUG": "WARN",
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": RANK_MARK + " ",
        "TQDM_DISABLE": "1",
        **environment,
        **cluster.env,
    }
    passed = {entry["name"]: dict(entry) for entry in task.get("env") or ()}
    named = {name: entry for name, entry in passed.items() if _may_be_absent(entry)}
    named |= {name: {"name": name, "value": value} for name, value in values.items()}
    if cluster.credentials:
        for name in CREDENTIALS:
            named[name] = {"name": name, "valueFrom": {"secretKeyRef": {"name": cluster.credentials, "key": name, "optional": True}}}
    for name, source in cluster.secret_env.items():
        named[name] = {"name": name, "valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}
    return list((named | {name: entry for name, entry in passed.items() if not _may_be_absent(entry)}).values())


def _may_be_absent(variable: Mapping[str, Any]) -> bool:
    return bool(((variable.get("valueFrom") or {}).get("secretKeyRef") or {}).get("optional"))


def _resources(config: RunConfig, task: Mapping[str, Any]) -> dict[str, Any]:
    """Accelerators and devices are limits (and requests); memory is both; CPU is a request, so that idle cores can be used."""
    cluster = config.cluster
    devices = {cluster.gpu_resource: str(config.parallel.nproc_per_node)} if cluster.gpu_resource else {}
    if cluster.rdma_resource:
        devices[cluster.rdma_resource] = str(cluster.rdma_count)
    memory = {"memory": cluster.memory} if cluster.memory else {}
    given = task.get("resources") or {}
    limits = {**devices, **memory, **(given.get("limits") or {})}
    if cluster.gpu_resource and str(limits[cluster.gpu_resource]) != devices[cluster.gpu_resource]:
        raise UserError(
            f"the train step asks for {limits[cluster.gpu_resource]} {cluster.gpu_resource}, and parallel.nproc_per_node is "
            f"{config.parallel.nproc_per_node}: give the same number in both places"
        )
    requests = {**({"cpu": cluster.cpu} if cluster.cpu else {}), **devices, **memory, **(given.get("requests") or {})}
    return {name: value for name, value in {"limits": limits, "requests": requests}.items() if value}

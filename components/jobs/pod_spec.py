"""The parts of a pod that PyTorchJobs and TrainJobs share, within PodSecurity `restricted`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from canvastune.config import RunConfig
from canvastune.config.cluster import CA_PATH, ClusterConfig
from canvastune.errors import UserError

STEP_ONLY = "CANVASTUNE_STEP_ONLY"  # variable with what a task has for the launcher's pod only
RUN_ID, ROLE = "canvastune.io/run-id", "app.kubernetes.io/component"
CREDENTIALS = (  # keys of a secret
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
# Autoscalers remove nodes that are little used, such as those of CPU steps, with their pods.
KEEP_NODE = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
FIRST_RANK, RANK_PREFIX = "[rank 0]:", "[rank ${rank}]:"  # torchrun's prefix of a rank's lines
_SHUTDOWN_SECONDS = 30  # for torchrun and the container, after the ranks' own grace period
_CA_VOLUME = "ca-bundle"
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
    """Return the labels of a run's job and of its pods."""
    return {
        "app.kubernetes.io/name": "canvastune",
        ROLE: role,
        "canvastune.io/recipe": config.name,
        RUN_ID: run_label(run_id),
    }


def run_label(run_id: str) -> str:
    """Return a run's id as a label value: the id if it is a valid one, else its hash."""
    fits = re.fullmatch("[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", run_id)
    return run_id if fits else hashlib.sha256(run_id.encode()).hexdigest()[:40]


def pod_parts(
    config: RunConfig,
    labels: Mapping[str, str],
    output: PurePath,
    environment: Mapping[str, str],
    task: Mapping[str, Any],
) -> PodParts:
    """Return the fragments for one job.

    Args:
        labels: those of `labels_of`.
        output: a path that the pods must see: the run's directory.
        environment: variables of this run.
        task: settings of the pipeline's task, see `manifest`.

    Raises:
        UserError: as `manifest`.
    """
    cluster, task = config.cluster, _without_step_settings(task)
    volumes, mounts = _claims(cluster, task)
    workspace = _mount_path(output, mounts)
    volumes += [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shm}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts += [{"name": name, "mountPath": path} for name, path in _SCRATCH]
    volumes += map(dict, cluster.extra_volumes)
    mounts += map(dict, cluster.extra_volume_mounts)
    if bundle := cluster.ca_bundle:
        source: dict[str, Any] = {"configMap": {"name": bundle.config_map}}
        if bundle.secret:
            source = {"secret": {"secretName": bundle.secret}}
        volumes.append({"name": _CA_VOLUME, **source})
        mounts.append({"name": _CA_VOLUME, "mountPath": CA_PATH, "readOnly": True})
    _refuse_twice(volumes, mounts)
    pod: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            **(
                {}
                if cluster.fs_group is None
                else {"fsGroup": cluster.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
            ),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": config.train.stop_grace + _SHUTDOWN_SECONDS,
        "tolerations": _tolerations(cluster) + list(task.get("tolerations") or ()),
        "volumes": volumes,
    }
    optional = {
        "nodeSelector": {**cluster.node_selector, **(task.get("node_selector") or {})},
        "affinity": {**cluster.affinity, **(task.get("affinity") or {})},
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
    no_sidecar = {"sidecar.istio.io/inject": "false"}  # a sidecar would keep a finished pod alive
    annotations = {**no_sidecar, **KEEP_NODE}
    return PodParts(
        metadata={"labels": {**labels, **no_sidecar}, "annotations": annotations},
        pod=pod | {key: value for key, value in optional.items() if value},
        container=container,
        env=_env(config, workspace, environment, task),
        resources=_resources(config, task),
    )


def _without_step_settings(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Remove from a task's settings those that the section `steps` gave the launcher's own pod."""
    variables = [dict(entry) for entry in task.get("env") or ()]
    marks = [entry.get("value") for entry in variables if entry["name"] == STEP_ONLY]
    if not marks:
        return task
    step_only = json.loads(marks[0] or "{}")
    mounts = [
        m for m in task.get("volume_mounts") or () if m["mountPath"] not in step_only["mounts"]
    ]
    mounted = {mount["name"] for mount in mounts}
    placed = ("resources", "tolerations", "node_selector", "affinity")
    return {
        **{key: value for key, value in task.items() if key not in placed},
        "env": [e for e in variables if e["name"] not in (STEP_ONLY, *step_only["env"])],
        "volume_mounts": mounts,
        "volumes": [v for v in task.get("volumes") or () if v["name"] in mounted],
    }


def _claims(
    cluster: ClusterConfig, task: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return volumes and mounts: the task's, and the workspace claim of the task or the config."""
    volumes, mounts = list(task.get("volumes") or ()), list(task.get("volume_mounts") or ())
    claim = cluster.claim
    for mount in [
        mount for mount in mounts if PurePath(mount["mountPath"]) == PurePath(cluster.mount_path)
    ]:
        volume = next(volume for volume in volumes if volume["name"] == mount["name"])
        mounted = volume.get("persistentVolumeClaim", {}).get("claimName")
        if mounted is None or (claim is not None and mounted != claim):
            raise UserError(
                f"cluster.claim: found {claim}, but the train step mounts {mounted or volume} at "
                f"{cluster.mount_path}",
                hint="Use the same claim in both places, or remove cluster.claim.",
            )
        if (mount.get("subPath") or None) != cluster.sub_path:
            raise UserError(
                f"cluster.sub_path: found {cluster.sub_path}, but the train step mounts "
                f"{mount.get('subPath') or 'all'} of the claim",
                hint="Use the same in both places: upload the pipeline with these settings.",
            )
        claim = mounted
        mounts.remove(mount)
        if not any(other["name"] == volume["name"] for other in mounts):
            volumes.remove(volume)
    if claim is not None:  # named as in the chart's TrainingRuntime, so that a TrainJob replaces it
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": claim}})
        mount = {"name": "workspace", "mountPath": cluster.mount_path}
        mounts.append(mount | ({"subPath": cluster.sub_path} if cluster.sub_path else {}))
    return volumes, mounts


def _refuse_twice(volumes: list[dict[str, Any]], mounts: list[dict[str, Any]]) -> None:
    """Refuse two volumes of one name, and two mounts at one path: the API server would."""
    for key, entries in (("name", volumes), ("mountPath", mounts)):
        seen = set()
        for entry in entries:
            if entry[key] in seen:
                raise UserError(
                    f"cluster.extra_{'volumes' if key == 'name' else 'volume_mounts'}: "
                    f"{entry[key]} is used twice",
                    hint="Use another one.",
                )
            seen.add(entry[key])


def _mount_path(path: PurePath, mounts: list[dict[str, Any]]) -> str:
    """Return the mount path of the volume on which the pods see a path."""
    for mount in mounts:
        if path.is_relative_to(mount["mountPath"]):
            return str(mount["mountPath"])
    paths = ", ".join(str(mount["mountPath"]) for mount in mounts) or "no volume"
    raise UserError(
        f"the training pods would not see {path}: they mount {paths}",
        hint="Mount the workspace's claim in the train step, or set cluster.claim and "
        "cluster.mount_path.",
    )


def _tolerations(cluster: ClusterConfig) -> list[dict[str, Any]]:
    given = [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations]
    own = {"key": cluster.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    return given if not cluster.gpu_resource or own in given else [own, *given]


def _env(
    config: RunConfig, workspace: str, environment: Mapping[str, str], task: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Merge variables; later ones win: the task's optional ones, defaults, run, config, task."""
    cluster = config.cluster
    values = {
        "HF_HOME": f"{workspace}/huggingface",  # one download for all pods and attempts
        **cluster.ca_env(),
        "HOME": "/tmp",
        "NCCL_DEBUG": "WARN",
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": RANK_PREFIX + " ",
        "TQDM_DISABLE": "1",
        **environment,
        **cluster.env,
    }
    of_task = {entry["name"]: dict(entry) for entry in task.get("env") or ()}
    merged = {name: entry for name, entry in of_task.items() if _is_optional(entry)}
    merged |= {name: {"name": name, "value": value} for name, value in values.items()}
    if cluster.credentials:
        for name in CREDENTIALS:
            merged[name] = _secret_env(name, cluster.credentials, name, optional=True)
    for name, source in cluster.secret_env.items():
        merged[name] = _secret_env(name, source.secret, source.key)
    merged |= {name: entry for name, entry in of_task.items() if not _is_optional(entry)}
    return list(merged.values())


def _secret_env(name: str, secret: str, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _is_optional(variable: Mapping[str, Any]) -> bool:
    return bool(((variable.get("valueFrom") or {}).get("secretKeyRef") or {}).get("optional"))


def _resources(config: RunConfig, task: Mapping[str, Any]) -> dict[str, Any]:
    """Return devices and memory as limits and requests; CPU as a request, to allow idle cores.

    What has only a limit gets it as the request, as in Kubernetes: older versions of Kueue count the
    default of the namespace's LimitRange instead, and admit too much (kubernetes-sigs/kueue#15020).
    """
    cluster = config.cluster
    devices = (
        {cluster.gpu_resource: str(config.parallel.nproc_per_node)} if cluster.gpu_resource else {}
    )
    if cluster.rdma_resource:
        devices[cluster.rdma_resource] = str(cluster.rdma_count)
    memory = {"memory": cluster.memory} if cluster.memory else {}
    given = task.get("resources") or {}
    limits = {**devices, **memory, **cluster.resources.limits, **(given.get("limits") or {})}
    if cluster.gpu_resource and str(limits[cluster.gpu_resource]) != devices[cluster.gpu_resource]:
        raise UserError(
            f"parallel.nproc_per_node: found {config.parallel.nproc_per_node}, but the train step "
            f"requests {limits[cluster.gpu_resource]} {cluster.gpu_resource}",
            hint="Use the same number in both places.",
        )
    requests = {
        **({"cpu": cluster.cpu} if cluster.cpu else {}),
        **devices,
        **memory,
        **cluster.resources.requests,
        **(given.get("requests") or {}),
    }
    requests |= {name: limit for name, limit in limits.items() if name not in requests}
    return {
        name: value for name, value in {"limits": limits, "requests": requests}.items() if value
    }

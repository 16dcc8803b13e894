"""The job backends: a config and a run's context as a PyTorchJob or a TrainJob, without any call."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

from canvastune.config import RunConfig
from components.jobs.pod_spec import PodParts, labels_of, pod_parts
from components.jobs.states import KINDS, PYTORCHJOB, TRAINJOB

SPEC_HASH = "canvastune.io/spec-hash"
_HOUR = 3600
_NODE = TRAINJOB.container  # also the name of a TrainingRuntime's job
_LABEL = "metadata.labels['training.kubeflow.org/{}']"  # set on every pod by the training operator
# torchrun's settings in addition to PET_NNODES and PET_NPROC_PER_NODE, which the operator sets.
_RENDEZVOUS: tuple[dict[str, Any], ...] = (
    {"name": "CANVASTUNE_JOB", "valueFrom": {"fieldRef": {"fieldPath": _LABEL.format("job-name")}}},
    {
        "name": "PET_NODE_RANK",
        "valueFrom": {"fieldRef": {"fieldPath": _LABEL.format("replica-index")}},
    },
    # the first pod's service
    {"name": "PET_MASTER_ADDR", "value": "$(CANVASTUNE_JOB)-worker-0"},
    {"name": "PET_MASTER_PORT", "value": "23456"},
)


@dataclass(frozen=True)
class JobContext:
    """What a job needs in addition to its config. Paths are those in the pods and in the steps."""

    run_id: str  # the pipeline job
    output: PurePath  # the directory that the processes write
    module: tuple[str, ...]  # run by every process: a module and its arguments
    role: Literal["train", "evaluate"] = "train"
    mlflow: tuple[str, ...] = ()  # arguments that name the MLflow run for the metrics
    environment: Mapping[str, str] = field(default_factory=dict)  # MLflow's address; no secrets
    owner: Mapping[str, Any] | None = None  # owner reference of the Argo workflow; None: unknown


def manifest(
    config: RunConfig, context: JobContext, task: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the job's manifest; the same run and spec always get the same name.

    Args:
        task: fragments of a pod spec that were set on the pipeline's task (fields of
            `dsl.TaskConfig`): resources, tolerations, node_selector, affinity, volumes,
            volume_mounts, env. They are added to the config's.

    Raises:
        UserError: the pods would not see the run's directory, or task and config contradict.
    """
    kind, cluster = KINDS[config.cluster.backend], config.cluster
    own_labels = labels_of(config, context.run_id, context.role)

    def spec(context: JobContext) -> dict[str, Any]:
        parts = pod_parts(config, own_labels, context.output, context.environment, task or {})
        return (_pytorchjob if cluster.backend == "pytorchjob" else _trainjob)(
            config, context, parts
        )

    # MLflow may be down when a step is retried: that must not change the job's name.
    spec_hash = hashlib.sha256(
        json.dumps(spec(replace(context, mlflow=(), environment={}))).encode()
    ).hexdigest()
    labels = {**own_labels, "kueue.x-k8s.io/queue-name": cluster.queue}
    labels["kueue.x-k8s.io/priority-class"] = cluster.priority_class if cluster.queue else None
    metadata: dict[str, Any] = {
        "name": job_name(config, context, spec_hash),
        "labels": {key: value for key, value in labels.items() if value},
        "annotations": {SPEC_HASH: spec_hash},
    }
    if context.owner:
        metadata["ownerReferences"] = [dict(context.owner)]
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": metadata,
        "spec": spec(context),
    }


def job_name(config: RunConfig, context: JobContext, spec_hash: str) -> str:
    """Return a DNS-1035 label of at most 48 characters: operators append to it."""
    recipe = re.sub("[^a-z0-9]+", "-", config.name)[: 29 - len(context.role)].strip("-")
    run_hash = hashlib.sha256(context.run_id.encode()).hexdigest()
    return f"{context.role}-{recipe}-{run_hash[:8]}-{spec_hash[:8]}"


def command(config: RunConfig, context: JobContext) -> list[str]:
    """Return every pod's command; PET_* variables add nodes, processes and the first address."""
    torchrun = ["python", "-m", "torch.distributed.run"]
    torchrun += [f"--shutdown-timeout={config.train.stop_grace}", "--tee=3"]
    return [*torchrun, "-m", *context.module, *context.mlflow]


def _pytorchjob(config: RunConfig, context: JobContext, parts: PodParts) -> dict[str, Any]:
    cluster = config.cluster
    pod = {
        **parts.pod,
        "automountServiceAccountToken": False,
        "schedulerName": cluster.scheduler,
        "priorityClassName": None if cluster.queue else cluster.priority_class,
        "containers": [
            {
                **parts.container,
                "name": PYTORCHJOB.container,
                "image": cluster.image,
                "command": command(config, context),
                "env": [*_RENDEZVOUS, *parts.env],
                "resources": parts.resources,
            }
        ],
    }
    pod = {key: value for key, value in pod.items() if value is not None}
    # OnFailure restarts a container in its pod up to backoffLimit times; ExitCode would restart an
    # OOMKilled one forever.
    replica = {"restartPolicy": "OnFailure", "template": {"metadata": parts.metadata, "spec": pod}}
    # No Master: with one, the operator adds an init container to each worker (Docker Hub's alpine,
    # as root, no capabilities dropped), which a pod with runAsNonRoot cannot start and a namespace
    # that enforces PodSecurity restricted rejects.
    replicas = {"Worker": {"replicas": cluster.nodes, **replica}}
    policy = {
        "cleanPodPolicy": "Running",  # keeps finished pods, for their logs
        # the operator counts the restarts of all pods
        "backoffLimit": cluster.restarts * cluster.nodes,
        "activeDeadlineSeconds": _deadline(config),
    }
    if cluster.ttl_hours is not None:
        policy["ttlSecondsAfterFinished"] = int(cluster.ttl_hours * _HOUR)
    return {
        "nprocPerNode": str(config.parallel.nproc_per_node),
        "runPolicy": policy,
        "pytorchReplicaSpecs": replicas,
    }


def _trainjob(config: RunConfig, context: JobContext, parts: PodParts) -> dict[str, Any]:
    cluster = config.cluster
    pod = {**parts.pod, "containers": [{"name": _NODE, **parts.container}]}
    replicated = {
        "name": _NODE,
        "template": {"spec": {"template": {"metadata": parts.metadata, "spec": pod}}},
    }
    return {
        "runtimeRef": {
            "apiGroup": KINDS["trainjob"].group,
            "kind": "TrainingRuntime",
            "name": cluster.runtime,
        },
        "activeDeadlineSeconds": _deadline(config),
        "trainer": {
            "image": cluster.image,
            "command": command(config, context),
            "numNodes": cluster.nodes,
            "numProcPerNode": config.parallel.nproc_per_node,
            "resourcesPerNode": parts.resources,
            "env": parts.env,  # a runtime patch may not set the container's
        },
        "runtimePatches": [
            {
                "manager": "canvastune.io/launcher",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
            }
        ],
    }


def _deadline(config: RunConfig) -> int:
    """Return the operator's deadline in seconds; unlike the launcher's, it covers pending time."""
    return int((config.cluster.deadline_hours + config.cluster.queue_hours) * _HOUR)

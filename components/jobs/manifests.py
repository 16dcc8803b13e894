"""A job as Kubernetes is given it: pure functions from a config and the facts of a run to a PyTorchJob or a TrainJob."""

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
from components.jobs.states import KINDS

SPEC_HASH = "canvastune.io/spec-hash"
_HOUR = 3600
_NODE = "node"  # what a TrainJob's runtime calls its job and its container


_LABEL = "metadata.labels['training.kubeflow.org/{}']"  # which the training operator gives every pod
# What torchrun has to know beside PET_NNODES and PET_NPROC_PER_NODE, which the operator sets.
_MEETING_POINT: tuple[dict[str, Any], ...] = (
    {"name": "CANVASTUNE_JOB", "valueFrom": {"fieldRef": {"fieldPath": _LABEL.format("job-name")}}},
    {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _LABEL.format("replica-index")}}},
    {"name": "PET_MASTER_ADDR", "value": "$(CANVASTUNE_JOB)-worker-0"},  # the service of the first pod
    {"name": "PET_MASTER_PORT", "value": "23456"},
)


@dataclass(frozen=True)
class JobContext:
    """What a job is told beside its config. Paths are those in the pods, and the same in the pipeline's steps."""

    run_id: str  # the pipeline job
    output: PurePath  # the folder that the processes write
    module: tuple[str, ...]  # what every process runs: a module of the engine and its arguments
    role: Literal["train", "evaluate"] = "train"
    mlflow: tuple[str, ...] = ()  # arguments that name the run that gets their metrics
    environment: Mapping[str, str] = field(default_factory=dict)  # where MLflow is; no secrets
    owner: Mapping[str, Any] | None = None  # owner reference of the Argo workflow; None: not known


def manifest(config: RunConfig, facts: JobContext, task: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The job's manifest, with a name that the same run and the same spec always get.

    Args:
        task: fragments of a pod spec that were set on the pipeline's task (fields of `dsl.TaskConfig`): resources, tolerations,
            node_selector, affinity, volumes, volume_mounts, env. They come on top of the config's.

    Raises:
        UserError: the pods would not see the run's folder, or the task and the config contradict each other.
    """
    kind, cluster = KINDS[config.cluster.backend], config.cluster
    own_labels = labels_of(config, facts.run_id, facts.role)

    def spec(facts: JobContext) -> dict[str, Any]:
        parts = pod_parts(config, own_labels, facts.output, facts.environment, task or {})
        return (_pytorchjob if cluster.backend == "pytorchjob" else _trainjob)(config, facts, parts)

    # MLflow may be away when a step is tried again: that must not make it another job.
    print_of = hashlib.sha256(json.dumps(spec(replace(facts, mlflow=(), environment={}))).encode()).hexdigest()
    labels = {**own_labels, "kueue.x-k8s.io/queue-name": cluster.queue}
    labels["kueue.x-k8s.io/priority-class"] = cluster.priority_class if cluster.queue else None
    metadata: dict[str, Any] = {
        "name": job_name(config, facts, print_of),
        "labels": {key: value for key, value in labels.items() if value},
        "annotations": {SPEC_HASH: print_of},
    }
    if facts.owner:
        metadata["ownerReferences"] = [dict(facts.owner)]
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": spec(facts)}


def job_name(config: RunConfig, facts: JobContext, spec_hash: str) -> str:
    """A DNS-1035 label of at most 48 characters, which leaves room for what operators append to it."""
    recipe = re.sub("[^a-z0-9]+", "-", config.name)[: 29 - len(facts.role)].strip("-")
    return f"{facts.role}-{recipe}-{hashlib.sha256(facts.run_id.encode()).hexdigest()[:8]}-{spec_hash[:8]}"


def command(config: RunConfig, facts: JobContext) -> list[str]:
    """What every pod runs. Nodes, processes and the first pod's address are in its environment, as PET_* variables."""
    line = ["python", "-m", "torch.distributed.run", f"--shutdown-timeout={config.train.stop_grace}", "--tee=3"]
    return [*line, "-m", *facts.module, *facts.mlflow]


def _pytorchjob(config: RunConfig, facts: JobContext, parts: PodParts) -> dict[str, Any]:
    cluster = config.cluster
    pod = {
        **parts.pod,
        "automountServiceAccountToken": False,
        "schedulerName": cluster.scheduler,
        "priorityClassName": None if cluster.queue else cluster.priority_class,
        "containers": [
            {
                **parts.container,
                "name": "pytorch",
                "image": cluster.image,
                "command": command(config, facts),
                "env": [*_MEETING_POINT, *parts.env],
                "resources": parts.resources,
            }
        ],
    }
    pod = {key: value for key, value in pod.items() if value is not None}
    # A container that ends starts again in its pod, a bounded number of times: ExitCode would restart one that is OOMKilled forever.
    replica = {"restartPolicy": "OnFailure", "template": {"metadata": parts.metadata, "spec": pod}}
    # No Master: beside one, the operator puts a container of its own into each worker, Docker Hub's alpine as root with nothing dropped,
    # which neither a pod that must not be root starts, nor a namespace that enforces PodSecurity restricted takes.
    replicas = {"Worker": {"replicas": cluster.nodes, **replica}}
    policy = {
        "cleanPodPolicy": "Running",  # finished pods stay: they have the logs
        "backoffLimit": cluster.restarts * cluster.nodes,  # the operator adds up the restarts of all pods
        "activeDeadlineSeconds": _deadline(config),
    }
    if cluster.ttl_hours is not None:
        policy["ttlSecondsAfterFinished"] = int(cluster.ttl_hours * _HOUR)
    return {"nprocPerNode": str(config.parallel.nproc_per_node), "runPolicy": policy, "pytorchReplicaSpecs": replicas}


def _trainjob(config: RunConfig, facts: JobContext, parts: PodParts) -> dict[str, Any]:
    cluster = config.cluster
    pod = {**parts.pod, "containers": [{"name": _NODE, **parts.container}]}
    replicated = {"name": _NODE, "template": {"spec": {"template": {"metadata": parts.metadata, "spec": pod}}}}
    return {
        "runtimeRef": {"apiGroup": KINDS["trainjob"].group, "kind": "TrainingRuntime", "name": cluster.runtime},
        "activeDeadlineSeconds": _deadline(config),
        "trainer": {
            "image": cluster.image,
            "command": command(config, facts),
            "numNodes": cluster.nodes,
            "numProcPerNode": config.parallel.nproc_per_node,
            "resourcesPerNode": parts.resources,
            "env": parts.env,  # a patch may not set the container's
        },
        "runtimePatches": [
            {"manager": "canvastune.io/launcher", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}
        ],
    }


def _deadline(config: RunConfig) -> int:
    """Seconds after which the operator itself ends the job: it counts the time in which the pods are pending, the launcher does not."""
    return int((config.cluster.deadline_hours + config.cluster.queue_hours) * _HOUR)

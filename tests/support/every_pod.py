"""Every pod that comes of a release: the chart's, those of the pipeline's steps, and those of the
jobs that train and evaluate.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml

from canvastune.config import RunConfig, parse_config
from components.evaluate.step import of_evaluation
from components.jobs.backends import JobContext, manifest
from pipelines.submit import compile_pipeline
from tests.support.cluster_rules import pod_specs
from tests.support.object_merging import merge
from tests.support.rendered_chart import cluster, named, of_kind

RESTRICTED = {  # what PodSecurity restricted asks of a container
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
# What KServe has in a predictor in addition to the fields of a pod.
_OF_KSERVE = ("minReplicas", "maxReplicas", "deploymentStrategy", "labels")
Pods = Iterator[tuple[str, dict[str, Any]]]


def every_pod(documents: list[dict[str, Any]]) -> Pods:
    """Yield where each pod comes from, and its spec.

    Args:
        documents: the rendered chart.
    """
    for document in documents:
        for path, spec in pod_specs(document):
            pod = {key: value for key, value in spec.items() if key not in _OF_KSERVE}
            yield f"{document['kind']} {document['metadata']['name']} {path}", pod
    yield from _step_pods(documents)
    yield from _job_pods(documents)


def _job_pods(documents: list[dict[str, Any]]) -> Pods:
    """Yield the pods of training and of the evaluation, as the operators make them."""
    given = {"name": "run", "data": {"source": "x"}, "cluster": cluster(documents)}
    training = parse_config(given)
    if training.cluster.backend == "local":  # in the steps' own pods
        return
    roles: tuple[tuple[Literal["train", "evaluate"], RunConfig], ...]
    roles = ("train", training), ("evaluate", of_evaluation(training))
    for role, config in roles:
        context = JobContext("id", PurePath("/workspace/runs/run"), ("m",), role=role)
        job = manifest(config, context)
        if job["kind"] == "PyTorchJob":
            for path, pod in pod_specs(job):
                yield f"{role} {path}", pod
        else:
            (runtime,) = of_kind(documents, "TrainingRuntime")
            yield f"{role} of a TrainJob", trainjob_template(job, runtime)["spec"]


def trainjob_template(job: Mapping[str, Any], runtime: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pod template that Trainer makes of a TrainJob and its runtime."""
    (patch,) = job["spec"]["runtimePatches"]
    of_runtime, of_patch = (
        node["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        for node in (runtime["spec"], patch["trainingRuntimeSpec"])
    )
    template: dict[str, Any] = merge(copy.deepcopy(of_runtime), of_patch, by_item=True)
    (container,) = template["spec"]["containers"]
    trainer = job["spec"]["trainer"]
    container |= {key: trainer[key] for key in ("image", "command", "env")}
    container["resources"] = trainer["resourcesPerNode"]
    template["spec"].setdefault("restartPolicy", "Never")
    return template


# --- the pipeline's steps


def _step_pods(documents: list[dict[str, Any]]) -> Pods:
    settings = named(documents, "ConfigMap", "canvastune-training")["data"]
    graph, platform = _compiled(settings["steps.json"], json.dumps(cluster(documents)))
    account = named(documents, "RoleBinding", "canvastune-launcher")["subjects"][0]["name"]
    for name, pod in step_pods(graph, platform).items():
        yield f"step {name}", {**pod, "serviceAccountName": account}


@functools.cache
def _compiled(steps: str, settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the graph that the upload job compiles, and its settings for Kubernetes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compile_pipeline(file, {"steps": steps, "cluster": settings})
        graph, platform = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    return graph, platform


def step_pods(graph: Mapping[str, Any], platform: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each step's pod with what Kubeflow's driver takes from the compiled graph.

    Kubeflow's own containers, and what it sets of security contexts, are those of Kubeflow
    Pipelines 2.16 and 2.17: all of PodSecurity restricted except runAsNonRoot, which a step asks for.
    """
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name: _step_pod(executor["container"], settings.get(name, {}))
        for name, executor in graph["deploymentSpec"]["executors"].items()
    }


def _step_pod(container: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    given = container["resources"]
    volumes, mounts = _step_volumes(own)
    secrets = [
        {
            "name": pair["envVar"],
            "valueFrom": {
                "secretKeyRef": {
                    "name": one.get("secretName") or "credentials",  # a parameter of the pipeline
                    "key": pair["secretKey"],
                    "optional": bool(pair.get("optional") or one.get("optional")),
                }
            },
        }
        for one in own.get("secretAsEnv", ())
        for pair in one["keyToEnv"]
    ]
    main = {
        "name": "main",
        "image": "registry.example.com/pipeline:1",
        "command": ["true"],
        "env": [*container.get("env", []), *secrets],
        "resources": {
            "requests": {
                "cpu": given["resourceCpuRequest"],
                "memory": given["resourceMemoryRequest"],
            },
            "limits": {"cpu": given["resourceCpuLimit"], "memory": given["resourceMemoryLimit"]},
        },
        "volumeMounts": mounts,
        "securityContext": {
            **{key: value for key, value in RESTRICTED.items() if key != "runAsNonRoot"},
            **own.get("securityContext", {}),
        },
    }
    affinities = [
        one["nodeAffinityJson"]["runtimeValue"]["constant"] for one in own.get("nodeAffinity", ())
    ]
    return {
        "containers": [main],
        "volumes": volumes,
        "tolerations": [
            {key: value for key, value in one.items() if key != "tolerationJson"}
            for one in own.get("tolerations", ())
        ],
        "imagePullSecrets": [{"name": one["secretName"]} for one in own.get("imagePullSecret", ())],
        "nodeSelector": own.get("nodeSelector", {}).get("labels", {}),
        "affinity": {"nodeAffinity": affinities[0]} if affinities else {},
        "restartPolicy": "Never",
    }


def _step_volumes(own: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes, mounts = list[dict[str, Any]](), list[dict[str, Any]]()
    for key, source in (
        ("pvcMount", {"persistentVolumeClaim": {"claimName": "workspace"}}),
        ("configMapAsVolume", {"configMap": {"name": "company-ca"}}),
        ("secretAsVolume", {"secret": {"secretName": "company-ca"}}),
        ("emptyDirMounts", {"emptyDir": {}}),
    ):
        for number, one in enumerate(own.get(key, ())):
            name = f"{key.lower()}-{number}"
            volumes.append({"name": name, **source})
            mounts.append({"name": name, "mountPath": one["mountPath"], **_sub_path(one)})
    return volumes, mounts


def _sub_path(mount: Mapping[str, Any]) -> dict[str, str]:
    return {"subPath": mount["subPath"]} if mount.get("subPath") else {}

"""Claims about the objects of the chart and the pods of the uploaded graph."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.submit import compile_pipeline
from tests.support.api_server import ApiServer
from tests.support.cluster_rules import pod_specs
from tests.support.rendered_chart import FILES, cluster, named, of_kind, render
from tools.apiserver.objects import (
    LIMIT_RANGE,
    QUOTA,
    RESTRICTED,
    add_limit_range,
    add_quota,
    make_namespace,
    refusal_of,
)
from tools.image_builds import Refused
from tools.images import Report


def check_chart(server: ApiServer, report: Report) -> None:
    """Send every object of every values file, and every pod of them."""
    unknown: set[str] = set()
    for name, values in FILES.items():
        namespace = f"chart-{name}"
        with report.claim(f"chart, {name}: every object is accepted, with strict validation"):
            make_namespace(server, namespace)
            documents = render(values, namespace=namespace)
            for document in of_kind(documents, "ServiceAccount"):
                server.must_create(document, namespace)
            for document in documents:
                if server.path(document, namespace) is None:
                    unknown.add(f"{document['kind']} ({document['apiVersion']})")
                    continue
                status, answer = server.create(document, namespace, dry_run=True)
                known = document["kind"] == "ServiceAccount" and status == 409
                assert status == 201 or known, f"{document['kind']}: {answer['message']}"
        with report.claim(
            f"chart, {name}: every pod is admitted with a quota on all four of CPU and memory, "
            f"a LimitRange{' and PodSecurity restricted' if 'PodSecurity' in server.plugins else ''}"
        ):
            add_quota(server, namespace, QUOTA)
            add_limit_range(server, namespace, LIMIT_RANGE)
            refusals = [
                f"{where}: {answer['message']}"
                for where, pod in chart_pods(documents)
                if (answer := refusal_of(server, namespace, pod)) is not None
            ]
            assert not refusals, "\n".join(refusals)
    for kind in sorted(unknown):
        with report.claim(f"chart: {kind}"):
            raise Refused("this server has no such kind, and no CRD of it was given")


def chart_pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pods of the chart's objects."""
    for document in documents:
        for path, spec in pod_specs(document):
            yield f"{document['kind']} {document['metadata']['name']} {path}", spec


def check_steps(server: ApiServer, report: Report) -> None:
    """Admit the pods of the compiled graph's steps, with all that upload was given."""
    values = FILES["company"]
    with (
        report.claim("upload: every step's pod is admitted with quota and LimitRange"),
        tempfile.TemporaryDirectory() as folder,
    ):
        make_namespace(server, "steps")
        add_quota(server, "steps", QUOTA)
        add_limit_range(server, "steps", LIMIT_RANGE)
        documents = render(values, namespace="steps")
        text = named(documents, "ConfigMap", "canvastune-training")["data"]["steps.json"]
        file = Path(folder) / "pipeline.yaml"
        compile_pipeline(file, {"steps": text, "cluster": json.dumps(cluster(documents))})
        graph, platform = yaml.safe_load_all(file.read_text(encoding="utf-8"))
        pods = dict(step_pods(graph, platform))
        assert len(pods) >= 8, f"found {len(pods)} steps"
        for name, pod in pods.items():
            refusal = refusal_of(server, "steps", pod)
            assert refusal is None, f"{name}: {refusal['message'] if refusal else ''}"


def step_pods(
    graph: Mapping[str, Any], platform: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pod of each step with what Kubeflow's driver takes from the compiled graph.

    Kubeflow's own containers and security contexts are its own: the latter are those of PodSecurity
    restricted here.
    """
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in graph["deploymentSpec"]["executors"].items():
        own, given = settings.get(name, {}), executor["container"]["resources"]
        mounts = [
            {"name": f"mount-{number}", "mountPath": one["mountPath"], **_sub_path(one)}
            for number, one in enumerate(own.get("pvcMount", ()))
        ]
        volumes: list[dict[str, Any]] = [
            {"name": mount["name"], "persistentVolumeClaim": {"claimName": "workspace"}}
            for mount in mounts
        ]
        for key, source, field in (
            ("configMapAsVolume", "configMap", "name"),
            ("secretAsVolume", "secret", "secretName"),
        ):
            for number, one in enumerate(own.get(key, ())):
                label = f"{source.lower()}-{number}"
                volumes.append({"name": label, source: {field: "company-ca"}})
                mounts.append({"name": label, "mountPath": one["mountPath"]})
        container = {
            "name": "main",
            "image": "registry.example.com/pipeline:1",
            "command": ["true"],
            "env": executor["container"].get("env", []),
            "resources": {
                "requests": {
                    "cpu": given["resourceCpuRequest"],
                    "memory": given["resourceMemoryRequest"],
                },
                "limits": {
                    "cpu": given["resourceCpuLimit"],
                    "memory": given["resourceMemoryLimit"],
                },
            },
            "volumeMounts": mounts,
            "securityContext": RESTRICTED,
        }
        pod = {
            "containers": [container],
            "volumes": volumes,
            "serviceAccountName": "default-editor",
            "tolerations": [
                {key: value for key, value in one.items() if key != "tolerationJson"}
                for one in own.get("tolerations", ())
            ],
            "restartPolicy": "Never",
        }
        yield name, pod


def _sub_path(mount: Mapping[str, Any]) -> dict[str, str]:
    return {"subPath": mount["subPath"]} if mount.get("subPath") else {}

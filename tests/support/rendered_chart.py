"""The Helm chart, rendered by real Helm."""

from __future__ import annotations

import functools
import json
from typing import Any

import helm_python
import pytest
import yaml

from tools.chart_table import CHART

CI = {
    path.name.removesuffix("-values.yaml"): path
    for path in sorted((CHART / "ci").glob("*-values.yaml"))
}
every_ci_file = pytest.mark.parametrize("ci", CI)
SERVERS = [ci for ci in CI if ci != "external-mlflow"]  # those that install MLflow
every_server = pytest.mark.parametrize("ci", SERVERS)


@functools.cache
def ci_values(ci: str) -> dict[str, Any]:
    return helm_python.values_from_yaml(CI[ci].read_text(encoding="utf-8"))


def texts(values: dict[str, Any], **how: Any) -> dict[str, str]:
    """Return the rendered text of each template."""
    with helm_python.Chart.load(CHART) as chart:
        return chart.render(values, **{"name": "canvastune", "namespace": "team-a"} | how)


def render(values: dict[str, Any], **how: Any) -> list[dict[str, Any]]:
    """Return every object, in the order of the templates."""
    rendered = [
        text for path, text in texts(values, **how).items() if not path.endswith("NOTES.txt")
    ]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [
        document for text in rendered for document in yaml.load_all(text, Loader=loader) if document
    ]


@functools.cache
def installed(ci: str) -> list[dict[str, Any]]:
    """Return every object of a file in ci/; they must not be changed."""
    return render(ci_values(ci))


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def named(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    found = [
        document for document in of_kind(documents, kind) if document["metadata"]["name"] == name
    ]
    assert len(found) == 1, f"{kind} {name}: found {len(found)}"
    return found[0]


def server(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return MLflow's pod."""
    pod: dict[str, Any] = of_kind(documents, "Deployment")[0]["spec"]["template"]["spec"]
    return pod


def flag(container: dict[str, Any], name: str) -> list[str]:
    """Return the values of a container's comma-separated flag."""
    given = [
        argument.split("=", 1)[1]
        for argument in container["args"]
        if argument.startswith(f"--{name}=")
    ]
    assert len(given) == 1, f"--{name} stands {len(given)} times"
    return given[0].split(",")


def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the training defaults."""
    text = named(documents, "ConfigMap", "canvastune-training")["data"]["cluster.json"]
    return dict(json.loads(text))


# --- values of every kind

PROXY = {
    "HTTPS_PROXY": "http://proxy.example.com:3128",
    "NO_PROXY": ".svc,.cluster.local,10.0.0.0/8",
}
FROM = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]
_SMALL = {"cpu": "50m", "memory": "64Mi"}
SIDECAR = {  # of a team, with what PodSecurity and quotas ask for
    "name": "sidecar",
    "image": "registry.example.com/sidecar:1",
    "resources": {"requests": _SMALL, "limits": _SMALL},
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    },
}
ALL: dict[str, Any] = {  # every optional object and setting at once
    "commonLabels": {"example.com/team": "a"},
    "commonAnnotations": {"team": "a"},
    "images": {"pullSecrets": ["one", {"name": "two"}]},
    "mlflow": {
        "pathPrefix": "/mlflow",
        "persistence": {"dataSource": {"name": "before"}, "snapshot": {"enabled": True}},
        "backup": {"enabled": True},
        "metrics": {
            "enabled": True,
            "serviceMonitor": {
                "enabled": True,
                "labels": {"release": "prometheus"},
                "basicAuth": {"existingSecret": {"name": "mlflow-reader"}},
            },
            "prometheusRule": {"enabled": True},
            "grafanaDashboard": {"enabled": True},
        },
        "priorityClassName": "high",
        "extraVolumes": [{"name": "ca", "configMap": {"name": "company-ca"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/company-ca"}],
        "extraArgs": ["--x-frame-options=NONE"],
        "extraContainers": [SIDECAR],
        "extraInitContainers": [{**SIDECAR, "name": "database-proxy", "restartPolicy": "Always"}],
        "auth": {"enabled": True, "existingSecret": {"name": "auth"}},
    },
    "ingress": {"enabled": True, "hosts": ["tools.example.com"]},
    "workspace": {"fetch": {"enabled": True, "data": {"source": "openai/gsm8k"}}},
    "httpRoute": {
        "enabled": True,
        "hostnames": ["gateway.example.com"],
        "parentRefs": [{"name": "shared", "namespace": "gateways"}],
    },
    "networkPolicy": {"from": FROM, "training": {"enabled": True}},
    "steps": {
        "env": PROXY,
        "caBundle": {"configMap": "company-ca"},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "team", "operator": "Exists"}],
    },
    "training": {"backend": "trainjob", "caBundle": {"secret": "company-ca"}},
    "serving": {
        "enabled": True,
        "model": "runs/a/model",
        "priorityClassName": "high",
        "replicas": 2,
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    },
}
FILES = {
    **{name: ci_values(name) for name in CI},
    "all": ALL,
    "all-pytorchjob": {
        **ALL,
        "training": {**ALL["training"], "backend": "pytorchjob", "priorityClassName": "high"},
        "serving": {**ALL["serving"], "kserve": True},
    },
    "openshift": {
        **ALL,
        "podSecurity": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
    },
}


def env_of(container: dict[str, Any]) -> dict[str, Any]:
    """Return the values, or their sources, of a container's variables."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}

"""The chart's Grafana dashboard: it asks for metrics that exist, of this release and its runs."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePath
from typing import Any, Literal

import pytest

from canvastune.config import parse_config
from components.jobs.backends import JobContext, manifest
from tests.support.dashboard import dashboard, expressions, selected
from tests.support.rendered_chart import ci_values, cluster, installed, named, of_kind, render

ON: dict[str, Any] = {"metrics": {"grafanaDashboard": {"enabled": True}}}
_POD = {"namespace", "pod", "uid"}
_CONTAINER = {*_POD, "container"}
_CLAIM = {"namespace", "persistentvolumeclaim"}
_GPU = {"gpu", "UUID", "device", "modelName", "Hostname", "namespace", "pod", "container"}
# Prometheus renames a label that it sets itself, unless the scrape honors the exporter's.
_DCGM = _GPU | {"exported_namespace", "exported_pod", "exported_container"}
KNOWN = {
    # kube-state-metrics, docs/metrics/workload/{deployment,pod}-metrics.md
    "kube_deployment_status_replicas_available": {"namespace", "deployment"},
    "kube_pod_status_phase": {*_POD, "phase"},
    "kube_pod_container_status_restarts_total": _CONTAINER,
    "kube_pod_container_resource_requests": {*_CONTAINER, "resource", "unit", "node"},
    # Kubernetes, pkg/kubelet/metrics/metrics.go
    "kubelet_volume_stats_used_bytes": _CLAIM,
    "kubelet_volume_stats_capacity_bytes": _CLAIM,
    "kubelet_volume_stats_available_bytes": _CLAIM,
    # cAdvisor in the kubelet, docs/storage/prometheus.md
    "container_cpu_usage_seconds_total": {*_CONTAINER, "cpu", "id", "image", "name"},
    "container_memory_working_set_bytes": {*_CONTAINER, "id", "image", "name"},
    # NVIDIA/dcgm-exporter, etc/default-counters.csv
    "DCGM_FI_DEV_GPU_UTIL": _DCGM,
    "DCGM_FI_DEV_FB_USED": _DCGM,
}


def test_every_metric_exists_with_the_labels_by_which_it_is_selected() -> None:
    """MLflow's own are compared with a running server's in test_chart_mlflow."""
    asked = selected(dashboard(installed("oidc")))
    assert sum(name.startswith("mlflow_") for name in asked) == 2
    labels = asked.pop("kube_pod_labels")
    assert {name for name in labels if not name.startswith("label_")} <= _POD
    others = {name: labels for name, labels in asked.items() if not name.startswith("mlflow_")}
    assert others.keys() == KNOWN.keys()
    for name, used in others.items():
        assert used <= KNOWN[name], f"{name} has no label {used - KNOWN[name]}"


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_the_pods_of_jobs_are_found_by_their_names_and_labels(
    backend: str, role: Literal["train", "evaluate"]
) -> None:
    documents = render({"mlflow": ON, "training": {"backend": backend}})
    given = {"name": "r" * 40, "data": {"source": "x"}, "cluster": cluster(documents)}
    context = JobContext("id", PurePath("/workspace/runs/run"), ("m",), role=role)
    job = manifest(parse_config(given), context)
    board = dashboard(documents)
    pods = _variables(board)["pods"]
    name = (
        job["metadata"]["name"]
        + {"pytorchjob": "-worker-0", "trainjob": "-node-0-0-x7k2p"}[backend]
    )
    assert re.fullmatch(pods, name)
    for other in ("canvastune-mlflow-5d4f8b6c9d-abcde", "canvastune-finetune-x7k2p-123456789"):
        assert not re.fullmatch(pods, other)
    labels = {
        "label_" + re.sub("[^a-zA-Z0-9_]", "_", label) for label in job["metadata"]["labels"]
    }  # as kube-state-metrics names them
    used = set(re.findall(r"\blabel_(?!replace)\w+", " ".join(expressions(board))))
    assert used
    assert used <= labels


def test_the_dashboard_is_about_this_release() -> None:
    documents = installed("oidc")
    board = dashboard(documents)
    variables = _variables(board)
    (service,) = of_kind(documents, "Service")
    assert variables["namespace"] == "team-a"
    assert variables["mlflow"] == service["metadata"]["name"]
    assert variables["mlflow"] == of_kind(documents, "Deployment")[0]["metadata"]["name"]
    claims = {one["metadata"]["name"] for one in of_kind(documents, "PersistentVolumeClaim")}
    assert set(variables["claims"].split("|")) == claims
    assert variables["gpu"] == "nvidia_com_gpu"
    other = dashboard(render({"mlflow": ON, "training": {"gpuResource": "amd.com/gpu"}}, name="b"))
    assert _variables(other)["gpu"] == "amd_com_gpu"
    assert other["uid"] != board["uid"], "one release's dashboard would replace the other's"


def test_grafana_s_sidecar_finds_it_and_it_is_off_by_default() -> None:
    config = named(installed("oidc"), "ConfigMap", "canvastune-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"]["grafana_folder"] == "Canvastune"
    (file,) = config["data"]
    assert file.endswith(".json"), "the sidecar copies other files, which Grafana does not read"
    assert "canvastune-dashboard" not in [
        one["metadata"]["name"] for one in of_kind(installed("default"), "ConfigMap")
    ]


def test_an_mlflow_that_the_chart_does_not_install_has_no_panels() -> None:
    external = ci_values("external-mlflow")
    board = dashboard(render({**external, "mlflow": {**external["mlflow"], **ON}}))
    assert board["panels"]
    assert not [name for name in selected(board) if name.startswith("mlflow_")]


def test_the_dashboard_has_what_grafana_12_expects() -> None:
    board = dashboard(installed("oidc"))
    assert board["schemaVersion"] == 41, "Grafana 12.0's; later versions migrate it"
    assert 0 < len(board["uid"]) <= 40
    assert board["title"]
    source = board["templating"]["list"][0]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    known = {*_variables(board), "datasource", "__rate_interval"}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        assert place["h"] > 0
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("stat", "timeseries", "table")
        assert panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references), panel["title"]
        for target in (panel, *panel["targets"]):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for one, other in itertools.combinations([panel["gridPos"] for panel in board["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, f"panels overlap: {one}, {other}"
    for expression in expressions(board):
        assert set(re.findall(r"\$([a-z_]\w*)", expression)) <= known, expression


def _variables(board: dict[str, Any]) -> dict[str, str]:
    """Return the value of each constant."""
    constants = [one for one in board["templating"]["list"] if one["type"] == "constant"]
    assert all(one["current"]["value"] == one["query"] for one in constants)
    return {one["name"]: one["query"] for one in constants}

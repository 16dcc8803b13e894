"""What `canvastune doctor` says of a cluster, its operators and its Kubeflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from components.jobs.client import connect_to_cluster
from components.jobs.states import TRAINJOB
from pipelines.doctor.cluster import (
    PERMISSIONS,
    check_cluster,
    check_kubeflow,
    check_operators,
    check_permissions,
)
from pipelines.kfp_client import KubeflowClient
from tests.fakes.fake_api_server import FakeApiServer
from tests.fakes.fake_kubeflow import FakeKubeflow
from tests.support.findings import only
from tests.support.rendered_chart import named, render

pytestmark = pytest.mark.usefixtures("bare_machine")


class Cluster(FakeApiServer):
    """A fake API server that also answers access reviews by the rules of a Role."""

    rules: list[dict[str, Any]]
    schemas: Mapping[str, dict[str, Any]] = MappingProxyType({})  # by path
    lists: Mapping[str, list[dict[str, Any]]] = MappingProxyType({})  # by kind, in team-a

    def answer(
        self, method: str, url: str, content_type: str, data: bytes, account: str = ""
    ) -> tuple[int, Any]:
        if (path := url.partition("?")[0]) in self.schemas:
            return 200, {"components": {"schemas": self.schemas[path]}}
        if (kind := path.removeprefix("/api/v1/namespaces/team-a/")) in (
            "resourcequotas",
            "limitranges",
        ):
            return 200, {"items": self.lists.get(kind, [])}
        if url.endswith("/selfsubjectaccessreviews"):
            asked = json.loads(data)["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, [asked["resource"], asked.get("subresource")]))
            allowed = any(
                asked.get("group", "") in rule["apiGroups"]
                and resource in rule["resources"]
                and asked["verb"] in rule["verbs"]
                for rule in self.rules
            )
            return 201, {"spec": {"resourceAttributes": asked}, "status": {"allowed": allowed}}
        return super().answer(method, url.removesuffix("/"), content_type, data, account)


def _role() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = named(render({}), "Role", "canvastune-launcher")["rules"]
    return rules


@pytest.fixture
def cluster(
    bare_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    server = Cluster()
    with server:
        server.rules = _role()
        (tmp_path / "kubeconfig").write_text(server.kubeconfig)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION",
            str(tmp_path / "kubeconfig"),
        )
        yield server


def test_permissions_that_are_asked_for_are_those_that_the_chart_grants() -> None:
    granted = {
        (g, r, v)
        for rule in _role()
        for g in rule["apiGroups"]
        for r in rule["resources"]
        for v in rule["verbs"]
    }
    asked = {
        (g, r, v)
        for g, resources in PERMISSIONS.items()
        for r, verbs in resources.items()
        for v in verbs
    }
    assert asked == granted


@pytest.mark.usefixtures("cluster")
def test_cluster_with_the_chart_is_in_order() -> None:
    found = list(check_cluster(None, "pytorchjob"))
    assert [(one.name, one.state) for one in found] == [
        ("cluster", "ok"),
        ("operators", "ok"),
        ("permissions", "ok"),
    ]
    assert "namespace team-a" in found[0].found
    assert found[1].found == "PyTorchJob: cluster.backend=pytorchjob"


@pytest.mark.usefixtures("cluster")
def test_operator_that_the_recipe_needs_and_the_cluster_lacks_is_a_problem() -> None:
    found = {one.name: one for one in check_cluster(None, "trainjob")}["operators"]
    assert found.state == "problem"
    assert "install Kubeflow Trainer" in found.fix
    assert "--set cluster.backend=pytorchjob" in found.fix


def _patches(*of_pod: str) -> dict[str, Any]:
    """Return the schema of `runtimePatches` with these fields of a pod."""
    schema: dict[str, Any] = {"properties": {field: {} for field in of_pod}}
    for name in ("spec", "template", "spec", "template"):
        schema = {"properties": {name: schema}}
    schema = {"properties": {"replicatedJobs": {"type": "array", "items": schema}}}
    for name in ("spec", "template", "trainingRuntimeSpec"):
        schema = {"properties": {name: schema}}
    return {"type": "array", "items": schema}


DEADLINE = {"activeDeadlineSeconds": {"type": "integer"}}


@pytest.mark.parametrize(
    ("fields", "lacking"),
    [
        ({**DEADLINE, "runtimePatches": _patches("terminationGracePeriodSeconds")}, ""),
        ({"podTemplateOverrides": {}}, "activeDeadlineSeconds runtimePatches"),
        (  # Trainer 2.2
            {**DEADLINE, "runtimePatches": _patches("volumes")},
            "template.spec.template.spec.terminationGracePeriodSeconds",
        ),
        ({**DEADLINE, "runtimePatches": {"x-kubernetes-preserve-unknown-fields": True}}, ""),
    ],
)
def test_an_operator_whose_schema_lacks_a_field_is_a_problem(
    cluster: Cluster, fields: dict[str, Any], lacking: str
) -> None:
    spec: dict[str, Any] = {"properties": fields}
    cluster.schemas = {
        "/openapi/v3/apis/trainer.kubeflow.org/v1alpha1": {
            "io.kubeflow.trainer.v1alpha1.TrainJob": {
                "x-kubernetes-group-version-kind": [{"kind": "TrainJob"}],
                "properties": {"spec": spec},
            }
        }
    }
    served = {"trainjobs.trainer.kubeflow.org", "pytorchjobs.kubeflow.org"}
    client, _ = connect_to_cluster()
    found = check_operators(client, served, "trainjob")
    assert found.state == ("problem" if lacking else "ok")
    if lacking:
        assert "TrainJob" in found.found
        assert all(field in found.found for field in lacking.split())
        assert TRAINJOB.operator in found.fix
        assert check_operators(client, served, "local").state == "warning"


@pytest.mark.usefixtures("cluster")
def test_an_old_cluster_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"gitVersion": "v1.24.3"}
    monkeypatch.setattr("pipelines.doctor.cluster._get", lambda *_: old)
    found = only(check_cluster(None, "local"))
    assert found.state == "problem"
    assert "expected 1.25" in found.found


def test_missing_permissions_are_named_with_what_grants_them(cluster: Cluster) -> None:
    cluster.rules = [rule for rule in _role() if rule["resources"] != ["events"]]
    cluster.rules[0] = {**cluster.rules[0], "verbs": ["get", "list", "watch"]}
    found = {one.name: one for one in check_cluster("team-b", "local")}["permissions"]
    assert found.state == "warning", "a person who submits from a laptop starts no job"
    assert re.search(
        r" create, patch, delete pytorchjobs\.kubeflow\.org; list events\b.* team-b\b", found.found
    )
    assert "permissions.create=true" in found.fix
    client, _ = connect_to_cluster()
    assert (
        check_permissions(client, "team-a", {"pytorchjobs.kubeflow.org"}, inside=True).state
        == "problem"
    )


def test_cluster_that_does_not_respond_is_a_problem(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text(cluster.kubeconfig.replace(str(cluster.server_port), "9"))
    found = only(check_cluster(None, "local"))
    assert (found.name, found.state) == ("cluster", "problem")
    assert "no response" in found.found


QUOTA = {
    "metadata": {"name": "kf-resource-quota"},
    "spec": {"hard": {"cpu": "512", "limits.memory": "2Ti", "requests.nvidia.com/gpu": "4"}},
}


@pytest.mark.parametrize(
    ("limits", "lacking"),
    [
        (None, "limits.memory, requests.cpu,"),
        ({"type": "Container", "default": {"memory": "1Gi"}}, "requests.cpu,"),
        ({"type": "Pod", "max": {"memory": "1Gi"}}, "limits.memory, requests.cpu,"),
        ({"type": "Container", "default": {"cpu": "1", "memory": "1Gi"}}, ""),
        (
            {
                **{"type": "Container", "default": {"memory": "1Gi"}},
                "defaultRequest": {"cpu": "100m"},
            },
            "",
        ),
    ],
)
def test_a_quota_that_refuses_kubeflow_s_own_containers_is_named(
    cluster: Cluster, limits: dict[str, Any] | None, lacking: str
) -> None:
    """As in kubeflow/pipelines#7699: a profile's quota, and the steps' pods are never created."""
    ranges = [{"spec": {"limits": [limits]}}] if limits else []
    cluster.lists = {"resourcequotas": [QUOTA], "limitranges": ranges}
    found = [one for one in check_cluster(None, "pytorchjob") if one.name == "quota"]
    assert [one.state for one in found] == (["warning"] if lacking else [])
    if lacking:
        assert f"kf-resource-quota of team-a counts {lacking}" in found[0].found
        assert "LimitRange" in found[0].fix


@pytest.mark.parametrize("profiles", [(), ("team-a",)])
def test_a_namespace_matters_to_kubeflow_only_where_it_has_profiles(
    profiles: tuple[str, ...],
) -> None:
    with FakeKubeflow(namespaces=profiles) as kubeflow:
        assert only(check_kubeflow(KubeflowClient(kubeflow.host, "team-a"))).state == "ok"


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [
        ("2.14.0", "problem", "expected 2.15"),
        ("2.15.0", "ok", "PodSecurity restricted is enforced, 2.16"),
        ("2.17.0", "ok", "Kubeflow Pipelines 2.17.0 responds"),
        ("", "ok", "unknown version"),
    ],
)
def test_an_old_kubeflow_is_a_problem(version: str, state: str, words: str) -> None:
    with FakeKubeflow(version=version) as kubeflow:
        found = only(check_kubeflow(KubeflowClient(kubeflow.host)))
    assert found.state == state
    assert words in found.found


def test_kubeflow_that_does_not_respond_is_a_problem() -> None:
    assert (
        only(check_kubeflow(KubeflowClient("http://127.0.0.1:9", retry_seconds=0.0))).state
        == "problem"
    )

"""What the launcher refuses before it makes a job: permissions, kinds and things that are missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from canvastune.errors import UserError
from components.jobs import launcher as launching
from components.jobs.client import KubernetesClient, connect
from components.jobs.states import KINDS
from tests.fakes.fake_kubernetes import ACCOUNT
from tests.support.cluster_stage import WORKFLOW, Cluster, config_of, stage


def test_the_charts_role_is_enough(cluster: Cluster, role: list[Mapping[str, Any]]) -> None:
    cluster.api.rules = role
    cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [WORKFLOW]})
    cluster.goes_well()
    cluster.launch(config_of(cluster.backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}}))


@pytest.mark.parametrize(
    ("resource", "verb"), [("pytorchjobs", "create"), ("pytorchjobs", "list"), ("pods", "list"), ("pods/log", "get"), ("events", "list")]
)
def test_a_missing_permission_is_named_before_a_job_is_made(
    pytorch: Cluster, role: list[Mapping[str, Any]], resource: str, verb: str
) -> None:
    pytorch.api.rules = [{**rule, "verbs": [v for v in rule["verbs"] if v != verb or resource not in rule["resources"]]} for rule in role]
    words = pytorch.fails()
    full = "pytorchjobs.kubeflow.org" if resource == "pytorchjobs" else resource
    assert f"may not {verb} {full} in namespace team-a" in words
    assert f"--verb={verb} --resource={full}" in words
    assert "permissions.create=true" in words
    assert ACCOUNT in words, "who may not is not said"
    assert not pytorch.api.all("pytorchjobs")


def test_a_missing_operator_is_named(cluster: Cluster) -> None:
    cluster.api.installed -= {"pytorchjobs", "trainjobs", "trainingruntimes"}
    words = cluster.fails()
    assert f"does not know {KINDS[cluster.backend].kind}" in words
    assert f"install {KINDS[cluster.backend].operator}" in words


def test_a_launcher_outside_of_a_cluster_says_so_and_one_with_a_kubeconfig_uses_it(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = tmp_path / "config"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(settings))
    with pytest.raises(UserError, match=r"run the pipeline on a cluster, or set cluster\.backend=local"):
        connect()
    entry = {"contexts": ("context", {"cluster": "c", "namespace": "team-a"}), "clusters": ("cluster", {"server": pytorch.api.url})}
    tree = {key: [{"name": "c", what: value}] for key, (what, value) in entry.items()}
    settings.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [], **tree}))
    client, namespace = connect()
    assert namespace == "team-a"
    assert KubernetesClient(client, namespace, KINDS["pytorchjob"], pytorch.clock).jobs("") == []


def test_an_unknown_claim_is_refused_before_a_job_is_made(cluster: Cluster) -> None:
    assert "claim elsewhere is not in namespace team-a" in cluster.fails(config_of(cluster.backend, claim="elsewhere"))
    assert not cluster.creations


def test_an_absent_secret_or_key_is_refused_before_a_job_is_made(cluster: Cluster) -> None:
    config = config_of(cluster.backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}})
    assert "secret hf is not in namespace team-a" in cluster.fails(config)
    cluster.api.put("secrets", "hf", data={"other": "c2VjcmV0"})
    words = cluster.fails(config)
    assert "secret hf has no key token: it has other" in words
    assert "c2VjcmV0" not in words + cluster.said
    assert not cluster.creations


def test_an_absent_runtime_is_refused_before_a_job_is_made(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for cluster in stage("trainjob", capsys, monkeypatch):
        assert "TrainingRuntime mine is not in namespace team-a" in cluster.fails(config_of("trainjob", runtime="mine"))
        node = {"name": "node", "template": {"spec": {"template": {"spec": {"schedulerName": "default-scheduler"}}}}}
        cluster.api.put("trainingruntimes", "canvastune", spec={"template": {"spec": {"replicatedJobs": [node]}}})
        assert "TrainingRuntime canvastune has default-scheduler" in cluster.fails(config_of("trainjob", scheduler="volcano"))
        assert not cluster.creations


@pytest.mark.skipif(not Path(__file__).parents[3].joinpath("shared/crds").exists(), reason="the operators' CRDs are not at hand")
def test_what_the_api_server_does_not_know_is_refused_in_its_words(pytorch: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    real = launching.manifest
    monkeypatch.setattr(launching, "manifest", lambda *args: {**real(*args), "spec": {**real(*args)["spec"], "nproc": 8}})
    assert "refuses to create pytorchjobs (HTTP 422): spec: Additional properties are not allowed ('nproc'" in pytorch.fails()

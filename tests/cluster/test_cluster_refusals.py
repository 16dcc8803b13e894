"""What the launcher refuses before it creates a job: missing permissions, kinds and objects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from canvastune.errors import UserError
from components.jobs import launcher as launching
from components.jobs.client import KubernetesClient, connect_to_cluster
from components.jobs.states import KINDS
from tests.fakes.fake_kubernetes import ACCOUNT
from tests.support.cluster_stage import WORKFLOW, Cluster, config_of, stage


def test_the_charts_role_is_enough(cluster: Cluster, role: list[Mapping[str, Any]]) -> None:
    cluster.api.rules = role
    cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [WORKFLOW]})
    cluster.goes_well()
    cluster.launch(
        config_of(cluster.backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}})
    )


@pytest.mark.parametrize(
    ("resource", "verb"),
    [
        ("pytorchjobs", "create"),
        ("pytorchjobs", "list"),
        ("pods", "list"),
        ("pods/log", "get"),
        ("events", "list"),
    ],
)
def test_a_missing_permission_is_named_before_a_job_is_made(
    pytorch: Cluster, role: list[Mapping[str, Any]], resource: str, verb: str
) -> None:
    pytorch.api.rules = [
        {
            **rule,
            "verbs": [v for v in rule["verbs"] if v != verb or resource not in rule["resources"]],
        }
        for rule in role
    ]
    error = pytorch.fails()
    full = "pytorchjobs.kubeflow.org" if resource == "pytorchjobs" else resource
    assert re.search(rf"\bnot {verb} {re.escape(full)} .* team-a\b", error)
    assert f"--verb={verb} --resource={full}" in error
    assert "permissions.create=true" in error
    assert ACCOUNT in error, "the account is not named"
    assert not pytorch.jobs()


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (
            "exceeded quota: team-quota, requested: count/jobs=1, used: count/jobs=9, limited: "
            "count/jobs=9",
            r"\n  hint: .*\bquota\b",
        ),
        (
            "unable to create new content in namespace team-a because it is being terminated",
            r"\n  hint: .*\bnamespace\b",
        ),
        (
            'admission webhook "policy.example.com" denied the request: label cost-center',
            r"\n  hint: ",
        ),
    ],
)
def test_what_admission_refuses_is_not_said_to_be_a_missing_permission(
    cluster: Cluster, message: str, hint: str
) -> None:
    """Admission answers 403, as the authorizer does."""
    text = f'{cluster.kind.plural}.{cluster.kind.group} "train" is forbidden: {message}'
    cluster.api.refuses_jobs = 403, text
    error = cluster.fails()
    assert message in error
    assert re.search(hint, error)
    assert "permissions.create" not in error


def test_a_webhook_that_is_down_is_named_and_waited_for(cluster: Cluster) -> None:
    message = (
        'Internal error occurred: failed calling webhook "validator.training-operator": failed to '
        "call webhook: connection refused"
    )
    cluster.api.refuses_jobs = 500, message
    cluster.clock.at(60, lambda: setattr(cluster.api, "refuses_jobs", None))
    cluster.goes_well(start=200)
    cluster.launch()
    assert cluster.output.count(f"({message})") == 1
    assert "does not respond" not in cluster.output


def test_a_webhook_that_stays_down_ends_the_step(pytorch: Cluster) -> None:
    pytorch.api.refuses_jobs = 500, 'failed calling webhook "a": no endpoints'
    error = pytorch.fails()
    assert 'failed calling webhook "a": no endpoints' in error
    assert re.search(r"hint: .*\bwebhook\b", error)


def test_an_old_cluster_is_refused_before_a_job_is_made(pytorch: Cluster) -> None:
    pytorch.api.version = "v1.24.17"
    assert pytorch.fails() == snapshot("""\
canvastune: error: cluster.backend: found Kubernetes v1.24.17, expected 1.25 or newer, for PodSecurity admission
  hint: Upgrade the cluster, or use another one.\
""")
    assert not pytorch.creations


def test_a_missing_operator_is_named(cluster: Cluster) -> None:
    cluster.api.installed -= {"pytorchjobs", "trainjobs", "trainingruntimes"}
    error = cluster.fails()
    assert f"({cluster.kind.api_version})" in error
    assert f"Install {cluster.kind.operator}" in error


def test_a_launcher_needs_a_service_account_or_a_kubeconfig(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = tmp_path / "config"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(settings))
    with pytest.raises(UserError, match=r"cluster\.backend: .* KUBECONFIG"):
        connect_to_cluster()
    entry = {
        "contexts": ("context", {"cluster": "c", "namespace": "team-a"}),
        "clusters": ("cluster", {"server": pytorch.api.url}),
    }
    tree = {key: [{"name": "c", what: value}] for key, (what, value) in entry.items()}
    settings.write_text(
        json.dumps(
            {"apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [], **tree}
        )
    )
    client, namespace = connect_to_cluster()
    assert namespace == "team-a"
    assert KubernetesClient(client, namespace, KINDS["pytorchjob"], pytorch.clock).jobs("") == []


def test_an_unknown_claim_is_refused_before_a_job_is_made(cluster: Cluster) -> None:
    assert cluster.fails(config_of(cluster.backend, claim="elsewhere")) == snapshot("""\
canvastune: error: cluster.claim: no claim elsewhere in namespace team-a
  hint: Create it, or correct cluster.claim (the chart creates one).\
""")
    assert not cluster.creations


def test_an_absent_secret_or_key_is_refused_before_a_job_is_made(cluster: Cluster) -> None:
    config = config_of(cluster.backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}})
    assert cluster.fails(config) == snapshot("""\
canvastune: error: cluster: no secret hf in namespace team-a
  hint: Create it, or correct cluster.secret_env, credentials or pull_secrets.\
""")
    cluster.api.put("secrets", "hf", data={"other": "c2VjcmV0"})
    assert cluster.fails(config) == snapshot("""\
canvastune: error: cluster: secret hf has no key token; its keys: other
  hint: Name one of those, or add the key.\
""")
    assert "c2VjcmV0" not in cluster.output
    assert not cluster.creations


def test_an_absent_runtime_is_refused_before_a_job_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cluster in stage("trainjob", capsys, monkeypatch):
        assert cluster.fails(config_of("trainjob", runtime="mine")) == snapshot("""\
canvastune: error: cluster.runtime: no TrainingRuntime mine in namespace team-a
  hint: Install the chart with training.backend=trainjob: it creates the runtime.\
""")
        node = {
            "name": "node",
            "template": {"spec": {"template": {"spec": {"schedulerName": "default-scheduler"}}}},
        }
        cluster.api.put(
            "trainingruntimes",
            "canvastune",
            spec={"template": {"spec": {"replicatedJobs": [node]}}},
        )
        assert cluster.fails(config_of("trainjob", scheduler="volcano")) == snapshot("""\
canvastune: error: cluster.scheduler: found volcano, but TrainingRuntime canvastune has default-scheduler
  hint: Set schedulerName in the TrainingRuntime: a KIND takes it from there.\
""")
        assert not cluster.creations


@pytest.mark.skipif(
    not Path(__file__).parents[3].joinpath("shared/crds").exists(),
    reason="the operators' CRDs are not in this checkout",
)
def test_a_field_that_the_api_server_rejects_is_reported_with_its_message(
    pytorch: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = launching.manifest

    def with_spec(**fields: Any) -> None:
        monkeypatch.setattr(
            launching,
            "manifest",
            lambda *args: {**real(*args), "spec": {**real(*args)["spec"], **fields}},
        )

    with_spec(nprocPerNode=8)
    assert pytorch.fails() == snapshot("""\
canvastune: error: the Kubernetes API server refused to create pytorchjobs (HTTP 422): spec.nprocPerNode: 8 is not of type 'string'
  hint: Correct what the message names, or ask the cluster's administrator.\
""")
    with_spec(nproc=8)
    assert " spec.nproc: " in pytorch.fails()

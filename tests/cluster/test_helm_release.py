"""Real Helm installs, upgrades, rolls back and uninstalls the chart: data and passwords stay as
they are, whatever happens.
"""

from __future__ import annotations

import base64
import copy
import gzip
import json
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest

from tests.fakes.fake_api_server import NAMESPACE, FakeApiServer
from tests.support.rendered_chart import ci_values, every_ci_file, installed
from tools.chart_table import CHART

NAME = "canvastune"
CLAIMS = {"canvastune-mlflow", "canvastune-workspace"}
SECRETS = {  # those that the files in ci/ name, with their keys and passwords
    "mlflow-database": {
        "uri": "postgresql://mlflow:pass-1@db/mlflow",
        "auth-uri": "postgresql://mlflow:pass-2@db/users",
    },
    "mlflow-auth": {"password": "pass-3", "secret-key": "pass-4"},
    "mlflow-s3": {"AWS_ACCESS_KEY_ID": "pass-5", "AWS_SECRET_ACCESS_KEY": "pass-6"},
    "canvastune-credentials": {"HF_TOKEN": "pass-7"},
}


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    """Yield an API server with the secrets; fail if a secret was changed or created, or a claim
    lost.
    """
    with FakeApiServer() as server:
        server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for name, content in SECRETS.items():
            data = {
                key: base64.b64encode(value.encode()).decode() for key, value in content.items()
            }
            server.put(
                {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"name": name},
                    "type": "Opaque",
                    "data": data,
                }
            )
        before = server.all("Secret")
        yield server
        after = {
            name: secret
            for name, secret in server.all("Secret").items()
            if secret["type"] != "helm.sh/release.v1"
        }
        assert after == before, "a secret changed, or one was made"
        assert [
            call
            for call in server.calls
            if call.kind == "PersistentVolumeClaim" and call.verb in ("delete", "update")
        ] == []


@pytest.fixture
def helm(api: FakeApiServer) -> Iterator[helm_python.Config]:
    with helm_python.Config(kubeconfig_content=api.kubeconfig, namespace=NAMESPACE) as config:
        yield config


def install(
    helm: helm_python.Config, values: dict[str, Any] | None = None, **how: Any
) -> dict[str, Any]:
    return helm.install(CHART, NAME, values or {}, namespace=NAMESPACE, timeout=20, **how)


def upgrade(helm: helm_python.Config, values: dict[str, Any]) -> dict[str, Any]:
    return helm.upgrade(CHART, NAME, values, namespace=NAMESPACE, timeout=20, reset_values=True)


def own_objects(api: FakeApiServer) -> set[str]:
    """Return all objects but secrets."""
    return {name for name in api.names() if not name.startswith("Secret/")}


def claims(api: FakeApiServer) -> dict[str, tuple[str, Any]]:
    """Return identity and spec of each claim."""
    return {
        name: (claim["metadata"]["uid"], claim["spec"])
        for name, claim in api.all("PersistentVolumeClaim").items()
    }


def server(api: FakeApiServer) -> dict[str, Any]:
    """Return MLflow's Deployment in the cluster."""
    return api.all("Deployment")["canvastune-mlflow"]["spec"]


def states(helm: helm_python.Config) -> list[str]:
    """Return the status of every revision."""
    return [revision["status"] for revision in helm.history(NAME)]


def as_if_by_helm_3(api: FakeApiServer) -> None:
    """Remove the apply method from the records, as Helm 3 wrote them: Helm 4 then patches
    client-side.
    """
    for record in api.all("Secret").values():
        if record["type"] == "helm.sh/release.v1":
            release = json.loads(
                gzip.decompress(base64.b64decode(base64.b64decode(record["data"]["release"])))
            )
            assert release.pop("apply_method", "ssa") == "ssa"
            packed = base64.b64encode(
                base64.b64encode(gzip.compress(json.dumps(release).encode()))
            ).decode()
            api.put(record | {"data": {"release": packed}})


@every_ci_file
def test_every_object_reaches_the_cluster(
    ci: str, api: FakeApiServer, helm: helm_python.Config
) -> None:
    release = install(helm, ci_values(ci))
    ours = {
        f"{one['kind']}/{one['metadata']['name']}"
        for one in installed(ci)
        if (one["metadata"].get("annotations") or {}).get("helm.sh/hook")
        not in ("test", "pre-upgrade")
    }
    assert own_objects(api) == ours
    assert release["status"] == "deployed"
    everything = json.dumps([api.all(name.split("/")[0]) for name in ours]) + release["manifest"]
    assert [
        key for content in SECRETS.values() for key, value in content.items() if value in everything
    ] == []


def test_an_install_that_waits_ends_with_a_server_an_upload_and_the_next_steps(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    release = install(helm, wait="watcher")
    assert api.all("Job")["canvastune-upload"]["status"]["succeeded"] == 1
    assert server(api)["strategy"] == {"type": "Recreate"}
    assert api.all("PersistentVolumeClaim").keys() == CLAIMS
    for command in (
        "helm test canvastune -n team-a",
        "kubectl port-forward -n team-a service/canvastune-mlflow",
        "canvastune submit",
    ):
        assert command in release["notes"]


def test_helm_test_checks_the_server_and_the_permissions(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    logs = helm.test(NAME, timeout=20, logs=True)["logs"]
    assert "canvastune-test-mlflow has spoken" in logs
    assert "canvastune-test-permissions has spoken" in logs
    api.failing.add("canvastune-test-permissions")
    with pytest.raises(helm_python.HelmReleaseError, match="canvastune-test-permissions"):
        helm.test(NAME, timeout=20)


@pytest.mark.parametrize("by_helm", [3, 4])
def test_an_upgrade_and_its_rollback_change_the_server_and_nothing_that_is_kept(
    by_helm: int, api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    if by_helm == 3:
        as_if_by_helm_3(api)
    kept, first_upload, first_server = (
        claims(api),
        api.all("Job")["canvastune-upload"]["metadata"]["uid"],
        copy.deepcopy(server(api)),
    )
    resources = {"requests": {"cpu": "2", "memory": "3Gi"}, "limits": {"cpu": "4", "memory": "6Gi"}}
    upgrade(helm, {"images": {"mlflow": {"tag": "9.9"}}, "mlflow": {"resources": resources}})
    pod = server(api)["template"]["spec"]
    assert {container["image"] for container in [*pod["initContainers"], *pod["containers"]]} == {
        "canvastune/mlflow:9.9"
    }
    assert pod["containers"][0]["resources"] == resources
    assert api.all("Job")["canvastune-upload"]["metadata"]["uid"] != first_upload, (
        "the new version was not uploaded"
    )
    helm.rollback(NAME, timeout=20)
    assert server(api) == first_server
    assert claims(api) == kept
    assert states(helm) == ["superseded", "superseded", "deployed"]
    ways = {call.verb for call in api.calls if call.kind == "Deployment" and call.status == 200}
    assert ways == {"patch" if by_helm == 3 else "apply"}


@pytest.mark.parametrize("by_helm", [3, 4])
@pytest.mark.parametrize("back", ["upgrade", "rollback"])
def test_the_database_can_move_to_postgresql_and_back(
    by_helm: int, back: str, api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    if by_helm == 3:
        as_if_by_helm_3(api)
    kept, first_server = claims(api), copy.deepcopy(server(api))
    upgrade(helm, ci_values("postgres-s3"))
    assert server(api)["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"},
    }
    assert [volume["name"] for volume in server(api)["template"]["spec"]["volumes"]] == ["tmp"]
    assert claims(api) == kept, "the claims with the old database and the models were deleted"
    if back == "upgrade":
        upgrade(helm, {})
    else:
        helm.rollback(NAME, version=1, timeout=20)
    assert server(api) == first_server
    assert claims(api) == kept
    assert states(helm)[-1] == "deployed"


def test_a_release_that_started_with_postgresql_can_move_to_sqlite(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm, ci_values("postgres-s3"))
    assert claims(api) == {}
    upgrade(helm, {})
    assert server(api)["strategy"] == {"type": "Recreate"}
    assert claims(api).keys() == CLAIMS


def test_an_upgrade_keeps_the_number_of_pods_that_the_autoscaler_chose(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    values = ci_values("postgres-s3")
    install(helm, values)
    scaled = copy.deepcopy(api.all("Deployment")["canvastune-mlflow"])
    scaled["spec"]["replicas"] = 3
    api.put(scaled)
    upgrade(helm, {**values, "images": {"mlflow": {"tag": "9.9"}}})
    assert server(api)["template"]["spec"]["containers"][0]["image"] == "canvastune/mlflow:9.9"
    assert server(api)["replicas"] == 3, "the upgrade removed pods that MLflow needs"


def test_an_upgrade_changes_nothing_if_no_snapshot_can_be_made(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    values = ci_values("oidc")
    newer = {**values, "images": {"mlflow": {"tag": "9.9"}}}
    install(helm, values)
    before = copy.deepcopy(server(api))
    api.failing.add("canvastune-mlflow-snapshot")
    with pytest.raises(
        helm_python.HelmReleaseError, match=r"pre-upgrade\b.*canvastune-mlflow-snap"
    ):
        upgrade(helm, newer)
    assert server(api) == before, "MLflow's database was migrated without a snapshot"
    api.failing.clear()
    api.calls.clear()
    upgrade(helm, newer)
    changed = [call.kind for call in api.calls if call.verb in ("create", "apply")]
    assert changed.index("RoleBinding") < changed.index("Job") < changed.index("Deployment")
    left = {kind: set(api.all(kind)) for kind in ("Job", "Role", "RoleBinding", "ServiceAccount")}
    assert "canvastune-mlflow-snapshot" in left.pop("Job"), "its log would be lost"
    assert not any("canvastune-mlflow-snapshot" in names for names in left.values())


def test_a_deleted_claim_comes_back_from_a_snapshot_and_stays(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    for kind in ("Deployment", "PersistentVolumeClaim"):  # as with kubectl
        del api.objects[kind, NAMESPACE, "canvastune-mlflow"]
    values = {"mlflow": {"persistence": {"dataSource": {"name": "before"}}}}
    upgrade(helm, values)
    made = api.all("PersistentVolumeClaim")["canvastune-mlflow"]["spec"]
    assert made["dataSource"]["name"] == "before"
    assert server(api)["replicas"] == 1
    upgrade(helm, values)
    with pytest.raises(helm_python.HelmReleaseError, match="spec is immutable"):
        upgrade(helm, {})  # the documentation says to leave the value
    assert api.all("PersistentVolumeClaim")["canvastune-mlflow"]["spec"] == made


def test_a_failed_upload_is_reported_and_the_next_upgrade_retries(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    kept = claims(api)
    api.failing.add("canvastune-upload")
    with pytest.raises(helm_python.HelmReleaseError, match=r"post-upgrade\b.*canvastune-upload"):
        upgrade(helm, {"images": {"mlflow": {"tag": "9.9"}}})
    assert api.all("Job")["canvastune-upload"]["status"]["failed"] == 1, (
        "the job was deleted, and its log with it"
    )
    assert states(helm)[-1] == "failed"
    api.failing.clear()
    upgrade(helm, {"images": {"mlflow": {"tag": "9.9"}}})
    assert states(helm)[-1] == "deployed"
    assert claims(api) == kept


def test_an_uninstall_keeps_the_claims_and_a_new_install_reuses_them(
    api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    kept = claims(api)
    told = helm.uninstall(NAME, timeout=20)["info"]
    assert all(f"[PersistentVolumeClaim] {name}" in told for name in CLAIMS)
    assert own_objects(api) == {
        "Job/canvastune-upload",
        *(f"PersistentVolumeClaim/{name}" for name in CLAIMS),
    }
    assert api.all("Secret").keys() == SECRETS.keys()
    install(helm)
    assert claims(api) == kept


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"workspace": {"accessMode": "ReadWriteOnce"}},
            r'PersistentVolumeClaim "canvastune-workspace" is invalid: spec: Forbidden',
        ),
        (
            {"mlflow": {"persistence": {"storageClass": "fast"}}},
            r'PersistentVolumeClaim "canvastune-mlflow" is invalid: spec: Forbidden',
        ),
        (
            {"nameOverride": "other", "fullnameOverride": "canvastune"},
            r"spec\.selector: .*\bimmutable\b",
        ),
    ],
)
def test_an_immutable_change_is_rejected_and_a_rollback_fixes_it(
    values: dict[str, Any], words: str, api: FakeApiServer, helm: helm_python.Config
) -> None:
    install(helm)
    kept, first_server = claims(api), copy.deepcopy(server(api))
    with pytest.raises(helm_python.HelmReleaseError, match=words):
        upgrade(helm, values)
    assert claims(api) == kept
    helm.rollback(NAME, version=1, timeout=20)
    assert states(helm)[-1] == "deployed"
    assert server(api) == first_server


def test_a_claim_can_grow(api: FakeApiServer, helm: helm_python.Config) -> None:
    install(helm)
    upgrade(helm, {"workspace": {"size": "1Ti"}})
    assert api.all("PersistentVolumeClaim")["canvastune-workspace"]["spec"]["resources"] == {
        "requests": {"storage": "1Ti"}
    }

"""Snapshots of MLflow's claim: made before an upgrade, and the source of a new claim."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest

from tests.fakes.fake_api_server import NAMESPACE, FakeApiServer
from tests.support.rendered_chart import named, render

CLAIM = "canvastune-mlflow"


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with FakeApiServer() as server:
        server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        yield server


def snapshot(
    api: FakeApiServer, account: Path, cluster_has: str = "volumesnapshots", **values: Any
) -> subprocess.CompletedProcess[str]:
    """Run the script of the job that Helm runs before an upgrade.

    Args:
        account: an empty folder, for what a pod gets of its service account.
        values: those of `mlflow.persistence.snapshot`.
    """
    own = {"snapshot": {"enabled": True, **values}}
    job = named(render({"mlflow": {"persistence": own}}), "Job", f"{CLAIM}-snapshot")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (account / "namespace").write_text(NAMESPACE)
    (account / "token").write_text("token")
    (account / "ca.crt").symlink_to(certifi.where())
    script = (
        container["command"][-1]
        .replace("https://", "http://")
        .replace("/var/run/secrets/kubernetes.io/serviceaccount", str(account))
        .replace("volumesnapshots", cluster_has)
    )
    claim, of_class, keep, seconds, labels = container["args"]
    assert int(seconds) < job["spec"]["activeDeadlineSeconds"], "its reason would not be logged"
    env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.server_port)}
    command = [sys.executable, "-c", script, claim, of_class, keep, "0", labels]
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)


def put_claim(api: FakeApiServer) -> None:
    api.put({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM}})


def test_a_snapshot_is_made_of_the_claim_and_only_the_newest_are_kept(
    api: FakeApiServer, tmp_path: Path
) -> None:
    put_claim(api)
    job = named(
        render({"mlflow": {"persistence": {"snapshot": {"enabled": True}}}}),
        "Job",
        f"{CLAIM}-snapshot",
    )
    labels = json.loads(job["spec"]["template"]["spec"]["containers"][0]["args"][-1])
    assert labels.items() <= job["metadata"]["labels"].items()
    of_someone = {"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "spec": {}}
    for name, its in (("20200101-000000", labels), ("20200102-000000", labels), ("2020", {})):
        api.put({**of_someone, "metadata": {"name": f"{CLAIM}-{name}", "labels": its}})
    told = snapshot(api, tmp_path, className="csi", keep=2)
    assert told.returncode == 0, told.stderr
    by_hand, kept, made = sorted(api.all("VolumeSnapshot"))
    assert (by_hand, kept) == (f"{CLAIM}-2020", f"{CLAIM}-20200102-000000")
    assert api.all("VolumeSnapshot")[made]["spec"] == {
        "source": {"persistentVolumeClaimName": CLAIM},
        "volumeSnapshotClassName": "csi",
    }


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"className": "missing"}, "failed to get snapshot class missing"),
        ({"cluster_has": "podsnapshots"}, "mlflow.persistence.snapshot.enabled to false"),
    ],
)
def test_an_upgrade_without_a_snapshot_stops_with_the_reason(
    how: dict[str, Any], reason: str, api: FakeApiServer, tmp_path: Path
) -> None:
    put_claim(api)
    told = snapshot(api, tmp_path, **how)
    assert told.returncode == 1
    assert reason in told.stderr


def test_a_claim_that_does_not_exist_yet_needs_no_snapshot(
    api: FakeApiServer, tmp_path: Path
) -> None:
    assert snapshot(api, tmp_path).returncode == 0
    assert not api.all("VolumeSnapshot")


def test_the_job_may_do_what_it_does_and_nothing_else() -> None:
    documents = render({"mlflow": {"persistence": {"snapshot": {"enabled": True}}}})
    name = f"{CLAIM}-snapshot"
    assert [
        (rule["resources"], rule.get("resourceNames"), rule["verbs"])
        for rule in named(documents, "Role", name)["rules"]
    ] == [
        (["volumesnapshots"], None, ["create", "get", "list", "delete"]),
        (["persistentvolumeclaims"], [CLAIM], ["get"]),
    ]
    (subject,) = named(documents, "RoleBinding", name)["subjects"]
    assert subject["name"] == named(documents, "ServiceAccount", name)["metadata"]["name"]
    job = named(documents, "Job", name)
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == subject["name"]


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        ("VolumeSnapshot", {"apiGroup": "snapshot.storage.k8s.io"}),
        ("PersistentVolumeClaim", {}),
    ],
)
def test_a_claim_can_be_filled_from_a_snapshot_or_another_claim(
    kind: str, group: dict[str, str]
) -> None:
    source = {"name": "before", "kind": kind}
    documents = render({"mlflow": {"persistence": {"dataSource": source}}})
    claim = named(documents, "PersistentVolumeClaim", CLAIM)
    assert claim["spec"]["dataSource"] == {**source, **group}
    workspace = named(documents, "PersistentVolumeClaim", "canvastune-workspace")
    assert "dataSource" not in workspace["spec"]

"""What keeps MLflow of the chart in operation: metrics, alerts, disruption budgets, backups."""

from __future__ import annotations

import http.server
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from canvastune.tracking.new_store import create_store
from tests.support.rendered_chart import (
    ALL,
    ci_values,
    flag,
    installed,
    named,
    of_kind,
    render,
    server,
)


def test_prometheus_finds_the_metrics_and_is_let_in() -> None:
    documents = render(ci_values("oidc"))
    (monitor,) = of_kind(documents, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    (service,) = of_kind(documents, "Service")
    labels = service["metadata"]["labels"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["path"] == "/metrics"
    assert "--expose-prometheus=/tmp/metrics" in server(documents)["containers"][0]["args"]
    hosts = flag(server(documents)["containers"][0], "allowed-hosts")
    assert "$(POD_IP):5000" in hosts, "Prometheus calls the pod's address"
    peers = of_kind(documents, "NetworkPolicy")[0]["spec"]["ingress"][0]["from"]
    assert {"kubernetes.io/metadata.name": "monitoring"} in [
        peer.get("namespaceSelector", {}).get("matchLabels") for peer in peers
    ]
    assert not of_kind(render({}), "ServiceMonitor"), "a cluster without that operator refuses it"


def test_metrics_of_a_server_with_users_are_read_by_one_of_them() -> None:
    (monitor,) = of_kind(render(ALL), "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["basicAuth"]["username"] == {"name": "mlflow-reader", "key": "username"}


def test_every_alert_is_about_objects_that_the_chart_installs() -> None:
    documents = render(ci_values("oidc"))
    alerts = _alerts(documents)
    backup = named(documents, "CronJob", "canvastune-mlflow-backup")
    claims = [one["metadata"]["name"] for one in of_kind(documents, "PersistentVolumeClaim")]
    expected = {
        "CanvastuneClaimNearlyFull": ("persistentvolumeclaim", claims),
        "CanvastuneMlflowDown": ("deployment", ["canvastune-mlflow"]),
        "CanvastuneBackupFailed": ("job_name", [f"{backup['metadata']['name']}-29397137"]),
    }
    assert alerts.keys() == expected.keys()
    for alert, (label, names) in expected.items():
        expression = alerts[alert]
        matchers = dict(re.findall(r'(\w+)=~?"([^"]+)"', expression))
        assert matchers["namespace"] == "team-a"
        assert all(re.fullmatch(matchers[label], name) for name in names), expression
    assert alerts["CanvastuneClaimNearlyFull"].endswith(" > 0.85")
    assert of_kind(documents, "Deployment")[0]["metadata"]["name"] == "canvastune-mlflow"


def test_alerts_are_off_by_default_and_none_is_about_what_is_not_installed() -> None:
    assert not of_kind(render({}), "PrometheusRule"), "a cluster without that operator refuses it"
    metrics = {"prometheusRule": {"enabled": True, "claimUsedPercent": 90}}
    external = {"existingUri": "https://mlflow.example.com", "metrics": metrics}
    alerts = _alerts(render({"mlflow": external, "workspace": {"existingClaim": "share"}}))
    assert list(alerts) == ["CanvastuneClaimNearlyFull"]
    assert 'persistentvolumeclaim=~"share"' in alerts["CanvastuneClaimNearlyFull"]
    assert alerts["CanvastuneClaimNearlyFull"].endswith(" > 0.9")
    assert "CanvastuneBackupFailed" not in _alerts(render({"mlflow": {"metrics": metrics}}))


def _alerts(documents: list[dict[str, Any]]) -> dict[str, str]:
    """Return the expression of each alert."""
    (rule,) = of_kind(documents, "PrometheusRule")
    (group,) = rule["spec"]["groups"]
    return {one["alert"]: one["expr"] for one in group["rules"]}


def test_several_servers_have_a_disruption_budget_and_one_has_none() -> None:
    several = ci_values("postgres-s3")
    several = {**several, "mlflow": {**several["mlflow"], "autoscaling": {}, "replicas": 2}}
    for documents in (render(several), render(ALL)):
        (budget,) = of_kind(documents, "PodDisruptionBudget")
        selected = budget["spec"]["selector"]["matchLabels"]
        (labels,) = (
            one["spec"]["template"]["metadata"]["labels"]
            for one in of_kind(documents, "Deployment")
            if one["spec"]["replicas"] > 1
        )
        assert selected.items() <= labels.items()
    assert not of_kind(render({}), "PodDisruptionBudget"), "its node could not be drained"


def test_an_autoscaler_chooses_the_number_of_servers() -> None:
    documents = installed("postgres-s3")
    (scaler,), (deployment,) = (
        of_kind(documents, kind) for kind in ("HorizontalPodAutoscaler", "Deployment")
    )
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"], target["name"]) == (
        deployment["apiVersion"],
        deployment["kind"],
        deployment["metadata"]["name"],
    )
    assert "replicas" not in deployment["spec"], "each upgrade would undo the autoscaler's choice"
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 6)
    assert scaler["spec"]["behavior"]["scaleDown"] == {"stabilizationWindowSeconds": 600}
    (metric,) = scaler["spec"]["metrics"]
    assert metric["resource"] == {
        "name": "cpu",
        "target": {"type": "Utilization", "averageUtilization": 80},
    }
    assert of_kind(documents, "PodDisruptionBudget"), "a drained node could stop all servers"
    assert not of_kind(installed("default"), "HorizontalPodAutoscaler")


def run_copy(name: str, folder: Path, **values: Any) -> subprocess.CompletedProcess[str]:
    """Run the script of the backup's or the restoration's container, with the claim in a folder.

    Args:
        values: the values of `mlflow.backup`, and for the restoration `server`, MLflow's address,
            and BACKUP.
    """
    address, chosen = values.pop("server", None), values.pop("BACKUP", None)
    documents = render({"mlflow": {"backup": {"enabled": True, **values}}})
    job = named(documents, "CronJob", f"canvastune-mlflow-{name}")["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {one["name"]: chosen or one["value"] for one in container.get("env", ())}
    script = container["command"][-1].replace('"/mlflow"', repr(str(folder)))
    args = container["args"]
    if name == "restore":
        assert args == ["http://canvastune-mlflow.team-a.svc.cluster.local:5000/health"]
        args = [address or "http://127.0.0.1:9/health"]  # the port of nothing
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)


def test_a_backup_is_a_whole_database_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table runs (name text)")
        database.execute("insert into runs values ('a')")
    (tmp_path / "backups").mkdir()
    for day in ("20200101", "20200102"):
        (tmp_path / "backups" / f"mlflow-{day}-000000.db").touch()
    assert run_copy("backup", tmp_path, keep=2).returncode == 0
    kept = sorted(file.name for file in (tmp_path / "backups").iterdir())
    assert len(kept) == 2
    assert kept[0] == "mlflow-20200102-000000.db"
    with sqlite3.connect(tmp_path / "backups" / kept[1]) as copy_:
        assert copy_.execute("select name from runs").fetchall() == [("a",)]


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a claim with a backup of a run, whose databases were then destroyed."""
    folder = tmp_path_factory.mktemp("claim")
    create_store(folder / "mlflow.db", mlflow.__version__)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.create_run(client.create_experiment("canvastune"), run_name="rank16")
    client.log_metric(run.info.run_id, "exact_match", 0.25)
    with closing(sqlite3.connect(folder / "auth.db")) as users:
        users.execute("create table users (name text)")
    assert run_copy("backup", folder).returncode == 0
    for name in ("mlflow.db", "mlflow.db-journal", "auth.db"):
        (folder / name).write_bytes(b"not a database" * 1000)
    return folder


def test_a_backup_brings_back_the_runs_of_a_lost_database(lost: Path, tmp_path: Path) -> None:
    claim = shutil.copytree(lost, tmp_path / "claim")
    told = run_copy("restore", claim)
    assert told.returncode == 0, told.stderr
    client = mlflow.MlflowClient(f"sqlite:///{claim}/mlflow.db")
    experiment = client.get_experiment_by_name("canvastune")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.data.metrics) == ("rank16", {"exact_match": 0.25})
    with closing(sqlite3.connect(claim / "auth.db")) as users:
        assert users.execute("select count(*) from users").fetchone() == (0,)
    (aside,) = claim.glob("replaced-*")
    assert {file.name for file in aside.iterdir()} == {"mlflow.db", "mlflow.db-journal", "auth.db"}


def test_a_restoration_that_cannot_succeed_changes_nothing(lost: Path, tmp_path: Path) -> None:
    claim = shutil.copytree(lost, tmp_path / "claim")
    (made,) = (file.stem.removeprefix("mlflow-") for file in claim.glob("backups/mlflow-*.db"))
    (claim / "backups" / "mlflow-20200101-000000.db").write_bytes(b"half a co")
    (claim / "backups" / "mlflow-20200102-000000.db").touch()
    (claim / "backups" / "mlflow-old.db").touch()
    before = {file: file.read_bytes() for file in claim.rglob("*") if file.is_file()}
    with _Healthy(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/health"
        refused = {
            "scale its Deployment to 0": {"server": address},
            f"one of 20200101-000000, 20200102-000000, {made}\n": {"BACKUP": "yesterday"},
            "is damaged: file is not a database": {"BACKUP": "20200101-000000"},
            "is damaged: it has no tables": {"BACKUP": "20200102-000000"},
        }
        for reason, how in refused.items():
            told = run_copy("restore", claim, **how)
            assert told.returncode == 1
            assert reason in told.stderr
        server.shutdown()
    assert {file: file.read_bytes() for file in claim.rglob("*") if file.is_file()} == before


class _Healthy(http.server.HTTPServer):
    """A server that answers, if only that it has no such page."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.recv(1024)
        request.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")


def test_a_restoration_starts_only_by_hand_and_without_the_server() -> None:
    documents = installed("oidc")
    backup, restore = (
        named(documents, "CronJob", f"canvastune-mlflow-{name}")["spec"]
        for name in ("backup", "restore")
    )
    assert (restore["suspend"], backup.get("suspend")) == (True, None)
    pods = [one["jobTemplate"]["spec"]["template"]["spec"] for one in (backup, restore)]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    assert "podAffinity" in pods[0]["affinity"]
    assert "affinity" not in pods[1], "it would wait for a pod of the server, which is stopped"
    assert restore["jobTemplate"]["spec"]["backoffLimit"] == 0

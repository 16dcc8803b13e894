"""What keeps MLflow of the chart in operation: metrics, alerts, disruption budgets, backups."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.rendered_chart import (
    ALL,
    ci_values,
    flag,
    installed,
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
    (backup,) = of_kind(documents, "CronJob")
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


def test_a_backup_is_a_whole_database_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    """Run the script of the backup's container."""
    (job,) = of_kind(render({"mlflow": {"backup": {"enabled": True, "keep": 2}}}), "CronJob")
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table runs (name text)")
        database.execute("insert into runs values ('a')")
    (tmp_path / "backups").mkdir()
    for day in ("20200101", "20200102"):
        (tmp_path / "backups" / f"mlflow-{day}-000000.db").touch()
    script = container["command"][-1].replace('"/mlflow"', repr(str(tmp_path)))
    subprocess.run([sys.executable, "-c", script, *container["args"]], check=True)
    kept = sorted(file.name for file in (tmp_path / "backups").iterdir())
    assert len(kept) == 2
    assert kept[0] == "mlflow-20200102-000000.db"
    with sqlite3.connect(tmp_path / "backups" / kept[1]) as copy_:
        assert copy_.execute("select name from runs").fetchall() == [("a",)]

"""The chart's MLflow server: reachable by its names, migrated, files kept, passwords hidden."""

from __future__ import annotations

import configparser
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow import db as mlflow_db
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_password

from canvastune.tracking.client import _DEFAULT_NOTE
from canvastune.tracking.new_store import SCRIPT
from tests.support.dashboard import dashboard, unserved
from tests.support.rendered_chart import (
    cluster,
    every_server,
    flag,
    installed,
    named,
    of_kind,
    render,
    server,
)
from tools.chart_table import CHART


def service_names(documents: list[dict[str, Any]]) -> list[str]:
    service = of_kind(documents, "Service")[0]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    names = [name, f"{name}.team-a", f"{name}.team-a.svc", f"{name}.team-a.svc.cluster.local"]
    return [spelled for each in names for spelled in (each, f"{each}:{port}")]


@every_server
def test_mlflow_accepts_every_name_of_its_service(ci: str) -> None:
    documents = installed(ci)
    container = server(documents)["containers"][0]
    missing = {"localhost", "localhost:*", *service_names(documents)} - set(
        flag(container, "allowed-hosts")
    )
    assert not missing, f"403 Invalid Host header for {missing}"
    assert {f"http://{name}" for name in service_names(documents)} <= set(
        flag(container, "cors-allowed-origins")
    )


def test_mlflow_accepts_the_ingress_and_its_own_pages() -> None:
    documents = installed("ingress-tls-auth")
    container = server(documents)["containers"][0]
    assert {"mlflow.example.com", "*.apps.example.com"} <= set(flag(container, "allowed-hosts"))
    assert {"https://mlflow.example.com", "https://hub.example.com"} <= set(
        flag(container, "cors-allowed-origins")
    )
    rules = of_kind(documents, "Ingress")[0]["spec"]["rules"]
    assert [rule["host"] for rule in rules] == ["mlflow.example.com"]


def test_hosts_of_an_ingress_that_is_off_are_not_trusted() -> None:
    container = server(render({"ingress": {"hosts": ["mlflow.example.com"]}}))["containers"][0]
    assert "mlflow.example.com" not in flag(container, "allowed-hosts")


@pytest.mark.parametrize(
    ("ci", "strategy"),
    [("default", "Recreate"), ("ingress-tls-auth", "Recreate"), ("postgres-s3", None)],
)
def test_old_and_new_server_never_share_a_file(ci: str, strategy: str | None) -> None:
    spec = of_kind(installed(ci), "Deployment")[0]["spec"]
    assert spec.get("strategy", {}).get("type") == strategy


@every_server
def test_database_is_migrated_before_the_new_server(ci: str) -> None:
    pod = server(installed(ci))
    migrate, container = pod["initContainers"][0], pod["containers"][0]
    assert migrate["command"][:2] == ["python", "-c"]
    assert "$(" not in str(migrate["command"]), "a command line shows what is in the address"
    assert migrate["image"] == container["image"]
    address = [
        [variable for variable in each["env"] if variable["name"] == "MLFLOW_BACKEND_STORE_URI"]
        for each in (migrate, container)
    ]
    assert address[0] == address[1], "another database is migrated than is served"


def test_a_new_database_says_which_runs_its_default_experiment_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the init container's script twice: it keeps what a person wrote since."""
    uri, note = f"sqlite:///{tmp_path}/server.db", "mlflow.note.content"
    script = server(render({}))["initContainers"][0]["command"][2]
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", uri)
    with monkeypatch.context() as patch, sqlite3.connect(tmp_path / "server.db") as made:
        tables = SCRIPT.read_text(encoding="utf-8")  # MLflow's own take two seconds
        patch.setattr(mlflow_db.upgrade, "callback", lambda _: made.executescript(tables))
        exec(script, {})
    client = MlflowClient(uri)
    found = client.get_experiment("0")
    assert found.tags == {note: _DEFAULT_NOTE}, "another one than in a store on this machine"
    assert found.artifact_location == "mlflow-artifacts:/0", "the server cannot reach its files"
    client.set_experiment_tag("0", note, "Ours.")
    exec(script, {})
    assert client.get_experiment("0").tags == {note: "Ours."}


def test_startup_may_take_minutes_and_health_is_probed() -> None:
    container = server(render({}))["containers"][0]
    assert (
        container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
        >= 120
    )
    assert {
        container[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    } == {"/health"}


def test_existing_secrets_are_referenced_and_never_copied() -> None:
    documents = installed("postgres-s3")
    env = {variable["name"]: variable for variable in server(documents)["containers"][0]["env"]}
    wanted = {
        "MLFLOW_BACKEND_STORE_URI": ("mlflow-database", "uri"),
        "AWS_ACCESS_KEY_ID": ("mlflow-s3", "AWS_ACCESS_KEY_ID"),
        "AWS_SECRET_ACCESS_KEY": ("mlflow-s3", "AWS_SECRET_ACCESS_KEY"),
    }
    for name, (secret, key) in wanted.items():
        assert env[name]["valueFrom"]["secretKeyRef"] == {"name": secret, "key": key}
    assert cluster(documents)["credentials"] == "canvastune-credentials", (
        "the training pods' and, by the upload, the pipeline steps'"
    )
    assert [
        claim["metadata"]["name"] for claim in of_kind(documents, "PersistentVolumeClaim")
    ] == [], "an unused claim"


def test_passwords_have_a_separate_database(tmp_path: Path) -> None:
    """Run the init container's script: it escapes a % in a password and migrates that database."""
    pod = server(installed("ingress-tls-auth"))
    container = pod["initContainers"][1]
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["AUTH_DATABASE_URI"]["valueFrom"]["secretKeyRef"] == {
        "name": "mlflow-database",
        "key": "auth-uri",
    }
    served = {variable["name"] for variable in pod["containers"][0]["env"]}
    assert served >= {
        "MLFLOW_AUTH_CONFIG_PATH",
        "MLFLOW_AUTH_ADMIN_USERNAME",
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    }
    assert "--app-name=basic-auth" in pod["containers"][0]["args"]

    uri = f"sqlite:///{tmp_path}/auth%40.db"
    python, *script = container["command"]
    stub = tmp_path / "mlflow"  # records its calls: importing MLflow takes seconds
    (stub / "server" / "auth").mkdir(parents=True)
    for package in (stub, stub / "server", stub / "server" / "auth"):
        (package / "__init__.py").touch()
    (stub / "server" / "auth" / "__main__.py").write_text("import sys; print(*sys.argv[1:])")
    set_by_chart = {
        name: variable["value"] for name, variable in env.items() if "value" in variable
    }
    given = {
        "AUTH_DATABASE_URI": uri,
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"),
        "PYTHONPATH": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, *script],
        env=set_by_chart | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert python == "python"
    assert ran.stdout.split() == ["db", "upgrade", "--url", uri]
    read = configparser.ConfigParser()
    read.read(tmp_path / "basic_auth.ini")
    assert read["mlflow"]["database_uri"] == uri
    assert read["mlflow"]["default_permission"] == "READ"
    assert (tmp_path / "basic_auth.ini").stat().st_mode & 0o077 == 0, "others can read the password"


def test_the_length_of_a_password_that_the_chart_asks_for_is_mlflow_s() -> None:
    """MLflow does not start with a shorter one (bitnami/charts#35055)."""
    asked = re.search(r"password, at least (\d+) characters", (CHART / "values.yaml").read_text())
    assert asked is not None
    length = int(asked[1])
    _validate_password("x" * length)
    with pytest.raises(MlflowException, match=str(length)):
        _validate_password("x" * (length - 1))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("prefix", ["", "/tools/mlflow"])
def test_the_chart_s_command_line_serves_its_names_and_no_others(
    prefix: str, tmp_path: Path
) -> None:
    path = {"path": prefix or "/", "pathType": "ImplementationSpecific"}
    documents = render(
        {
            "mlflow": {"workers": 1, "pathPrefix": prefix, "metrics": {"enabled": True}},
            "ingress": {  # as in community-charts/helm-charts#285
                **{"enabled": True, "className": "internal", "annotations": {}, "tls": []},
                "hosts": [{"host": "mlflow-test.example.com", "paths": [path]}],
            },
            "networkPolicy": {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
        }
    )
    pod = server(documents)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def adapted(text: str) -> str:
        return (
            text.replace("/mlflow/", f"{tmp_path}/")
            .replace("--port=5000", f"--port={port}")
            .replace("0.0.0.0", "127.0.0.1")
            .replace("=/tmp/metrics", f"={tmp_path}/metrics")
            .replace("$(POD_IP)", "10.1.2.3")
        )

    def status(host: str, path: str = "/api/2.0/mlflow/experiments/search?max_results=1") -> int:
        url = f"http://127.0.0.1:{port}{prefix}{path}"
        request = urllib.request.Request(url, headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def healthy() -> bool:
        try:
            return status("anything", "/health") == 200
        except OSError:
            return False

    env = {
        variable["name"]: adapted(variable.get("value", "10.1.2.3"))
        for variable in pod["containers"][0]["env"]
    }
    environment = {**os.environ, **env, "HOME": str(tmp_path)}
    mlflow = str(Path(sys.executable).parent / "mlflow")
    command = [
        mlflow,
        *pod["containers"][0]["command"][1:],
        *map(adapted, pod["containers"][0]["args"]),
    ]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 150
    try:
        while not healthy():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.3)
        hosts = [*service_names(documents), "localhost:8080", "mlflow-test.example.com"]
        answers = {host: status(host) for host in hosts}
        assert set(answers.values()) == {200}, answers
        assert status("evil.example.com") == 403
        assert status("10.1.2.3:5000") == 200, "probes of older servers and Prometheus get a 403"
        assert status("10.1.2.4:5000") == 403
        helm_test = named(documents, "Pod", "canvastune-test-mlflow")["spec"]["containers"][0][
            "command"
        ]
        address = f"http://127.0.0.1:{port}{prefix}"
        subprocess.run([sys.executable, *helm_test[1:], address], check=True)
        probe = pod["containers"][0]["startupProbe"]["httpGet"]["path"]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}{probe}", timeout=30).status == 200
        metrics = urllib.request.Request(
            f"http://127.0.0.1:{port}/metrics", headers={"Host": "10.1.2.3:5000"}
        )
        with urllib.request.urlopen(metrics, timeout=30) as answer:
            served = answer.read().decode()
        assert unserved(dashboard(installed("oidc")), served) == []
        assert (tmp_path / "mlflow.db").is_file(), "the database is not where the claim is mounted"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def test_mlflow_is_closed_to_namespaces_that_are_not_named() -> None:
    policy = of_kind(installed("ingress-tls-auth"), "NetworkPolicy")[0]["spec"]
    labels = of_kind(installed("ingress-tls-auth"), "Deployment")[0]["spec"]["template"][
        "metadata"
    ]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items(), (
        "the policy selects no pod"
    )
    assert [list(peer) for peer in policy["ingress"][0]["from"]] == [
        ["podSelector"],
        ["namespaceSelector"],
    ]
    assert of_kind(installed("postgres-s3"), "NetworkPolicy")[0]["spec"]["policyTypes"] == [
        "Ingress",
        "Egress",
    ]
    assert not of_kind(render({"networkPolicy": {"enabled": False}}), "NetworkPolicy")

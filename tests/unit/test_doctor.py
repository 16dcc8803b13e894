"""`canvastune doctor` says what is missing in the order to mend it, and works where nothing is installed."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import parse_config
from components.jobs.client import connect_to_cluster
from pipelines.cli import main
from pipelines.doctor import cluster as doctor_cluster
from pipelines.doctor import doctor as doctor_command
from pipelines.doctor import machine as doctor
from pipelines.doctor import sources as doctor_sources
from pipelines.doctor import tracking as doctor_tracking
from pipelines.doctor.finding import DoctorOptions, Finding
from tests.fakes.fake_api_server import FakeApiServer
from tests.fakes.fake_kubeflow import FakeKubeflow
from tests.support.rendered_chart import named, render

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, server or cache of whoever runs the tests."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def _only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


# --- the machine


def test_bare_machine_is_told_what_to_mend_in_order(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-m", "pipelines.cli", "doctor", str(RECIPE), "--tracking-uri", "http://127.0.0.1:9"]  # -S: no package
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert not done.stderr, f"a bare machine breaks the doctor: {done.stderr}"
    lines = done.stdout.splitlines()
    checks = [line.split()[:2] for line in lines[:-1] if "->" not in line]
    assert [name for _, name in checks] == [
        *("python", "packages", "pipeline", "torch", "gpu", "memory", "disk", "disk", "recipe", "tracking", "cluster", "kubeflow")
    ]
    states = {name: state for state, name in checks}
    assert states["packages"] == states["pipeline"] == states["tracking"] == "problem"
    assert states["torch"] == states["recipe"] == states["cluster"] == "skipped", "cannot be looked at before the packages are there"
    assert lines[-1].startswith("3 problems. Mend packages first: ")
    assert "-m pip install torch==" in lines[-1]


def test_another_version_than_the_pinned_one_is_a_problem_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda package: "2.11.0+cpu" if package == "torch" else installed(package))
    packages, pipeline = doctor._packages()
    assert packages.state == "problem"
    assert "and 2.11.0+cpu installed" in packages.found
    assert packages.cure.endswith("-m pip install torch==2.13.0")
    assert pipeline.state == "ok"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("card")
def test_cpu_build_of_torch_on_a_machine_with_a_gpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    found = next(doctor._torch())
    assert (found.name, found.state) == ("torch", "problem")
    assert "NVIDIA H200 (143771 MiB, driver 570.1)" in found.found
    assert "pip install --force-reinstall torch==2.13.0" in found.cure


@pytest.mark.usefixtures("card")
def test_gpu_that_torch_cannot_use_points_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, gpu = doctor._torch()
    assert (gpu.name, gpu.state) == ("gpu", "problem")
    assert "driver" in gpu.cure
    assert "13.0" in gpu.cure


def test_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10**8})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert [found.state for found in doctor._disk()] == ["problem", "problem"]
    assert "HF_HOME" in list(doctor._disk())[1].cure


def test_a_check_that_breaks_does_not_end_the_diagnosis() -> None:
    def breaks() -> Iterator[Finding]:
        raise RuntimeError("no such luck")
        yield

    found = _only(doctor_command._whole("disk", breaks))
    assert (found.state, found.found) == ("problem", "could not be examined: RuntimeError: no such luck")


# --- what a run refers to


def test_broken_recipe_is_a_problem_with_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("name: broken\ndata: {source: rows.jsonl}\nlora: {rnak: 3}\n")
    assert main(["doctor", str(recipe)]) == 1
    said = capsys.readouterr().out
    assert "problem  recipe" in said
    assert "lora.rank" in said
    assert "broken.yaml, as the message says" in said.splitlines()[-1]


def test_mistyped_folder_and_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    config = parse_config({"name": "x", "model": {"id": "./no-model"}, "data": {"source": str(tmp_path / "rosw.jsonl")}})
    model, data = _only(doctor_sources.model(config)), _only(doctor_sources.data(config))
    assert (model.state, data.state) == ("problem", "problem")
    assert "./no-model: no such folder" in model.found
    assert "did you mean" in data.found


def test_local_data_are_opened_and_a_bad_first_row_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    config = parse_config({"name": "x", "data": {"source": str(rows)}})
    rows.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert _only(doctor_sources.data(config)).state == "ok"
    rows.write_text('{"question"\n')
    found = _only(doctor_sources.data(config))
    assert found.state == "warning"
    assert "row 1" in found.found


def test_paths_of_the_cluster_are_not_looked_for_here() -> None:
    tree = {
        "cluster": {"backend": "pytorchjob", "image": "i", "claim": "c"},
        "model": {"id": "/workspace/m"},
        "data": {"source": "/workspace/d"},
    }
    config = parse_config({"name": "x", **tree})
    assert [_only(check(config)).state for check in (doctor_sources.model, doctor_sources.data)] == ["skipped", "skipped"]


Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a loopback server with one answer; returns its address."""
    servers = []

    def start(status: int, body: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "state", "cure"),
    [
        (200, '{"experiments": []}', "ok", ""),
        (200, "<html>a login</html>", "problem", "correct the address"),
        (401, "who are you", "problem", "MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "problem", "--allowed-hosts 127.0.0.1:"),
        (404, "no such page", "problem", "correct the address"),
        (500, "OperationalError", "problem", "its log"),
    ],
)
def test_tracking_server_is_asked_and_its_refusal_explained(serve: Serve, status: int, body: str, state: str, cure: str) -> None:
    found = _only(doctor_tracking._tracking(serve(status, body)))
    assert found.state == state
    assert cure in found.cure


def test_tracking_server_that_is_away_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tracking-uri", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().out
    assert "http://127.0.0.1:9: nobody answers there" in said
    assert "mlflow server" in said.splitlines()[-1]


# --- the cluster


class Cluster(FakeApiServer):
    """Answers access reviews by the rules of a Role as well."""

    rules: list[dict[str, Any]]

    def answer(self, method: str, url: str, content_type: str, data: bytes, account: str = "") -> tuple[int, Any]:
        if url.endswith("/selfsubjectaccessreviews"):
            asked = json.loads(data)["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, [asked["resource"], asked.get("subresource")]))
            allowed = any(
                asked.get("group", "") in rule["apiGroups"] and resource in rule["resources"] and asked["verb"] in rule["verbs"]
                for rule in self.rules
            )
            return 201, {"spec": {"resourceAttributes": asked}, "status": {"allowed": allowed}}
        return super().answer(method, url.removesuffix("/"), content_type, data, account)


def _role() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = named(render({}), "Role", "canvastune-launcher")["rules"]
    return rules


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    server = Cluster()
    with server:
        server.rules = _role()
        (tmp_path / "kubeconfig").write_text(server.kubeconfig)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield server


def test_permissions_that_are_asked_for_are_those_that_the_chart_grants() -> None:
    granted = {(g, r, v) for rule in _role() for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    asked = {(g, r, v) for g, resources in doctor_cluster.PERMISSIONS.items() for r, verbs in resources.items() for v in verbs}
    assert asked == granted


@pytest.mark.usefixtures("cluster")
def test_cluster_with_the_chart_is_in_order() -> None:
    found = list(doctor_cluster.cluster(None, "pytorchjob"))
    assert [(one.name, one.state) for one in found] == [("cluster", "ok"), ("operators", "ok"), ("permissions", "ok")]
    assert "namespace team-a" in found[0].found
    assert found[1].found == "PyTorchJob: cluster.backend=pytorchjob"


@pytest.mark.usefixtures("cluster")
def test_operator_that_the_recipe_needs_and_the_cluster_lacks_is_a_problem() -> None:
    found = {one.name: one for one in doctor_cluster.cluster(None, "trainjob")}["operators"]
    assert found.state == "problem"
    assert "install Kubeflow Trainer" in found.cure
    assert "--set cluster.backend=pytorchjob" in found.cure


def test_refused_permissions_are_named_with_what_grants_them(cluster: Cluster) -> None:
    cluster.rules = [rule for rule in _role() if rule["resources"] != ["events"]]
    cluster.rules[0] = {**cluster.rules[0], "verbs": ["get", "list", "watch"]}
    found = {one.name: one for one in doctor_cluster.cluster("team-b", "local")}["permissions"]
    assert found.state == "warning", "who submits from a laptop makes no job"
    assert "may not create, patch, delete pytorchjobs.kubeflow.org; list events in team-b" in found.found
    assert "permissions.create=true" in found.cure
    client, _ = connect_to_cluster()
    assert doctor_cluster._permissions(client, "team-a", {"pytorchjobs.kubeflow.org"}, inside=True).state == "problem"


def test_cluster_that_is_away_is_a_problem(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text(cluster.kubeconfig.replace(str(cluster.server_port), "9"))
    found = _only(doctor_cluster.cluster(None, "local"))
    assert (found.name, found.state) == ("cluster", "problem")
    assert "nobody answers there" in found.found


@pytest.mark.parametrize("profiles", [(), ("team-a",)])
def test_a_namespace_matters_to_kubeflow_only_where_it_has_profiles(profiles: tuple[str, ...]) -> None:
    with FakeKubeflow(namespaces=profiles) as kubeflow:
        assert _only(doctor_cluster.kubeflow(kubeflow.host, "team-a", None)).state == "ok"


def test_what_lies_on_the_workspace_of_a_cluster_is_not_looked_for_here() -> None:
    config = parse_config({"name": "a", "model": {"id": "/workspace/tiny"}, "data": {"source": "/workspace/rows.jsonl"}})
    for check in (doctor_sources.model, doctor_sources.data):
        assert (_only(check(config)).state, _only(check(config, submitted=True)).state) == ("problem", "skipped")


def test_kubeflow_that_is_away_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.kfp_client._PORT_FORWARD_SECONDS", 0.0)
    assert _only(doctor_cluster.kubeflow("http://127.0.0.1:9", None, None)).state == "problem"


def test_recipe_in_order_ends_with_the_command_that_runs_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "examine", lambda _: iter([Finding("python", "ok", "3.12"), Finding("gpu", "warning", "none")]))
    assert doctor_command.doctor(DoctorOptions("my.yaml", ("lora.rank=8",))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing stands in the way. Next: canvastune run my.yaml --set lora.rank=8"

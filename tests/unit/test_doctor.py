"""`canvastune doctor` reports what is missing in the order to fix it, and works where nothing is
installed.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from inline_snapshot import snapshot

from canvastune.config import parse_config
from canvastune.planner.planner import SHIPPED_CONFIG
from components.jobs.client import connect_to_cluster
from components.jobs.states import TRAINJOB
from pipelines.cli import main
from pipelines.doctor.cluster import (
    PERMISSIONS,
    check_cluster,
    check_kubeflow,
    check_operators,
    check_permissions,
)
from pipelines.doctor.doctor import print_findings, run_check
from pipelines.doctor.finding import DoctorOptions, Finding
from pipelines.doctor.hardware import Gpu, check_hardware
from pipelines.doctor.later_steps import check_evaluation
from pipelines.doctor.machine import check_disk, check_packages, check_torch, installed_version
from pipelines.doctor.sources import check_data, check_model
from pipelines.doctor.tracking import check_tracking
from pipelines.kfp_client import KubeflowClient
from tests.fakes.fake_api_server import FakeApiServer
from tests.fakes.fake_kubeflow import FakeKubeflow
from tests.support.rendered_chart import named, render

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the accounts, servers and caches of the machine that runs the tests."""
    for name in (
        "KUBECONFIG",
        "KUBERNETES_SERVICE_HOST",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_USERNAME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def _only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


# --- the machine


def test_a_bare_machine_gets_what_to_fix_in_order(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-S",
        "-m",
        "pipelines.cli",
        "doctor",
        str(RECIPE),
        "--tracking-uri",
        "http://127.0.0.1:9",
    ]  # -S: no package
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert not done.stderr, f"a bare machine breaks the doctor: {done.stderr}"
    lines = done.stdout.splitlines()
    checks = [line.split()[:2] for line in lines[:-1] if "->" not in line]
    assert [name for _, name in checks] == [
        *(
            "python",
            "packages",
            "pipeline",
            "torch",
            "gpu",
            "memory",
            "disk",
            "disk",
            "recipe",
            "tracking",
            "cluster",
            "kubeflow",
        )
    ]
    states = {name: state for state, name in checks}
    assert states["packages"] == states["pipeline"] == states["tracking"] == "problem"
    assert states["torch"] == states["recipe"] == states["cluster"] == "skipped", (
        "cannot be checked before the packages are installed"
    )
    assert re.search(r"\b3\b.* packages\b.* torch==", lines[-1]), lines[-1]


def test_another_version_than_the_pinned_one_is_a_problem_with_its_command() -> None:
    packages, pipeline = check_packages(
        lambda package: "2.11.0+cpu" if package == "torch" else installed_version(package)
    )
    assert packages.state == "problem"
    assert "found 2.11.0+cpu" in packages.found
    assert packages.fix.endswith("-m pip install torch==2.13.0")
    assert pipeline.state == "ok"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("card")
def test_cpu_build_of_torch_on_a_machine_with_a_gpu_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    found = next(check_torch())
    assert (found.name, found.state) == ("torch", "problem")
    assert "NVIDIA H200 (143771 MiB, driver 570.1)" in found.found
    assert "pip install --force-reinstall torch==2.13.0" in found.fix


@pytest.mark.usefixtures("card")
def test_gpu_that_torch_cannot_use_points_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, gpu = check_torch()
    assert (gpu.name, gpu.state) == ("gpu", "problem")
    assert "driver" in gpu.fix
    assert "13.0" in gpu.fix


def test_full_disk_is_a_problem(tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 10**8})
    found = list(check_disk(tmp_path, lambda _: usage))
    assert [one.state for one in found] == ["problem", "problem"]
    assert "HF_HOME" in found[1].fix


def test_a_check_that_raises_does_not_end_the_others() -> None:
    def breaks() -> Iterator[Finding]:
        raise RuntimeError("luck")
        yield

    found = _only(run_check("disk", breaks))
    assert found.state == "problem"
    assert found.found.endswith(": RuntimeError: luck")


# --- what a recipe asks for

H100 = Gpu("NVIDIA H100", round(79.6e9))
A10, P4 = Gpu("NVIDIA A10", 24 * 10**9), Gpu("Tesla P4", 8 * 10**9)
CPU = {"hardware": {"accelerator": "cpu", "gpu_memory": 12}}


@pytest.mark.parametrize(
    ("tree", "gpus", "memory", "free", "states", "cure"),
    [
        ({}, [], 25e9, 68e9, {"accelerators": "problem", "space": "problem"}, "accelerator=cpu"),
        ({}, [H100] * 2, 1e12, 1e12, {"accelerators": "problem"}, "nproc_per_node=2"),
        ({}, [A10] * 8, 1e12, 1e12, {"accelerators": "warning"}, "gpu_memory=24"),
        ({}, [P4] * 8, 1e12, 1e12, {"accelerators": "problem"}, "gpu_memory=8"),
        ({}, [H100] * 8, 1e12, 1e12, {}, ""),
        ({}, [H100] * 8, 1e12, 100e9, {"space": "problem"}, "HF_HOME"),
        (CPU | {"parallel": {"nproc_per_node": 1, "ep": 1}}, [], 8e9, 1e12, {"plan": "problem"}, ""),
        ({}, [H100] * 8, 1e6, 1e12, {"memory": "problem"}, "async_checkpoints=false"),
        ({"cluster": {"backend": "pytorchjob", "image": "i", "claim": "c"}}, [], 1e9, 1e9,
            {"accelerators": "skipped"}, ""),
    ],
)  # fmt: skip
def test_a_recipe_is_judged_against_the_machine(
    tmp_path: Path,
    tree: dict[str, Any],
    gpus: list[Gpu],
    memory: float,
    free: float,
    states: dict[str, str],
    cure: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.doctor.hardware.find_architecture", lambda _: SHIPPED_CONFIG)
    config = parse_config(yaml.safe_load(RECIPE.read_text()) | tree)
    usage = type("Usage", (), {"free": int(free)})
    findings = check_hardware(
        config,
        tmp_path / "workspace",
        gpus=lambda: gpus,
        memory=lambda: memory,
        disk_usage=lambda _: usage,
    )
    found = {one.name: one for one in findings}
    assert {name: one.state for name, one in found.items() if one.state != "ok"} == states
    assert cure in " ".join(one.fix for one in found.values())


def test_a_tiny_run_fits_a_small_machine(tiny_model: Path, tmp_path: Path) -> None:
    tree = {"name": "x", "model": {"id": str(tiny_model)}, "data": {"source": "rows.jsonl"}, **CPU}
    config = parse_config({**tree, "parallel": {"nproc_per_node": 1, "ep": 1}})
    found = {one.name: one for one in check_hardware(config, tmp_path, memory=lambda: 8e9)}
    assert {name: one.state for name, one in found.items()} == dict.fromkeys(
        ("plan", "accelerators", "space"), "ok"
    )
    found = {one.name: one for one in check_hardware(config, tmp_path, memory=lambda: 1e8)}
    assert found["accelerators"].state == "problem", "the memory holds no process"


def test_small_data_is_split_as_the_run_will(tiny_model: Path, tmp_path: Path) -> None:
    row = {"question": "{0}+1?", "answer": "#### {0}"}
    lines = [json.dumps(row).replace("{0}", str(number)) for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = {"source": str(tmp_path / "rows.jsonl"), "validation_fraction": 0.0001}
    tree = {"name": "x", "model": {"id": str(tiny_model)}, "data": data}
    found = list(check_evaluation(parse_config(tree)))[-1]
    assert (found.name, found.state) == ("data", "problem"), "no row is held out"
    assert "data.validation_fraction (now 0.0001) to 0.3" in found.fix
    tree["data"] = {**data, "validation_fraction": 0.3}
    assert "problem" not in {one.state for one in check_evaluation(parse_config(tree))}


def test_a_checkpoint_without_a_shard_is_a_problem(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = parse_config(
        {"name": "x", "model": {"id": str(tmp_path / "model")}, "data": {"source": "a.jsonl"}}
    )
    assert _only(check_model(config)).state == "ok"
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    assert _only(check_model(config)).state == "problem"


def test_a_database_that_mlflow_cannot_read_is_a_problem(tmp_path: Path) -> None:
    assert _only(check_tracking(None, tmp_path)).state == "skipped"
    (tmp_path / "mlflow.db").write_bytes(os.urandom(4096))
    found = _only(check_tracking(None, tmp_path))
    assert found.state == "problem"
    assert "move it away" in found.fix
    (tmp_path / "mlflow.db").unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("CREATE TABLE experiments (name TEXT, artifact_location TEXT)")
        places = {"Default": "/elsewhere/mlruns/0", "mine": f"file://{tmp_path}/mlartifacts/1"}
        database.executemany("INSERT INTO experiments VALUES (?, ?)", places.items())
        database.commit()
    assert _only(check_tracking(None, tmp_path)).state == "ok"
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "copy")
    found = _only(check_tracking(None, tmp_path / "copy"))
    assert found.state == "warning"
    assert f"{tmp_path}/mlartifacts/1" in found.found


# --- what a run refers to


def test_broken_recipe_is_a_problem_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("name: broken\ndata: {source: rows.jsonl}\nlora: {rnak: 3}\n")
    assert main(["doctor", str(recipe)]) == 1
    printed = capsys.readouterr().out
    assert "problem  recipe" in printed
    assert "lora.rank" in printed
    assert "broken.yaml" in printed.splitlines()[-1]


def test_mistyped_folder_and_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    config = parse_config(
        {
            "name": "x",
            "model": {"id": "./no-model"},
            "data": {"source": str(tmp_path / "rosw.jsonl")},
        }
    )
    model, data = _only(check_model(config)), _only(check_data(config))
    assert (model.state, data.state) == ("problem", "problem")
    assert "model.id: " in model.found
    assert "./no-model" in model.found
    assert "rows.jsonl" in data.fix, "the file that is there is not named"


def test_local_data_are_opened_and_a_bad_first_row_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    config = parse_config({"name": "x", "data": {"source": str(rows)}})
    rows.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert _only(check_data(config)).state == "ok"
    rows.write_text('{"question"\n')
    found = _only(check_data(config))
    assert found.state == "warning"
    assert "row 1" in found.found


def test_paths_in_pods_are_not_checked_here() -> None:
    tree = {
        "cluster": {"backend": "pytorchjob", "image": "i", "claim": "c"},
        "model": {"id": "/workspace/m"},
        "data": {"source": "/workspace/d"},
    }
    config = parse_config({"name": "x", **tree})
    assert [_only(check(config)).state for check in (check_model, check_data)] == [
        "skipped",
        "skipped",
    ]


Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a loopback server with one response; return its address."""
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
        threading.Thread(
            target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "state", "cure"),
    [
        (200, '{"experiments": []}', "ok", ""),
        (200, "<html>a login</html>", "problem", "the address"),
        (401, "who are you", "problem", "MLFLOW_TRACKING_USERNAME"),
        (
            403,
            "Invalid Host header - possible DNS rebinding attack detected",
            "problem",
            "--allowed-hosts 127.0.0.1:",
        ),
        (404, "no such page", "problem", "the address"),
        (500, "OperationalError", "problem", "its log"),
    ],
)
def test_an_error_of_the_tracking_server_is_explained(
    serve: Serve, status: int, body: str, state: str, cure: str
) -> None:
    found = _only(check_tracking(serve(status, body), Path()))
    assert found.state == state
    assert cure in found.fix


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [
        ("2.22.1", "problem", "MLflow 2.22.1, expected 3.5"),
        ("3.17.2", "ok", "MLflow 3.17.2 responds"),
        ("{}", "ok", "MLflow responds"),
    ],
)
def test_an_old_tracking_server_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, version: str, state: str, words: str
) -> None:
    def respond(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        return io.BytesIO(version.encode() if request.full_url.endswith("/version") else b"{}")

    monkeypatch.setattr("urllib.request.urlopen", respond)
    found = _only(check_tracking("http://mlflow:5000/", Path()))
    assert found.state == state
    assert words in found.found


def test_tracking_server_that_does_not_respond_is_a_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--tracking-uri", "http://127.0.0.1:9"]) == 1
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:9: no response" in printed
    assert "mlflow server" in printed.splitlines()[-1]


# --- the cluster


class Cluster(FakeApiServer):
    """A fake API server that also answers access reviews by the rules of a Role."""

    rules: list[dict[str, Any]]
    schemas: Mapping[str, dict[str, Any]] = MappingProxyType({})  # by path

    def answer(
        self, method: str, url: str, content_type: str, data: bytes, account: str = ""
    ) -> tuple[int, Any]:
        if (path := url.partition("?")[0]) in self.schemas:
            return 200, {"components": {"schemas": self.schemas[path]}}
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
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
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
    found = _only(check_cluster(None, "local"))
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
    found = _only(check_cluster(None, "local"))
    assert (found.name, found.state) == ("cluster", "problem")
    assert "no response" in found.found


@pytest.mark.parametrize("profiles", [(), ("team-a",)])
def test_a_namespace_matters_to_kubeflow_only_where_it_has_profiles(
    profiles: tuple[str, ...],
) -> None:
    with FakeKubeflow(namespaces=profiles) as kubeflow:
        assert _only(check_kubeflow(KubeflowClient(kubeflow.host, "team-a"))).state == "ok"


def test_paths_on_the_workspace_volume_are_not_checked_here_for_a_submitted_run() -> None:
    config = parse_config(
        {
            "name": "a",
            "model": {"id": "/workspace/tiny"},
            "data": {"source": "/workspace/rows.jsonl"},
        }
    )
    for check in (check_model, check_data):
        assert (_only(check(config)).state, _only(check(config, submitted=True)).state) == (
            "problem",
            "skipped",
        )


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [
        ("2.14.0", "problem", "expected 2.15"),
        ("2.17.0", "ok", "Kubeflow Pipelines 2.17.0 responds"),
        ("", "ok", "unknown version"),
    ],
)
def test_an_old_kubeflow_is_a_problem(version: str, state: str, words: str) -> None:
    with FakeKubeflow(version=version) as kubeflow:
        found = _only(check_kubeflow(KubeflowClient(kubeflow.host)))
    assert found.state == state
    assert words in found.found


def test_kubeflow_that_does_not_respond_is_a_problem() -> None:
    assert (
        _only(check_kubeflow(KubeflowClient("http://127.0.0.1:9", retry_seconds=0.0))).state
        == "problem"
    )


def test_without_problems_the_last_line_is_the_command_to_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [Finding("python", "ok", "3.12"), Finding("gpu", "warning", "none")]
    assert print_findings(found, DoctorOptions("my.yaml", ("lora.rank=8",))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == snapshot(
        "No problems found. Next: canvastune run my.yaml --set lora.rank=8"
    )

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.hf_api import DatasetInfo
from inline_snapshot import snapshot

from canvastune.config import load_config, parse_config
from canvastune.planner.planner import SHIPPED_CONFIG
from pipelines.cli import main
from pipelines.doctor.doctor import print_findings, run_check
from pipelines.doctor.finding import DoctorOptions, Finding
from pipelines.doctor.hardware import check_hardware
from pipelines.doctor.later_steps import check_evaluation
from pipelines.doctor.machine import (
    Gpu,
    check_disk,
    check_packages,
    check_torch,
    installed_version,
)
from pipelines.doctor.sources import check_data, check_model
from pipelines.doctor.tracking import check_tracking
from pipelines.local_runner import _warn_if_moved
from tests.support.findings import only

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"
pytestmark = pytest.mark.usefixtures("bare_machine")


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

    found = only(run_check("disk", breaks))
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
    states = {one.found: one.state for one in check_evaluation(parse_config(tree))}
    assert "problem" not in states.values()
    assert any(" 4 of 4 held-out " in found for found in states), f"not those of the run: {states}"


def test_a_checkpoint_without_a_shard_is_a_problem(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = parse_config(
        {"name": "x", "model": {"id": str(tmp_path / "model")}, "data": {"source": "a.jsonl"}}
    )
    assert only(check_model(config)).state == "ok"
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    assert only(check_model(config)).state == "problem"


def test_a_database_that_mlflow_cannot_read_is_a_problem(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert only(check_tracking(None, tmp_path)).state == "skipped"
    (tmp_path / "mlflow.db").write_bytes(os.urandom(4096))
    found = only(check_tracking(None, tmp_path))
    assert found.state == "problem"
    assert "move it away" in found.fix
    (tmp_path / "mlflow.db").unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("CREATE TABLE experiments (name TEXT, artifact_location TEXT)")
        places = {"Default": "/elsewhere/mlruns/0", "mine": f"file://{tmp_path}/mlartifacts/1"}
        database.executemany("INSERT INTO experiments VALUES (?, ?)", places.items())
        database.commit()
    assert only(check_tracking(None, tmp_path)).state == "ok"
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "copy")
    found = only(check_tracking(None, tmp_path / "copy"))
    assert found.state == "warning"
    assert f"{tmp_path}/mlartifacts/1" in found.found
    config = load_config(RECIPE)
    for workspace, warnings in ((tmp_path, 0), (tmp_path / "copy", 1)):
        caplog.clear()
        _warn_if_moved(config, workspace)
        assert len(caplog.records) == warnings, "a run would write where the workspace was before"


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
    model, data = only(check_model(config)), only(check_data(config))
    assert (model.state, data.state) == ("problem", "problem")
    assert "model.id: " in model.found
    assert "./no-model" in model.found
    assert "rows.jsonl" in data.fix, "the file that is there is not named"


def test_local_data_are_opened_and_a_bad_first_row_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    config = parse_config({"name": "x", "data": {"source": str(rows)}})
    rows.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert only(check_data(config)).state == "ok"
    rows.write_text('{"question"\n')
    found = only(check_data(config))
    assert found.state == "warning"
    assert "row 1" in found.found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"config": "main"}, "ok"),
        ({"config": "main", "validation": "test"}, "ok"),
        ({}, "data.config"),
        ({"config": "mian"}, "data.config"),
        ({"config": "main", "split": "trian"}, "data.split"),
        ({"config": "main", "validation": "dev"}, "data.validation"),
        ({"config": "other", "split": "anything"}, "ok"),  # whose splits the card does not say
    ],
)
def test_configuration_and_splits_of_a_data_set_on_the_hub_are_those_of_its_card(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], expected: str
) -> None:
    files = [{"split": split, "path": f"main/{split}-*"} for split in ("train", "test")]
    card = DatasetCardData(
        configs=[
            {"config_name": "main", "data_files": files},
            {"config_name": "other", "data_files": "other/*"},
        ]
    )
    info = DatasetInfo(id="team/rows", private=False, tags=[], cardData=card.to_dict())
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: info)
    data = {"source": "team/rows", **settings}
    (finding,) = check_data(parse_config({"name": "x", "data": data}))
    if expected == "ok":
        assert finding.state == "ok"
    else:
        assert (finding.state, finding.found.split(":")[0]) == ("problem", expected)


def test_paths_in_pods_are_not_checked_here() -> None:
    tree = {
        "cluster": {"backend": "pytorchjob", "image": "i", "claim": "c"},
        "model": {"id": "/workspace/m"},
        "data": {"source": "/workspace/d"},
    }
    config = parse_config({"name": "x", **tree})
    assert [only(check(config)).state for check in (check_model, check_data)] == [
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
    found = only(check_tracking(serve(status, body), Path()))
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
    found = only(check_tracking("http://mlflow:5000/", Path()))
    assert found.state == state
    assert words in found.found


def test_tracking_server_that_does_not_respond_is_a_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--tracking-uri", "http://127.0.0.1:9"]) == 1
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:9: no response" in printed
    assert "mlflow server" in printed.splitlines()[-1]


def test_paths_on_the_workspace_volume_are_not_checked_here_for_a_submitted_run() -> None:
    config = parse_config(
        {
            "name": "a",
            "model": {"id": "/workspace/tiny"},
            "data": {"source": "/workspace/rows.jsonl"},
        }
    )
    for check in (check_model, check_data):
        assert (only(check(config)).state, only(check(config, submitted=True)).state) == (
            "problem",
            "skipped",
        )


def test_without_problems_the_last_line_is_the_command_to_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [Finding("python", "ok", "3.12"), Finding("gpu", "warning", "none")]
    assert print_findings(found, DoctorOptions("my.yaml", ("lora.rank=8",))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == snapshot(
        "No problems found. Next: canvastune run my.yaml --set lora.rank=8"
    )

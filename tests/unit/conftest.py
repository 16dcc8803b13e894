"""Data and models that several files of tests share, made once per process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from canvastune.preparation.prepare import prepare_data
from canvastune.tiny_model import write_problems
from tests.support.bad_inputs import LINES, Ground
from tests.support.data_fixtures import TOOL_SPECIAL, make_model, released_template
from tests.support.evaluation import recipe


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_problems(path, "change", 60, seed=0)
    return path


@pytest.fixture(scope="session")
def prepared(problems: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_data(recipe(problems), tiny_model, out)
    return out


@pytest.fixture(scope="session")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model", moe_intermediate_size=16)


@pytest.fixture
def ground(sound_model: Path, tmp_path: Path) -> Ground:
    shutil.copytree(sound_model, tmp_path / "model")
    ground = Ground(tmp_path)
    (tmp_path / "data.jsonl").write_bytes(LINES)
    ground.write()
    return ground


@pytest.fixture(scope="session")
def released_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), released_template(), special=TOOL_SPECIAL)


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints whose names say which is which."""
    for name in ("base", "tuned"):
        (tmp_path / name).symlink_to(tiny_model)
    return tmp_path / "base", tmp_path / "tuned"


@pytest.fixture
def without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose charts are not drawn, which takes seconds: test_report has them drawn."""
    for draw in ("draw_chart_file", "draw_chart_image"):
        monkeypatch.setattr(f"canvastune.report.build.{draw}", lambda *_: "")


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

"""What several test files share.

Imports that take seconds are in the fixtures: the process that only hands out tests loads this, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from canvastune.logging import configure_logging
from tests.fakes.tracking_server import no_outer_mlflow
from tools.loss_compare.side import Side

if TYPE_CHECKING:
    from tests.support.cluster_stage import Cluster

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is imported: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Our Triton kernels in Python, where there is no GPU; read when Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

_DURATIONS = Path(__file__).with_name("durations.json")  # seconds by file, by tools/durations.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that the processes of `make test` finish together."""
    seconds = json.loads(_DURATIONS.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0))


@pytest.fixture(autouse=True)
def text_logs() -> None:
    """Log to the standard streams, as programs do, so that `capsys` sees what a person would."""
    configure_logging()


@pytest.fixture(scope="session", autouse=True)
def _names_of_callers_alone() -> Iterator[None]:
    """Kubeflow's compiler asks for the stack at every setting of a task, to name its caller in an
    error. With the modules of all tests, `inspect.stack` takes seconds for each pipeline.
    """

    def stack() -> list[tuple[Any, ...]]:
        frame = sys._getframe(1)
        callers = [frame, frame.f_back]
        return [(each, "", 0, each and each.f_code.co_name) for each in callers]

    from kfp.dsl import pipeline_task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=stack))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny random DiffusionGemma; tests do not write to its folder."""
    from canvastune.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The commands of this tree as processes that are forked from one that has imported the
    libraries.
    """
    root = Path(__file__).parents[1]
    with Side(root, tmp_path_factory.mktemp("commands") / "here") as side:
        yield side


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small model for numerics; tests do not write to its folder.

    It has two layers, one of each kind, or a module's SLIDING_LAYERS and one.
    """
    from tests.support.small import write_checkpoint

    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder, sliding=getattr(request.module, "SLIDING_LAYERS", 1))
    return folder


@pytest.fixture(scope="session")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a config.json for plans; tests do not write to its folder."""
    from tests.support.small import write_middling

    folder = tmp_path_factory.mktemp("middling")
    write_middling(folder)
    return folder


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def own_mlflow() -> Iterator[None]:
    """No MLflow but the test's own."""
    with no_outer_mlflow():
        yield


@pytest.fixture(params=["pytorchjob", "trainjob"])
def cluster(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Cluster]:
    """A cluster with one kind of job, then with the other."""
    from tests.support.cluster_stage import stage

    yield from stage(request.param, capsys, monkeypatch)


@pytest.fixture
def pytorch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """A cluster with PyTorchJobs."""
    from tests.support.cluster_stage import stage

    yield from stage("pytorchjob", capsys, monkeypatch)


@pytest.fixture(scope="module")
def role() -> list[Mapping[str, Any]]:
    """The rules that the chart gives to the account that runs pipeline steps."""
    from tests.support.rendered_chart import installed, of_kind

    (found,) = [
        role
        for role in of_kind(installed("default"), "Role")
        if role["metadata"]["name"].endswith("launcher")
    ]
    return list(found["rules"])

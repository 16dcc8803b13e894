"""`canvastune doctor`: what this machine has and lacks for a run, in the order in which to mend it.

It must work where nothing is installed yet, so this room imports the standard library alone; all else is tried where it is asked about.
"""

from __future__ import annotations

import base64
import csv
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from canvastune.errors import UserError

if TYPE_CHECKING:
    from canvastune.config import RunConfig

OLDEST_PYTHON = (3, 11)
_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_SECONDS = 10.0  # that a server gets to answer in
_LITTLE_DISK, _LITTLE_MEMORY = 5e9, 4e9  # bytes below which even the tiny model's run is in danger
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do about it ("" where nothing is to be done)."""

    name: str
    state: Literal["ok", "warning", "problem", "skipped"]
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Question:
    """What the person wants examined beyond the machine itself; None: not given."""

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    tracking_uri: str | None = None
    namespace: str | None = None
    host: str | None = None
    token_file: Path | None = None


def doctor(question: Question) -> int:
    """Print a line per check as it is made, and last what to do next; returns 1 if there is a problem, else 0."""
    findings = []
    for finding in examine(question):
        findings.append(finding)
        print(f"{finding.state:<9}{finding.name:<13}{finding.found}", flush=True)
        if finding.cure:
            print(f"{'':<22}-> {finding.cure}", flush=True)
    problems = [finding for finding in findings if finding.state == "problem"]
    if problems:
        print(f"{len(problems)} problem{'s' * (len(problems) > 1)}. Mend {problems[0].name} first: {problems[0].cure}")
        return 1
    print(f"nothing stands in the way. Next: {_next(question)}")
    return 0


def examine(question: Question) -> Iterator[Finding]:
    """Every check, in the order in which to mend: what stands on something else comes after it."""
    yield from _whole("python", _python)
    yield from _whole("packages", _packages)
    yield from _whole("torch", _torch)
    yield from _whole("memory", _memory)
    yield from _whole("disk", _disk)
    config: RunConfig | None = None
    if question.recipe is not None:
        config, finding = _recipe(question)
        yield finding
    if config is not None:
        yield from _whole("model", lambda: _model(config, question.host is not None))
        yield from _whole("data", lambda: _data(config, question.host is not None))
    elif question.recipe is None:
        yield Finding("model, data", "skipped", "no recipe was named", "canvastune doctor RECIPE looks for its model and data too")
    uri = question.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or (config.tracking.uri if config else None)
    yield from _whole("tracking", lambda: _tracking(uri))
    from pipelines import doctor_cluster

    backend = config.cluster.backend if config else "local"
    yield from _whole("cluster", lambda: doctor_cluster.cluster(question.namespace, backend))
    yield from _whole("kubeflow", lambda: doctor_cluster.kubeflow(question.host, question.namespace, question.token_file))


def _whole(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check's findings; one that breaks is itself a finding, and the others are still made."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(name, "problem", str(error), "see the message")
    except ImportError as error:
        yield Finding(name, "skipped", f"needs the package {error.name}", "install the packages above first")
    except Exception as error:  # a diagnosis goes on where a program would not
        yield Finding(
            name, "problem", f"could not be examined: {type(error).__name__}: {' '.join(str(error).split())[:200]}", "report this"
        )


# --- the machine


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()}"
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding(
            "python", "problem", found, f"install Python {wanted} or newer, and make the environment anew: python{wanted} -m venv .venv"
        )
    elif sys.platform != "linux":
        yield Finding("python", "warning", f"{found}; only Linux is tested")
    else:
        yield Finding("python", "ok", found)


def _packages() -> Iterator[Finding]:
    for name, requirements in _requirements().items():
        missing, other, count = [], [], 0
        for text in requirements:
            count += 1
            version = _installed(re.split(r"[^\w.-]", text, maxsplit=1)[0])
            if version is None:
                missing.append(text)
            elif not _fits(text, version):
                other.append((text, version))
        if not missing and not other:
            yield Finding(name, "ok", f"{count} packages at the versions that pyproject.toml asks for")
            continue
        found = [f"missing {', '.join(missing)}"] if missing else []
        found += [f"{text} is wanted and {version} installed" for text, version in other]
        wanted = " ".join(shlex.quote(text) for text in (*missing, *(text for text, _ in other)))
        yield Finding(name, "problem", "; ".join(found), f"{_shown_python()} -m pip install {wanted}")


def _requirements() -> dict[str, list[str]]:
    """What the engine and the pipeline ask for, from the checkout or, without one, from the installed package."""
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        return {"packages": project["dependencies"], "pipeline": project["optional-dependencies"]["pipeline"]}
    every = importlib.metadata.requires("canvastune") or []
    return {
        "packages": [line for line in every if "extra ==" not in line],
        "pipeline": [line.partition(";")[0].strip() for line in every if re.search(r"extra == .pipeline", line)],
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with the packages that are missing then
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _torch() -> Iterator[Finding]:
    cards = _cards()
    try:
        import torch
    except ImportError as error:
        missing = _installed("torch") is None
        found = "torch is not installed" if missing else f"torch does not load: {error}"
        yield Finding("torch", "skipped" if missing else "problem", found, "" if missing else _reinstall())
        yield Finding("gpu", "skipped", "; ".join(cards) or "none found")
        return
    if torch.version.cuda is None and torch.version.hip is None:
        if cards:
            yield Finding(
                "torch", "problem", f"{torch.__version__}: a build for CPUs, and this machine has {'; '.join(cards)}", _reinstall()
            )
        else:
            yield Finding("torch", "ok", f"{torch.__version__}, a build for CPUs")
    else:
        yield Finding("torch", "ok", f"{torch.__version__}, a build for CUDA {torch.version.cuda or torch.version.hip}")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        yield Finding("gpu", "ok", "; ".join(f"{device.name}, {device.total_memory / _GB:.0f} GB" for device in devices))
    elif cards and torch.version.cuda is not None:
        found = f"{'; '.join(cards)}: torch cannot use it"
        yield Finding("gpu", "problem", found, f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or restart after an update")
    elif not cards:
        yield Finding("gpu", "warning", "none found: enough for the tiny recipes and for submitting, not for the released model")


def _cards() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as the driver knows them; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ["an NVIDIA GPU whose nvidia-smi does not answer"]
    if done.returncode:
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [f"{name} ({memory}, driver {driver})" for name, memory, driver in rows]


def _reinstall() -> str:
    (wanted,) = [line for line in _requirements()["packages"] if line.startswith("torch=")]
    return f"from PyPI, not from an index of CPU builds: {_shown_python()} -m pip install --force-reinstall {wanted}"


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{total / _GB:.0f} GB of memory, {cores} cores"
    if total < _LITTLE_MEMORY or cores < 2:
        yield Finding("memory", "warning", found, f"the tiny run was tried on 2 cores and wants {_LITTLE_MEMORY / _GB:.0f} GB")
    else:
        yield Finding("memory", "ok", found)


def _disk() -> Iterator[Finding]:
    places = {"the current folder": (Path.cwd(), "work in a folder on a larger disk, or give --workspace DIR")}
    places["the Hub's cache"] = hub_cache(), "point HF_HOME to a larger disk"
    for what, (place, cure) in places.items():
        path = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(path).free
        found = f"{free / _GB:,.0f} GB free for {what} ({path})"
        if not os.access(path, os.W_OK):
            yield Finding("disk", "problem", f"{what} may not be written ({path})", cure.replace("larger", "writable"))
        elif free < _LITTLE_DISK:
            yield Finding("disk", "problem", found, cure)
        else:
            yield Finding("disk", "ok", found)


def hub_cache() -> Path:
    """Where the Hub's files are kept, as its own library decides."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


# --- what a run refers to


def _recipe(question: Question) -> tuple[RunConfig | None, Finding]:
    try:
        from canvastune.config import load_config

        config = load_config(str(question.recipe), list(question.overrides))
    except ImportError as error:
        return None, Finding("recipe", "skipped", f"needs the package {error.name}", "install the packages above first")
    except UserError as error:
        return None, Finding("recipe", "problem", str(error), f"correct {question.recipe}, as the message says")
    return config, Finding(
        "recipe", "ok", f"{config.name}: {config.train.method}, {config.train.steps} steps, cluster.backend={config.cluster.backend}"
    )


def _model(config: RunConfig, submitted: bool) -> Iterator[Finding]:
    from pipelines.doctor_sources import model

    yield from model(config, submitted)


def _data(config: RunConfig, submitted: bool) -> Iterator[Finding]:
    from pipelines.doctor_sources import data

    yield from data(config, submitted)


def _tracking(uri: str | None) -> Iterator[Finding]:
    if uri is None:
        yield Finding("tracking", "skipped", "no server is named: a run on this machine keeps mlflow.db in its workspace")
        return
    if not uri.startswith(("http://", "https://")):
        yield Finding("tracking", "skipped", f"{uri} is not a server over HTTP")
        return
    uri = uri.rstrip("/")
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", headers=_credentials())
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(2000).decode(errors="replace").split())[:120]
        yield Finding("tracking", "problem", f"{uri} answers {error.code}: {said}", _tracking_cure(uri, error.code))
    except ValueError:
        yield Finding("tracking", "problem", f"{uri} answers, but not as MLflow", "correct the address: MLflow's, without a path below it")
    except OSError as error:
        cure = "start it (mlflow server --port 5000), or correct --tracking-uri or MLFLOW_TRACKING_URI"
        yield Finding("tracking", "problem", f"{uri}: nobody answers there ({getattr(error, 'reason', None) or error})", cure)
    else:
        yield Finding("tracking", "ok", f"MLflow answers at {uri}")


def _tracking_cure(uri: str, status: int) -> str:
    host = uri.partition("://")[2].partition("/")[0]
    if status == 401:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 403:
        return (
            f"the server is not told to answer as {host}: start it with --allowed-hosts {host} (chart: mlflow.extraAllowedHosts), "
            "or, if it has users, ask for the right to read its experiments"
        )
    if status >= 500:
        return "the server runs and its store does not answer it: look at its log and at its database"
    return "correct the address: MLflow's, without a path below it"


def _credentials() -> dict[str, str]:
    """The Authorization header that MLflow's own client would send from the environment."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{what}") for what in ("USERNAME", "PASSWORD"))
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {}


def _shown_python() -> str:
    """This Python as it can be typed here."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _next(question: Question) -> str:
    if question.recipe is None:
        return "canvastune demo"
    settings = "".join(f" --set {shlex.quote(one)}" for one in question.overrides)
    if question.host is not None:
        return f"canvastune submit {question.recipe} --host {question.host}{settings} --wait"
    return f"canvastune run {question.recipe}{settings}"

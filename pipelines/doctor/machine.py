"""`canvastune doctor`: what this machine has and lacks for a run, in the order in which to mend it.

It must work where nothing is installed yet, so this room imports the standard library alone; all else is tried where it is asked about.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.errors import UserError
from pipelines.doctor.finding import DoctorOptions, Finding

if TYPE_CHECKING:
    from canvastune.config import RunConfig

OLDEST_PYTHON = (3, 11)
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_SECONDS = 10.0  # that a server gets to answer in
_LITTLE_DISK, _LITTLE_MEMORY = 5e9, 4e9  # bytes below which even the tiny model's run is in danger
_GB = 1e9


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
        yield Finding(name, "problem", "; ".join(found), f"{python_command()} -m pip install {wanted}")


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
    return f"from PyPI, not from an index of CPU builds: {python_command()} -m pip install --force-reinstall {wanted}"


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


def _recipe(question: DoctorOptions) -> tuple[RunConfig | None, Finding]:
    try:
        from canvastune.config import load_config

        config = load_config(str(question.recipe), list(question.overrides))
    except ImportError as error:
        return None, Finding("recipe", "skipped", f"needs the package {error.name}", "install the packages above first")
    except UserError as error:
        return None, Finding("recipe", "problem", f"{error}. {error.hint}".strip(), f"correct {question.recipe}, as the message says")
    return config, Finding(
        "recipe", "ok", f"{config.name}: {config.train.method}, {config.train.steps} steps, cluster.backend={config.cluster.backend}"
    )


def _model(config: RunConfig, submitted: bool) -> Iterator[Finding]:
    from pipelines.doctor.sources import model

    yield from model(config, submitted)


def _data(config: RunConfig, submitted: bool) -> Iterator[Finding]:
    from pipelines.doctor.sources import data

    yield from data(config, submitted)


def python_command() -> str:
    """This Python as it can be typed here."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

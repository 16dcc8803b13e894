"""Check Python, packages, torch, memory and disk; imports only the standard library."""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.doctor.finding import Finding

OLDEST_PYTHON = (3, 11)
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_MIN_DISK, _MIN_MEMORY = 5e9, 4e9  # bytes below which even the run of the tiny model may fail
_GB = 1e9


def check_python() -> Iterator[Finding]:
    """Check the version of Python and the operating system."""
    found = f"{platform.python_version()} on {platform.system()}"
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        fix = f"install Python {wanted} or newer; then: python{wanted} -m venv .venv"
        yield Finding("python", "problem", found, fix)
    elif sys.platform != "linux":
        yield Finding("python", "warning", f"{found}; only Linux is tested")
    else:
        yield Finding("python", "ok", found)


def check_packages(installed: Callable[[str], str | None] | None = None) -> Iterator[Finding]:
    """Compare the installed packages with those that pyproject.toml requires.

    Args:
        installed: returns the version of an installed package, or None; default: as
            `importlib.metadata` knows it.
    """
    installed = installed or installed_version
    for name, requirements in _requirements().items():
        missing, other = [], []
        for text in requirements:
            version = installed(re.split(r"[^\w.-]", text, maxsplit=1)[0])
            if version is None:
                missing.append(text)
            elif not _fits(text, version):
                other.append((text, version))
        if not missing and not other:
            yield Finding(
                name,
                "ok",
                f"{len(requirements)} packages at the versions that pyproject.toml requires",
            )
            continue
        found = [f"missing {', '.join(missing)}"] if missing else []
        found += [f"{text} is required, found {version}" for text, version in other]
        wanted = " ".join(shlex.quote(text) for text in (*missing, *(text for text, _ in other)))
        yield Finding(
            name, "problem", "; ".join(found), f"{python_command()} -m pip install {wanted}"
        )


def _requirements() -> dict[str, list[str]]:
    """Return the requirements in pyproject.toml or, without it, in the installed package."""
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        return {
            "packages": project["dependencies"],
            "pipeline": project["optional-dependencies"]["pipeline"],
        }
    every = importlib.metadata.requires("canvastune") or []
    return {
        "packages": [line for line in every if "extra ==" not in line],
        "pipeline": [
            line.partition(";")[0].strip()
            for line in every
            if re.search(r"extra == .pipeline", line)
        ],
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # `packaging` is one of the missing packages then
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def check_torch() -> Iterator[Finding]:
    """Check that torch loads, and that it can use the GPUs of this machine."""
    gpus = _gpus()
    try:
        import torch
    except ImportError as error:
        missing = installed_version("torch") is None
        found = "torch is not installed" if missing else f"torch does not load: {error}"
        yield Finding(
            "torch",
            "skipped" if missing else "problem",
            found,
            "" if missing else _reinstall_command(),
        )
        yield Finding("gpu", "skipped", "; ".join(gpus) or "none found")
        return
    if torch.version.cuda is None and torch.version.hip is None:
        if gpus:
            found = f"{torch.__version__}: a CPU build, but this machine has {'; '.join(gpus)}"
            yield Finding("torch", "problem", found, _reinstall_command())
        else:
            yield Finding("torch", "ok", f"{torch.__version__}, a CPU build")
    else:
        yield Finding(
            "torch",
            "ok",
            f"{torch.__version__}, a build for CUDA {torch.version.cuda or torch.version.hip}",
        )
    if usable := find_gpus():
        found = "; ".join(f"{gpu.name}, {gpu.memory / _GB:.0f} GB" for gpu in usable)
        yield Finding("gpu", "ok", found)
    elif gpus and torch.version.cuda is not None:
        found = f"{'; '.join(gpus)}: torch cannot use it"
        cuda = torch.version.cuda
        fix = f"update the NVIDIA driver to one for CUDA {cuda}, or restart after an update"
        yield Finding("gpu", "problem", found, fix)
    elif not gpus:
        found = "none found; enough for the tiny recipes and for submitting, but not for the released model"
        yield Finding("gpu", "warning", found)


@dataclass(frozen=True)
class Gpu:
    """An accelerator of this machine."""

    name: str
    memory: int  # bytes


def find_gpus() -> list[Gpu]:
    """Return the GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(each) for each in range(torch.cuda.device_count())]
    return [Gpu(each.name, each.total_memory) for each in found]


def _gpus() -> list[str]:
    """Return name, memory and driver of each NVIDIA GPU, as nvidia-smi reports them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ["an NVIDIA GPU whose nvidia-smi does not respond"]
    if done.returncode:
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [f"{name} ({memory}, driver {driver})" for name, memory, driver in rows]


def _reinstall_command() -> str:
    (wanted,) = [line for line in _requirements()["packages"] if line.startswith("torch=")]
    command = f"{python_command()} -m pip install --force-reinstall {wanted}"
    return f"install it from PyPI, not from an index of CPU builds: {command}"


def check_memory() -> Iterator[Finding]:
    """Check the memory and CPU cores that this process may use."""
    total, own = host_memory(), usable_cpus()
    found = f"{total / _GB:.0f} GB of memory, {own} cores"
    if total < _MIN_MEMORY or own < 2:
        yield Finding(
            "memory",
            "warning",
            found,
            f"the tiny run is tested on 2 cores and needs {_MIN_MEMORY / _GB:.0f} GB",
        )
    else:
        yield Finding("memory", "ok", found)


def host_memory() -> int:
    """Return the bytes of memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def usable_cpus() -> int:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_disk(
    workspace: Path, disk_usage: Callable[[Path], Any] = shutil.disk_usage
) -> Iterator[Finding]:
    """Check the free space for the workspace and for the Hub's cache, and that both can be written.

    Args:
        disk_usage: as `shutil.disk_usage`.
    """
    places = {"the workspace": (workspace.absolute(), "use --workspace DIR on a larger disk")}
    places["the Hub's cache"] = hub_cache(), "point HF_HOME to a larger disk"
    for what, (place, fix) in places.items():
        path = next(p for p in (place, *place.parents) if p.exists())
        free = disk_usage(path).free
        found = f"{free / _GB:,.0f} GB free for {what} ({path})"
        if not os.access(path, os.W_OK):
            yield Finding(
                "disk",
                "problem",
                f"{what} is not writable ({path})",
                fix.replace("larger", "writable"),
            )
        elif free < _MIN_DISK:
            yield Finding("disk", "problem", found, fix)
        else:
            yield Finding("disk", "ok", found)


def hub_cache() -> Path:
    """Return the folder of the Hub's cache, as huggingface_hub determines it."""
    home = (
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def python_command() -> str:
    """Return the path of this Python as it can be typed in the current folder."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

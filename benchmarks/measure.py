"""One way to measure: sides that alternate, medians of several rounds, memory above a baseline, and
results with their machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import psutil
import torch
import transformers

from benchmarks.resident import read_status

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int = 5, *, settle: bool = False
) -> dict[str, float]:
    """Median seconds of each side: one warm-up each, then the sides in turn, so that whatever slows
    the machine slows all of them.

    Args:
        settle: at its turn a side runs twice and the second run counts, as in a separate loop: the
            first finds the caches and the
            allocator as the other side left them.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            if settle:
                run()
            seconds[name].append(timed(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds until `run` is done, what it leaves to a GPU included."""
    _finish()
    started = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - started


@contextlib.contextmanager
def worker(
    command: list[str], root: Path, environment: Mapping[str, str]
) -> Iterator[Callable[[Any], Any]]:
    """Start a Python process of a checkout, and yield a function that puts a request to it: a line
    of JSON each way.

    Its OpenMP threads spin for a moment before they sleep, as by default, whatever the policy of
    this process: to wake one for each of a step's thousands of operators takes half of its time.

    Raises:
        RuntimeError: the process has ended.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    process = subprocess.Popen(
        [sys.executable, "-P", *command],
        cwd=root,
        env={**inherited, "PYTHONPATH": str(root), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked: IO[str] = process.stdin
    answered: IO[str] = process.stdout

    def ask(request: Any) -> Any:
        try:
            asked.write(json.dumps(request) + "\n")
            asked.flush()
            line = answered.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{root}: {' '.join(command)} ended with {process.wait()}")
        return json.loads(line)

    try:
        yield ask
    finally:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `ask` reports
            asked.close()
        process.wait()


def extra_memory(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Return the peak memory in bytes while `run` runs, above what was held before.

    On a GPU this is the memory of its tensors, else that of this process (Linux only).
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not in use
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the kernel's high-water mark starts again from here
    before = read_status(os.getpid())["VmRSS"]
    run()
    return read_status(os.getpid())["VmHWM"] - before


def matmul_rate(
    size: int = 2048,
    rounds: int = 7,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """FLOP/s of matmuls of square matrices on this device, on a CPU with torch's current number of
    threads: the best of some.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(rounds))
    return 2 * size**3 / best


def cache_rate(elements: int = 2**18, rounds: int = 2000) -> float:
    """Return the bytes per second that an elementwise product reads and writes in a CPU's caches,
    with torch's current number of threads: the best of some.
    """
    given = torch.randn(elements)
    out = torch.empty_like(given)
    best = min(timed(lambda: torch.mul(given, 1.5, out=out)) for _ in range(rounds))
    return (given.nbytes + out.nbytes) / best


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Return what a figure depends on: commit, device, threads, versions."""
    path = Path("/proc/cpuinfo")
    about = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"^model name\s*: (.*)$", about, re.MULTILINE)
    processor = found[1].strip() if found else platform.machine()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit_of(ROOT, check=False) or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def commit_of(checkout: Path, *, check: bool = True) -> str:
    """Return the commit of a checkout; "" without `check` if it is none."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout.strip()


def python_module(name: str, *arguments: object) -> list[str]:
    """Return the command `python -m NAME ARGUMENTS`."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def read_result(name: str) -> dict[str, Any]:
    """Read results/NAME.json."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def command_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m NAME`, whose help shows the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(name, description=about, formatter_class=formatter)


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """Return the type of an argument that may be left out; argparse's `choices` would refuse that."""

    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {', '.join(known)}")
        return text

    return check


@contextlib.contextmanager
def work_folder(name: str, parent: Path | None, gigabytes: float) -> Iterator[Path]:
    """Yield a temporary folder below `parent` (None: the default) that has so many GB free on its
    disk.
    """
    work = Path(tempfile.mkdtemp(prefix=f"benchmark-{name}-", dir=parent))
    try:
        free = shutil.disk_usage(work).free / 1e9
        if free < gigabytes:
            raise SystemExit(
                f"{work}: {free:.1f} GB free on the disk, {gigabytes:.1f} are needed. Set --work to"
                " a folder on another disk"
            )
        yield work
    finally:
        shutil.rmtree(work)


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    say(name, f"results in {path.relative_to(ROOT)}")
    return path


def say(name: str, line: str) -> None:
    """Print a line of progress."""
    print(f"{name}: {line}", file=sys.stderr, flush=True)

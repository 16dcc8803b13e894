"""The memory of a process, or of a command and the processes it starts, sampled from outside."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

_SECONDS = 0.005  # between samples
_FAMILY_SECONDS = 0.2  # between looks for new processes


@dataclass
class Peak:
    """The highest values of one process, in bytes; a file that is mapped counts as long as the
    kernel leaves its pages in memory.
    """

    anonymous: int = 0  # what the process itself allocated and touched
    file: int = 0
    resident: int = 0  # both at once: the kernel's own high-water mark


class Watch:
    """Samples processes in a thread until it is closed; `peaks` then holds what was seen, by
    process id.
    """

    def __init__(self, pid: int) -> None:
        """
        Args:
            pid: of the process that is watched, with all its children.
        """
        self.peaks: dict[int, Peak] = {}
        self._root = psutil.Process(pid)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _sample(self) -> None:
        rounds = 0
        pids = [self._root.pid]
        while not self._closed.wait(_SECONDS):
            if rounds % round(_FAMILY_SECONDS / _SECONDS) == 0:
                try:
                    pids = [
                        self._root.pid,
                        *(child.pid for child in self._root.children(recursive=True)),
                    ]
                except psutil.NoSuchProcess:
                    return
            rounds += 1
            for pid in pids:
                seen = read_status(pid)
                if seen:
                    peak = self.peaks.setdefault(pid, Peak())
                    peak.anonymous = max(peak.anonymous, seen["RssAnon"])
                    peak.file = max(peak.file, seen["RssFile"])
                    peak.resident = max(peak.resident, seen["VmHWM"])


def run_watched(what: str, command: list[str], environment: dict[str, str]) -> list[Peak]:
    """Run a command; return the peaks of it and its children, the largest first.

    Raises:
        SystemExit: it failed; the message begins with `what`.
    """
    with subprocess.Popen(command, env=environment) as process, Watch(process.pid) as watch:
        code = process.wait()
    if code:
        raise SystemExit(f"{what}: exit code {code}")
    return sorted(watch.peaks.values(), key=lambda peak: -peak.anonymous)


def one_thread() -> dict[str, str]:
    """Return this process's environment for a command with one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def read_status(pid: int) -> dict[str, int]:
    """Read the memory lines of /proc/PID/status in bytes; empty once the process has exited."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    found = {name: int(value.split()[0]) * 1024 for name, value in pairs}
    return found if "RssAnon" in found else {}

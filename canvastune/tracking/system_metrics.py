"""Measure the machine while it trains, as MLflow does, into a file of the run: system.jsonl."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from canvastune.io.json_text import to_json_text
from canvastune.tracking.client import load_mlflow, log

SYSTEM = "system.jsonl"  # next to metrics.jsonl
_SECONDS = 10.0  # between measurements, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is set


class SystemSampler:
    """Measure processor, memory, disk, network and accelerators of this machine in a thread."""

    def __init__(self, path: Path, written: Callable[[], None]) -> None:
        """
        Args:
            path: gets a record {"kind": "system", "step", "time", ...} per measurement; an earlier
                attempt's steps are continued.
            written: called after each.
        """
        self._path, self._written = path, written
        self._seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SECONDS)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start measuring."""
        threading.Thread(target=self._loop, name="system-sampler", daemon=True).start()

    def stop(self) -> None:
        """Stop after the current measurement."""
        self._stopped.set()

    def _loop(self) -> None:
        try:
            monitors, step = _monitors(), 0
            if self._path.exists():
                earlier = self._path.read_bytes()
                step = earlier.count(b"\n")
                complete = earlier.rfind(b"\n") + 1  # a killed attempt may have left half a line
                os.truncate(self._path, complete)
            with self._path.open("a", encoding="utf-8") as stream:
                while not self._stopped.wait(self._seconds):
                    record: dict[str, Any] = {"kind": "system", "step": step, "time": time.time()}
                    for monitor in monitors:
                        monitor.collect_metrics()
                        record |= monitor.aggregate_metrics()
                        monitor.clear_metrics()
                    stream.write(to_json_text(record))
                    stream.flush()
                    self._written()
                    step += 1
        except Exception as error:  # a full disk or a driver: training continues
            kind = type(error).__name__
            log.warning("%s: system metrics end here (%s: %s)", self._path, kind, error)


def _monitors() -> list[Any]:
    load_mlflow()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for accelerator in (GPUMonitor, ROCMMonitor):
        try:
            return [*monitors, accelerator()]
        except Exception as error:  # MLflow's way to report that there is none, or no library
            log.debug("no %s: %s", accelerator.__name__, error)
    return monitors

"""What the machine does while it trains, as MLflow measures it, in a file of the run: system.jsonl."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from canvastune.tracking.client import load_mlflow, log

SYSTEM = "system.jsonl"  # beside metrics.jsonl
_SECONDS = 10.0  # between two measurements, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise


class SystemSampler:
    """Measures processor, memory, disk, network and accelerators of this machine, in a thread of its own."""

    def __init__(self, path: Path, written: Callable[[], None]) -> None:
        """
        Args:
            path: gets a record {"kind": "system", "step", "time", ...} for each measurement; goes on where an earlier attempt ended.
            written: called after each.
        """
        self._path, self._written = path, written
        self._seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SECONDS)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._loop, name="system-sampler", daemon=True).start()

    def stop(self) -> None:
        """End with the measurement that is being made."""
        self._stopped.set()

    def _loop(self) -> None:
        try:
            monitors, step = _monitors(), 0
            if self._path.exists():
                earlier = self._path.read_bytes()
                step = earlier.count(b"\n")
                os.truncate(self._path, earlier.rfind(b"\n") + 1)  # a killed attempt may have left half a line
            with self._path.open("a", encoding="utf-8") as stream:
                while not self._stopped.wait(self._seconds):
                    record: dict[str, Any] = {"kind": "system", "step": step, "time": time.time()}
                    for monitor in monitors:
                        monitor.collect_metrics()
                        record |= monitor.aggregate_metrics()
                        monitor.clear_metrics()
                    stream.write(json.dumps(record) + "\n")
                    stream.flush()
                    self._written()
                    step += 1
        except Exception as error:  # a full disk, a driver's whim: training goes on
            log.warning("%s: nothing more of this machine is measured (%s: %s)", self._path, type(error).__name__, error)


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
        except Exception as error:  # MLflow's way to say that there is none, or no library for it
            log.debug("no %s: %s", accelerator.__name__, error)
    return monitors

"""From metrics.jsonl to an MLflow run: the file is the queue, so a server that comes back gets what it missed."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from canvastune.tracking.client import TrackingClient, TrackingError, connect, load_mlflow, log
from canvastune.tracking.records import parse_lines
from canvastune.tracking.system_metrics import SYSTEM, SystemSampler

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BATCH = 1000  # metrics in one request: MLflow's limit
_PERIOD = 1.0  # seconds between two requests: many quick steps go in one
_LONGEST_PAUSE = 60.0  # seconds between two attempts at a server that is away
_MEASUREMENTS = {"train": "train", "validation": "val", "system": "system"}  # kind of record -> prefix of the metric's name


FindRun = Callable[["MlflowClient"], str]  # the id of a run, which may have to be made


class Point(NamedTuple):
    """One value of one metric: `time` in Unix seconds, `step` the training step."""

    key: str
    value: float
    time: float
    step: int


def points_of(records: Iterable[dict[str, Any]]) -> list[Point]:
    """Metrics in records: train/loss, val/loss, val/loss_t0.5, system/cpu_utilization_percentage and so on.

    Names that MLflow refuses are mended; what is not a finite number is left out.
    """
    points = []
    for record in records:
        prefix = _MEASUREMENTS.get(record["kind"])
        if prefix is None:
            continue
        values = {name: value for name, value in record.items() if name not in ("kind", "step", "time", "levels")}
        values |= {f"loss_t{level}": value for level, value in record.get("levels", {}).items()}
        for name, value in values.items():
            if is_number(value):
                points.append(Point(metric_name(f"{prefix}/{name}"), float(value), record.get("time", 0.0), record["step"]))
    return points


def is_number(value: Any) -> bool:
    """Whether MLflow can hold it: a finite number, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`; anything else becomes an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def send_metrics(run_id: str, metrics_file: Path, *, uri: str, machine: bool = True) -> int:
    """Send what an MLflow run lacks of a metrics.jsonl; returns how many points were sent.

    Args:
        machine: also of the system.jsonl beside it.

    Raises:
        TrackingError: the server is away or refuses. A later call sends the rest.
        UserError: a line that is no record.
    """
    return MetricsSender(uri, lambda client: run_id, metrics_file, machine).send_waiting()


class MetricsSender:
    """Sends the lines of a growing metrics.jsonl, and what it measures of the machine, from a daemon thread, at most one request a second.

    MLflow's own measurements of processor, memory, disk, network and accelerators go to system.jsonl beside metrics.jsonl
    first: a server that is away lacks none of them afterwards.
    """

    def __init__(self, uri: str, find_run: FindRun, path: Path, machine: bool = True) -> None:
        load_mlflow()
        self.path = path
        self._find_run = find_run
        self.sent = 0  # points that reached the server
        self._server: TrackingClient = connect(uri)
        self._files = [_Tail(path), _Tail(path.with_name(SYSTEM))] if machine else [_Tail(path)]
        self._waiting: list[Point] = []
        self._arrived: dict[str, set[int]] | None = None  # metric -> steps that the server had when we came
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="metrics-sender", daemon=True)
        self._sampler = SystemSampler(path.with_name(SYSTEM), self.wake)

    def start(self) -> None:
        """Begin; the files are now this attempt's."""
        self._thread.start()
        self._sampler.start()

    def wake(self) -> None:
        """There is a new line."""
        self._news.set()

    def close(self, timeout: float) -> None:
        """Send what waits, for at most `timeout` seconds; say so if something is left."""
        if not self._thread.is_alive():
            return
        self._sampler.stop()
        self._closing.set()
        self._news.set()
        self._thread.join(timeout)
        if self._thread.is_alive() or self._waiting:
            log.warning("not every metric reached MLflow in time; they are in %s, and are sent from there by a later step", self.path)

    def send_waiting(self) -> int:
        """Send every point of the files that has not arrived; returns how many points this sender has sent in all.

        Raises:
            TrackingError: the server is away or refuses; what is left stays waiting.
        """
        entities = load_mlflow().entities
        if self._arrived is None:
            self._arrived = self._server.request(self._steps_that_arrived)
        for file in self._files:
            self._waiting += [point for point in points_of(file.read()) if point.step not in self._arrived.get(point.key, ())]
        while self._waiting:
            batch = self._waiting[:_BATCH]
            metrics = [entities.Metric(p.key, p.value, int(p.time * 1000), p.step) for p in batch]
            self._server.request(partial(self._log, metrics))
            del self._waiting[: len(batch)]
            self.sent += len(batch)
        return self.sent

    def _loop(self) -> None:
        pause, failing = _PERIOD, False
        while True:
            self._news.wait()
            self._news.clear()
            try:
                self.send_waiting()
                if failing:
                    log.warning("MLflow at %s is back: %d metric values sent so far", self._server, self.sent)
                pause, failing = _PERIOD, False
            except TrackingError as error:
                self._server.warn(error, f"Training goes on; metrics wait in {self.path}")
                pause, failing = min(2 * pause, _LONGEST_PAUSE), True
                self._news.set()
            except Exception as error:  # a defect here must not end as a silent thread: the numbers are in the file
                log.warning("metrics are no longer sent to MLflow (%s: %s); they are in %s", type(error).__name__, error, self.path)
                return
            if self._closing.is_set() and (failing or not self._news.is_set()):
                break
            self._closing.wait(pause)

    def _log(self, metrics: list[Any], client: MlflowClient) -> None:
        client.log_batch(self._find_run(client), metrics=metrics)

    def _steps_that_arrived(self, client: MlflowClient) -> dict[str, set[int]]:
        run_id = self._find_run(client)
        ours = [key for key in client.get_run(run_id).data.metrics if key.partition("/")[0] in _MEASUREMENTS.values()]
        return {key: {metric.step for metric in client.get_metric_history(run_id, key)} for key in ours}


class _Tail:
    """The new whole lines of a growing file of records, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = self._lines = 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        data = data[: data.rfind(b"\n") + 1]
        records = parse_lines(data.decode(), str(self.path), self._lines + 1)
        self._offset, self._lines = self._offset + len(data), self._lines + len(records)
        return records

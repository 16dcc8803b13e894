"""Send metrics.jsonl to MLflow while it grows: the file is the queue, an outage loses nothing."""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from canvastune.tracking.client import TrackingError, connect, load_mlflow, log
from canvastune.tracking.metrics_file import MetricsWriter, Tail, mean_by_block
from canvastune.tracking.system_metrics import SYSTEM, SystemSampler

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGITS = 7  # significant ones that MLflow gets; the run directory's files have all of them
_BATCH = 1000  # metrics in one request: MLflow's limit
_PREFIXES = {"train": "train", "validation": "val", "system": "system"}  # kind of record -> metric
FindRun = Callable[["MlflowClient"], str]  # returns the id of a run, created if necessary


class Point(NamedTuple):
    """One value of one metric: `time` in Unix seconds, `step` the training step."""

    key: str
    value: float
    time: float
    step: int


def points_of(records: Iterable[dict[str, Any]]) -> list[Point]:
    """Return the metrics in records: train/loss, val/loss, val/loss_t0.5, system/... and so on."""
    points = []
    for record in records:
        if record["kind"] not in _PREFIXES:
            continue
        skipped = ("kind", "step", "time", "levels", "blocks")
        values = {name: value for name, value in record.items() if name not in skipped}
        values |= {f"loss_t{level}": value for level, value in record.get("levels", {}).items()}
        by_block = mean_by_block(record)
        values |= {f"loss_block{block}": value for block, value in enumerate(by_block, 1)}
        for name, value in numbers(values).items():
            key = metric_name(f"{_PREFIXES[record['kind']]}/{name}")
            points.append(Point(key, value, record.get("time", 0.0), record["step"]))
    return points


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that MLflow can hold, rounded for people: finite numbers, no booleans."""
    kept = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            kept[name] = _rounded(float(value))
    return kept


def _rounded(value: float) -> float:
    """Return 7 significant digits, or whole numbers as they are: MLflow's pages show all 16."""
    if abs(value) >= 10**_DIGITS:
        return float(round(value))
    return float(f"{value:.{_DIGITS}g}")


def metric_name(name: str) -> str:
    """Replace what MLflow refuses in a name: all but letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def open_metrics(
    path: Path,
    *,
    run: FindRun | None = None,
    uri: str | None = None,
    period: float = 1.0,
    longest_pause: float = 60.0,
) -> MetricsWriter:
    """Open metrics.jsonl for writing, sent to an MLflow run by a thread if one is named.

    Args:
        uri: tracking server of `run`; None: MLFLOW_TRACKING_URI.
        period, longest_pause: seconds between requests, and between attempts while MLflow is down.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if run is None or not uri:
        if run is not None:
            log.warning("MLflow receives no metrics of %s: MLFLOW_TRACKING_URI is not set", path)
        return MetricsWriter(path)
    return MetricsWriter(path, MetricsThread(uri, run, path, period, longest_pause))


@contextlib.contextmanager
def follow_metrics(path: Path, uri: str, run: FindRun, period: float = 1.0) -> Iterator[None]:
    """Send a metrics.jsonl that other processes write while the block runs, and measure the machine.

    Args:
        period: seconds between two reads of the file.
    """
    thread = MetricsThread(uri, run, path, period, longest_pause=60.0, polls=True)
    thread.start()
    try:
        yield
    finally:
        thread.close(timeout=15.0)


class MetricsSender:
    """Send the points of a metrics.jsonl, and of the system.jsonl next to it, that a run lacks."""

    def __init__(self, uri: str, find_run: FindRun, path: Path) -> None:
        self.server, self.path = connect(uri), path
        self.sent = 0  # points that reached the server
        self.pending: list[Point] = []
        self._find_run = find_run
        self._files = [Tail(path), Tail(path.with_name(SYSTEM))]
        # metric -> steps that the server has
        self._known: dict[str, set[int]] | None = None

    def send(self) -> int:
        """Send all pending points; return how many this sender has sent in all.

        Raises:
            TrackingError: the server is down or refuses; the rest stays pending.
            UserError: a line that is no record.
        """
        if self._known is None:
            self._known = self.server.request(self._known_steps)
        for file in self._files:
            points = points_of(file.read())
            self.pending += [p for p in points if p.step not in self._known.get(p.key, ())]
        metric = load_mlflow().entities.Metric
        while self.pending:
            batch = self.pending[:_BATCH]
            metrics = [metric(p.key, p.value, int(p.time * 1000), p.step) for p in batch]
            self.server.request(partial(self._log, metrics))
            for point in batch:
                self._known.setdefault(point.key, set()).add(point.step)
            del self.pending[: len(batch)]
            self.sent += len(batch)
        return self.sent

    def _log(self, metrics: list[Any], client: MlflowClient) -> None:
        client.log_batch(self._find_run(client), metrics=metrics)

    def _known_steps(self, client: MlflowClient) -> dict[str, set[int]]:
        run_id, prefixes = self._find_run(client), _PREFIXES.values()
        keys = [k for k in client.get_run(run_id).data.metrics if k.partition("/")[0] in prefixes]
        return {key: {m.step for m in client.get_metric_history(run_id, key)} for key in keys}


class MetricsThread:
    """Send metrics.jsonl from a daemon thread while it grows, and measure the machine meanwhile.

    MLflow's own system metrics go to system.jsonl first, so that an outage loses none of them.
    """

    def __init__(
        self,
        uri: str,
        find_run: FindRun,
        path: Path,
        period: float,
        longest_pause: float,
        *,
        polls: bool = False,
    ) -> None:
        """
        Args:
            polls: read the file in each period, as nothing calls `wake`.
        """
        load_mlflow()  # here: two threads that import it at once can meet half-initialized modules
        self._sender = MetricsSender(uri, find_run, path)
        self._period, self._longest_pause, self._polls = period, longest_pause, polls
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="metrics-sender", daemon=True)
        self._sampler = SystemSampler(path.with_name(SYSTEM), self.wake)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()
        self._sampler.start()

    def wake(self) -> None:
        """Send the new line soon."""
        self._news.set()

    def close(self, timeout: float) -> None:
        """Send the rest, for at most `timeout` seconds; warn if something is left."""
        if not self._thread.is_alive():
            return
        self._sampler.stop()
        self._closing.set()
        self._news.set()
        self._thread.join(timeout)
        if self._thread.is_alive() or self._sender.pending:
            path = self._sender.path
            log.warning(
                "not every metric reached MLflow in time; a later step sends the rest of %s", path
            )

    def _loop(self) -> None:
        sender, pause, failing = self._sender, self._period, False
        while True:
            if not self._polls:
                self._news.wait()
            self._news.clear()
            try:
                sender.send()
                if failing:
                    log.warning(
                        "MLflow at %s is reachable again: %d values sent so far",
                        sender.server,
                        sender.sent,
                    )
                pause, failing = self._period, False
            except TrackingError as error:
                sender.server.warn(error, f"Training continues; metrics wait in {sender.path}")
                pause, failing = min(2 * pause, self._longest_pause), True
                self._news.set()
            except Exception as error:  # a defect must not end as a silent thread
                kind, file = type(error).__name__, sender.path
                log.warning(
                    "metrics are no longer sent to MLflow (%s: %s); see %s", kind, error, file
                )
                return
            if self._closing.is_set() and (failing or not self._news.is_set()):
                break
            self._closing.wait(pause)

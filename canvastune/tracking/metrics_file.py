"""metrics.jsonl: one JSON object a line, each step once, whatever became of the attempts."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from canvastune.tracking.client import log
from canvastune.tracking.records import read_metrics
from canvastune.tracking.sending import FindRun, MetricsSender

_FACTS_OF_AN_ATTEMPT = ("resumed", "restarted", "damaged_checkpoint")  # events that stay when the steps of their attempt are dropped


class MetricsWriter:
    """Appends records to metrics.jsonl, and has them sent to an MLflow run from a thread of its own.

    `write` costs one line to the file and never waits for MLflow: the sender reads the file, so what a server that is
    away did not get is sent later from there. Use it on rank 0 alone.
    """

    def __init__(self, path: Path, *, run: FindRun | None = None, uri: str | None = None) -> None:
        """
        Args:
            path: metrics.jsonl; may exist from an interrupted attempt.
            run: finds the MLflow run that gets the numbers, once MLflow is there; None: the file alone.
            uri: tracking server of that run; None: MLFLOW_TRACKING_URI.
        """
        self.path = path
        self._stream: IO[str] | None = None
        self._sender: MetricsSender | None = None
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        if run and not uri:
            log.warning("MLflow gets no metrics of %s: MLFLOW_TRACKING_URI does not say where it is", path)
        elif run and uri:
            # Here, not in the thread: importing MLflow takes two seconds, and two threads that import can meet half-made modules.
            self._sender = MetricsSender(uri, run, path)

    def resume(self, step: int) -> int:
        """Drop what an interrupted attempt wrote after `step`, atomically; returns how many records went.

        Events that tell of an earlier restart stay: a run's restarts are never hidden.
        """
        if self._stream is not None:
            raise RuntimeError("resume() comes before the first write()")
        records = read_metrics(self.path) if self.path.exists() else []
        kept = [record for record in records if record["step"] <= step or record.get("event") in _FACTS_OF_AN_ATTEMPT]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(_line(record) for record in kept)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)
        self._stream = self.path.open("a", encoding="utf-8")
        if self._sender is not None:
            self._sender.start()
        return len(records) - len(kept)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record {"kind", "step", "time", ...}. Numbers that are not finite become null: JSON has no word for them."""
        if self._stream is None:  # no checkpoint to resume from: an attempt that left records behind counts as one that is begun again
            dropped = self.resume(-1)
            if dropped:
                detail = f"begun again from step 0: an earlier attempt left no checkpoint, its {dropped} records are dropped"
                self.write({"kind": "event", "step": 0, "time": time.time(), "event": "restarted", "detail": detail})
        assert self._stream is not None
        self._stream.write(_line(record))
        self._stream.flush()
        if self._sender is not None:
            self._sender.wake()

    def close(self, timeout: float = 15.0) -> None:
        """Close the file and give the sender at most `timeout` seconds for what is still waiting."""
        if self._stream is not None:
            self._stream.close()
        if self._sender is not None:
            self._sender.close(timeout)
            self._sender = None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return value

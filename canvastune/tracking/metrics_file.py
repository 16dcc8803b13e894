"""metrics.jsonl: one JSON object per line, each training step once over all attempts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from canvastune.errors import UserError
from canvastune.io.atomic import replace_text
from canvastune.io.json_text import to_json_text

if TYPE_CHECKING:  # that module imports this one
    from canvastune.tracking.live_metrics import MetricsThread

WORK = ("train", "validation")  # kinds of records of what was computed
_KEPT_EVENTS = ("resumed", "restarted", "damaged_checkpoint")  # facts of an attempt: never dropped
_HINT = "Use the metrics.jsonl of a training run."


class MetricsWriter:
    """Append records to metrics.jsonl; only rank 0 does so."""

    def __init__(self, path: Path, listener: MetricsThread | None = None) -> None:
        """
        Args:
            path: metrics.jsonl; may exist from an interrupted attempt.
            listener: follows the file while it grows. No call of it may block.
        """
        self.path = path
        self._stream: IO[str] | None = None
        self._listener = listener

    def resume(self, step: int) -> list[dict[str, Any]]:
        """Drop the records that an interrupted attempt wrote after `step`, and return them.

        Events that report an earlier restart are kept: restarts are never hidden.
        """
        if self._stream is not None:
            raise RuntimeError("resume() comes before the first write()")
        records = read_metrics(self.path) if self.path.exists() else []
        kept: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []
        for record in records:
            stays = record["step"] <= step or record.get("event") in _KEPT_EVENTS
            (kept if stays else dropped).append(record)
        replace_text(self.path, "".join(map(to_json_text, kept)), sync=True)
        self._stream = self.path.open("a", encoding="utf-8")
        if self._listener is not None:
            self._listener.start()
        return dropped

    def write(self, record: dict[str, Any]) -> None:
        """Append a record {"kind", "step", "time", ...}. Non-finite numbers become null."""
        if self._stream is None and (dropped := self.resume(-1)):
            detail = f"restarted from step 0: no checkpoint was left; {len(dropped)} records were dropped"
            event = {"kind": "event", "step": 0, "time": time.time(), "event": "restarted"}
            self.write({**event, "detail": detail, **lost_energy(dropped)})
        assert self._stream is not None
        self._stream.write(to_json_text(record))
        self._stream.flush()
        if self._listener is not None:
            self._listener.wake()

    def close(self, timeout: float = 15.0) -> None:
        """Close the file; the listener gets at most `timeout` seconds to finish."""
        if self._stream is not None:
            self._stream.close()
        if self._listener is not None:
            self._listener.close(timeout)
            self._listener = None


class Tail:
    """Read the new complete lines of a growing file of records, which may not exist yet.

    A file that replaced it, as an attempt that resumes writes, is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._offset = self._lines = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the records since the last call. Raises: UserError, a line that is no record."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            if self._file != (file := os.fstat(stream.fileno()).st_ino):
                self._file, self._offset, self._lines = file, 0, 0
            stream.seek(self._offset)
            data = stream.read()
        data = data[: data.rfind(b"\n") + 1]
        records = _parse(data.decode(), self.path, self._lines + 1)
        self._offset, self._lines = self._offset + len(data), self._lines + len(records)
        return records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, without an unfinished last line of a killed process.

    Raises:
        UserError: no such file, or a line that is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read metrics.jsonl: {error}", hint=_HINT) from None
    return _parse(text[: text.rfind("\n") + 1], path, 1)


def _parse(text: str, path: Path, first: int) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(text.splitlines(), first):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{path}:{number}: not a JSON object ({error})"
            raise UserError(message, hint=_HINT) from None
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("step"), int)
            or "kind" not in record
        ):
            expected = "expected an object with `kind` and an integer `step`"
            raise UserError(f"{path}:{number}: found {line[:80]!r}, {expected}", hint=_HINT)
        records.append(record)
    return records


def sum_energy(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the joules that steps, validations and events measured; None: there is none, or a step
    or validation among them was not measured.
    """
    found = [r.get("energy_joules") for r in records if r["kind"] in WORK or "energy_joules" in r]
    measured = [joules for joules in found if joules is not None]
    return sum(measured) if found and len(measured) == len(found) else None


def lost_energy(dropped: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the energy of dropped work, for the event that reports the restart: it was taken, too.
    Null: not all of it was measured. Nothing if no work was dropped.
    """
    return {"energy_joules": sum_energy(dropped)} if any(r["kind"] in WORK for r in dropped) else {}


def mean_by_block(record: Mapping[str, Any]) -> list[float | None]:
    """Return a validation's loss by block of the answer, the mean over the levels; None: of a block
    that was not scored. A record has it if `train.validation_blocks` is not 1.
    """
    of_levels = zip(*record.get("blocks", {}).values(), strict=True)
    return [None if None in losses else sum(losses) / len(losses) for losses in of_levels]

"""What a run has to tell MLflow, in files of the run's own folder until MLflow has it.

RUN/unsent/STEP.jsonl      an entry a line, in their order; there only while something waits
           STEP/           copies of the files that wait: a step's own folder may be gone by then
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from canvastune.tracking.client import TrackingClient, TrackingError, log

if TYPE_CHECKING:
    from mlflow import MlflowClient

Step = Literal["resolve", "prepare_data", "plan", "train", "merge_lora", "evaluate", "report", "finish"]
STEPS: tuple[Step, ...] = get_args(Step)  # in the order of their entries


class Entry(NamedTuple):
    """One thing to tell. Telling it twice is the same as once, since an answer may be lost."""

    kind: str
    run: str  # the step whose run it is for; "" the pipeline run
    time: float  # when it happened, in Unix seconds
    what: dict[str, Any]  # JSON


Tell = Callable[["MlflowClient", Entry], None]


class Outbox:
    """Tells entries as they come, and keeps what MLflow did not take. Nothing here raises because of MLflow or of a full disk."""

    def __init__(self, folder: Path, step: str, server: TrackingClient, tell: Tell) -> None:
        """
        Args:
            folder: the run's `unsent`.
            step: whose entries these are; a process of its own writes them.
        """
        self._path, self._copies = folder / f"{step}.jsonl", folder / step
        self._server, self._tell = server, tell
        self.away = False  # since the last flush: later entries then wait behind the earlier ones, and cost no time

    def send(self, entry: Entry) -> None:
        """Tell an entry, or keep it."""
        if not self.away:
            try:
                self._ask(entry)
                return
            except TrackingError as error:
                self._warn(entry, error)
                self.away = not error.final
        try:
            self._keep(entry)
        except OSError as error:
            log.warning("%s: cannot be written (%s). MLflow will lack %s", self._path, error.strerror, _name(entry))

    def flush(self) -> str | None:
        """Tell what waits, in its order; what is refused stays for another time, and does not hold up the rest.

        Returns:
            The first reason why something still waits; None if nothing does.
        """
        self.away = False
        try:
            lines = self._path.read_bytes().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return None
        left, reason = self._tell_lines(lines)
        try:
            self._replace(lines, left)
        except OSError as error:
            return f"{self._path}: cannot be written ({error.strerror})"
        if len(left) < len(lines):
            log.warning("MLflow at %s: %d of %d records that waited have been sent", self._server, len(lines) - len(left), len(lines))
        return reason

    def _tell_lines(self, lines: list[bytes]) -> tuple[list[bytes], str | None]:
        """The lines that are still to be told, and the first reason for it."""
        left: list[bytes] = []
        reason: str | None = None
        for number, line in enumerate(lines):
            try:
                entry = Entry(*json.loads(line))
            except (ValueError, TypeError):
                log.warning("%s:%d: written by half when a process or a disk failed; it is left out", self._path, number + 1)
                continue
            try:
                self._ask(entry)
            except TrackingError as error:
                self._warn(entry, error)
                reason = reason or f"{_name(entry)}: MLflow at {self._server} {error}"
                left.append(line)
                if not error.final:
                    self.away = True
                    return left + lines[number + 1 :], reason
        return left, reason

    def _ask(self, entry: Entry) -> None:
        self._server.request(lambda client: self._tell(client, entry))

    def _warn(self, entry: Entry, error: TrackingError) -> None:
        if error.final:
            self._server.warn(error, f"It lacks {_name(entry)}; the record waits in {self._path}", what=entry.kind)
        else:
            self._server.warn(error, f"The step goes on; records wait in {self._path.parent}, and are sent by a later step")

    def _keep(self, entry: Entry) -> None:
        with self._locked():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if entry.kind == "file":
                self._copies.mkdir(exist_ok=True)
                copy = self._copies / Path(entry.what["path"]).name
                shutil.copyfile(entry.what["path"], copy)
                entry = entry._replace(what={**entry.what, "path": str(copy)})
            with self._path.open("ab", buffering=0) as file:
                file.write(json.dumps(entry).encode() + b"\n")

    def _replace(self, told: list[bytes], left: list[bytes]) -> None:
        """Take what was told out of the file; what a step has added meanwhile stays, and so does all if another process was here."""
        with self._locked():
            lines = self._path.read_bytes().splitlines() if self._path.exists() else []
            if lines[: len(told)] != told:
                return
            if lines := left + lines[len(told) :]:
                rest = self._path.with_suffix(".partial")
                rest.write_bytes(b"".join(line + b"\n" for line in lines))
                rest.replace(self._path)
            else:
                self._path.unlink()
                shutil.rmtree(self._copies, ignore_errors=True)
                with contextlib.suppress(OSError):  # another step's entries wait
                    self._path.parent.rmdir()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._path.parent.with_name(".unsent.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _name(entry: Entry) -> str:
    return f"{entry.kind} of {entry.run or 'the run'}"

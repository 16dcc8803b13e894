"""The runs of a workspace: their state, main figures, size and age, read from their folders alone."""

from __future__ import annotations

import difflib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from canvastune.config import RunConfig, changed_settings
from canvastune.errors import UserError
from canvastune.tracking.steps import FAILED, RUNNING, Attempt, read_records
from components.run_directory import RunRecord, read_record
from components.run_owner import Owner, find_owner

State = Literal["running", "interrupted", "failed", "finished", "unreadable"]
FIGURES = {  # of summary.json, by what they are called: before and after training
    "exact match": ("exact_match_before", "exact_match_after"),
    "score": ("score_before", "score_after"),
    "validation loss": ("validation_loss_first", "validation_loss_last"),
    "training loss": ("train_loss_first", "train_loss_last"),
}
_BEFORE = "before its first step"
_TAIL = 65536  # bytes of metrics.jsonl in which the newest training step is
_ELSEWHERE = 900.0  # seconds in which a run on another machine has to write something


@dataclass(frozen=True)
class RunInfo:
    """What is known of one run."""

    name: str
    folder: Path
    state: State
    where: str  # the owner of a running one; the step in which another one ended
    reason: str = ""  # why it failed or was interrupted
    recipe: str = ""
    method: str = ""
    step: int | None = None  # of the training
    steps: int | None = None
    figures: dict[str, tuple[float | None, float]] = field(default_factory=dict)
    attempts: int = 0
    bytes: int = 0
    started: float | None = None  # Unix seconds
    changed: float | None = None
    on_cluster: bool = False
    command: str = ""  # that resumes it
    directory: str = ""  # in which that was typed
    open_in_mlflow: bool = False  # it ended without a word, and counts as running there

    @property
    def progress(self) -> str:
        """Its state and how far it is: `interrupted in train, step 3 of 10`."""
        steps = f", step {self.step} of {self.steps}" if self.step is not None else ""
        return f"{self.status}{steps}"

    @property
    def status(self) -> str:
        """Its state and where: `interrupted in train`, `running: train: process 7 on host`."""
        if not self.where or self.state == "finished":
            return self.state
        if self.state == "running":
            return f"running: {self.where}"
        return f"{self.state} {'' if self.where == _BEFORE else 'in '}{self.where}"


def nearest_run(name: str, known: Iterable[str]) -> str:
    """Return a hint for a name that no run has: the nearest one, or where the names are listed."""
    names = {run.lower(): run for run in known}
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"Did you mean {names[near[0]]!r}?" if near else "`canvastune runs` lists them."


def list_runs(workspace: Path, *, sizes: bool = True) -> list[RunInfo]:
    """Return the runs of a workspace, the newest last.

    Raises:
        UserError: no such workspace.
    """
    if not workspace.is_dir():
        raise UserError(
            f"--workspace {workspace}: no such directory",
            hint="Pass the workspace of `canvastune run`; the default is ./workspace.",
        )
    found = [read_run(folder, sizes=sizes) for folder in _folders(workspace / "runs")]
    return sorted(found, key=lambda run: (run.started or 0, run.name))


def unfinished_runs(workspace: Path, config: RunConfig) -> list[RunInfo]:
    """Return the runs of a workspace that the same recipe resumes, the newest last."""
    found = []
    for folder in _folders(workspace / "runs"):
        try:
            record = read_record(folder)
        except UserError:  # not a run of this version; `canvastune runs` shows it
            continue
        if record is None or record.finished or find_owner(folder) is not None:
            continue
        if not changed_settings(json.loads(record.config), config):
            found.append(read_run(folder, sizes=False))
    return sorted(found, key=lambda run: (run.started or 0, run.name))


def read_run(folder: Path, *, sizes: bool = True) -> RunInfo:
    """Return what is known of the run in a folder; sizes are left out where they are not shown."""
    size, newest = _measure(folder) if sizes else (0, _modified(folder / "steps.json"))
    try:
        record = read_record(folder)
    except UserError as error:
        return RunInfo(
            folder.name, folder, "unreadable", "run.json", str(error), bytes=size, changed=newest
        )
    owner = find_owner(folder)
    if record is None:  # its first step has not claimed the folder yet, or never will
        state: State = "running" if owner else "interrupted"
        where = str(owner) if owner else _BEFORE
        return RunInfo(folder.name, folder, state, where, bytes=size, changed=newest)
    records = read_records(folder, record.known_as)
    last = records.attempts[-1] if records.attempts else None
    state, where = _state(record, last, owner, newest)
    if state == "running" and last is not None and last.status == RUNNING:
        at = next((name for name, step in records.steps.items() if step.status == RUNNING), "")
        where = f"{at or 'starting'}: {where}"
    config = json.loads(record.config)
    step = _training_step(folder / "train" / "metrics.jsonl")
    return RunInfo(
        name=folder.name,
        folder=folder,
        state=state,
        where=where,
        reason=last.reason if last and state in ("failed", "interrupted") else "",
        recipe=str(config.get("name", "")),
        method=str(config.get("train", {}).get("method", "")),
        step=step,
        steps=config.get("train", {}).get("steps"),
        figures=_figures(folder),
        attempts=len(records.attempts),
        bytes=size,
        started=records.attempts[0].started if records.attempts else _modified(folder / "run.json"),
        changed=newest,
        on_cluster=last is not None and not last.host,
        command=last.command if last and not record.finished else "",
        directory=last.directory if last else "",
        open_in_mlflow=state == "interrupted" and last is not None and last.status == RUNNING,
    )


def _state(
    record: RunRecord, last: Attempt | None, owner: Owner | None, newest: float | None
) -> tuple[State, str]:
    if owner is not None:
        return "running", str(owner)
    if record.finished:
        return "finished", ""
    if last is None or last.status != RUNNING:
        failed = last is not None and last.status == FAILED
        return ("failed" if failed else "interrupted"), last.step if last else ""
    if not last.host:  # a cluster's: only Kubeflow knows
        return "running", f"Kubeflow job {last.job}"
    elsewhere = last.host != socket.gethostname()  # whose locks may not be seen from here
    if elsewhere and newest is not None and time.time() - newest < _ELSEWHERE:
        return "running", f"process {last.process} on {last.host}, as far as its files show"
    return "interrupted", ""


def _folders(runs: Path) -> Iterator[Path]:
    if runs.is_dir():
        for folder in sorted(runs.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder


def _figures(folder: Path) -> dict[str, tuple[float | None, float]]:
    """Return the figures of a finished run: before and after training, by name."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {
            name: (found.get(before), found[after])
            for name, (before, after) in FIGURES.items()
            if found.get(after) is not None
        }
    except (OSError, ValueError, AttributeError):  # not there yet, or being written
        return {}


def _training_step(metrics: Path) -> int | None:
    """Return the newest step in metrics.jsonl, of which only the end is read."""
    try:
        with metrics.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        record = _parse(line)
        if record.get("kind") == "train":
            return int(record["step"])
    return None


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # the first one is cut, and the last one may be unfinished
        return {}
    return record if isinstance(record, dict) else {}


def disk_bytes(folder: Path) -> int:
    """Return the bytes on the disk below a folder."""
    return _measure(folder)[0]


def _measure(folder: Path) -> tuple[int, float | None]:
    """Return the bytes on the disk below a folder, and when the newest file was changed."""
    total, newest, seen = 0, None, set()
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                found = os.lstat(os.path.join(root, name))
            except FileNotFoundError:  # a running one deletes an old checkpoint
                continue
            newest = max(newest or 0.0, found.st_mtime)
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * 512
    return total, newest


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None

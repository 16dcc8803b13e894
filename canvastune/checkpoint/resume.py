"""Save and restore checkpoints to resume from.

Trained weights and optimizer state as sharded safetensors, for any number of ranks.

A checkpoint is a folder `step-NNNNNN`. It is complete only with its `complete.json`, which is
written last and holds the size and the SHA-256 of every other file: a checkpoint that was damaged
later is detected, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import _init_optim_state

from canvastune.checkpoint.shard_writer import ShardWriter
from canvastune.checkpoint.staging import HostStager, State
from canvastune.config import RunConfig, changed_settings
from canvastune.config.strict import flatten
from canvastune.distributed.parallelize import local_tensor
from canvastune.distributed.sync import gather_results, run_on_rank0
from canvastune.errors import UserError
from canvastune.io.atomic import fsync, replace_text
from canvastune.io.byte_size import format_bytes
from canvastune.io.json_text import to_json_text

_MARKER, _CORRUPT = "complete.json", "damaged.json"
_FILE_BYTES = 2**30  # of a rank's shard per file; what is on a device is copied file by file

Parameters = dict[str, nn.Parameter]


class Checkpoints:
    """The checkpoints of one training run. Every rank makes the same calls."""

    def __init__(self, folder: Path, config: RunConfig, data_fingerprint: str) -> None:
        self._folder = folder
        self._keep = config.train.keep_checkpoints
        self._asynchronous = config.train.async_checkpoints
        self._config, self._data_fingerprint = config, data_fingerprint
        # For the writing thread: its collectives must not mix with the training's.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stager = HostStager()
        self._staging: Future[State] | None = None
        self._pending: Future[None] | None = None
        self.waiting: Callable[[], object] = str
        """Called every second while `wait` waits: a slow disk is no hang."""

    def restore(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest undamaged checkpoint, written by any number of ranks.

        Returns:
            The `progress` that was passed to `save`, None if there is no checkpoint; and a line for
            each newer, damaged one.

        Raises:
            UserError: the checkpoints belong to another run (names the differences), or all of them
                are damaged.
        """
        steps = run_on_rank0(self._complete_steps)
        damages: list[str] = []
        for step in reversed(steps):
            marker = run_on_rank0(partial(self._marker, step))
            damage = "no readable marker" if marker is None else self._damage(step, marker)
            if damage:
                damages.append(f"{self._path(step)} is damaged: {damage}")
                continue
            assert marker is not None
            self._refuse_other_run(step, marker)
            run_on_rank0(partial(self._quarantine, [later for later in steps if later > step]))
            kept = optimizer if marker.get("optimizer", True) else None
            if kept is not None:
                _init_optim_state(kept)  # loading overwrites it
            self._read(step, _state(parameters, kept))
            return marker["progress"], damages
        if damages:
            raise UserError(
                f"{'; '.join(damages)}; no other checkpoint in {self._folder}",
                hint=(
                    "Restore a checkpoint from a backup, or choose another --output to start again."
                ),
            )
        return None, []

    def save(
        self,
        step: int,
        parameters: Parameters,
        optimizer: torch.optim.Optimizer | None,
        progress: dict[str, Any],
    ) -> None:
        """Write the state after `step` steps.

        In the background, unless `train.async_checkpoints` is off: the state is first copied to
        host memory, and may not change before `wait_staged` has returned.

        Args:
            optimizer: None: nothing is trained after this step, and its state is left out.
            progress: stored with it, and returned by `restore`; `validation` is the held-out loss
                at this step, or None.

        Raises:
            UserError: this checkpoint or the one before could not be written; earlier checkpoints
                are kept.
        """
        self.wait()
        state = _state(parameters, optimizer)
        sizes = {name: local_tensor(tensor).nbytes for name, tensor in state.items()}
        total = sum(gather_results(lambda: sum(sizes.values())))
        path = self._path(step)
        run_on_rank0(lambda: self._prepare_directory(path, total))
        identity = flatten(self._config.model_dump(mode="json")) | {"data": self._data_fingerprint}
        marker = {"step": step, "identity": identity, "progress": progress}
        marker["optimizer"] = optimizer is not None  # older ones, without the key, have its state
        if self._asynchronous:
            self._staging = self._stager.start(state)
        self._pending = self._thread.submit(
            self._complete, state, self._staging, _files(sizes), path, marker
        )
        if not self._asynchronous:
            self.wait()

    def wait_staged(self) -> None:
        """Wait until the state that is being saved has been copied: it may change then.

        A copy that fails is an error of the save, which `failed` and `wait` report.
        """
        staging, self._staging = self._staging, None
        while staging is not None and not futures.wait([staging], timeout=1.0).done:
            self.waiting()

    def update_metadata(self, step: int, progress: dict[str, Any]) -> None:
        """Replace the `progress` of a complete checkpoint."""

        def replace() -> None:
            marker = self._marker(step)
            assert marker is not None
            self._mark(self._path(step), {**marker, "progress": progress})

        run_on_rank0(replace)

    @property
    def failed(self) -> bool:
        """True if writing in the background failed; `wait` then raises the reason.

        Ranks may briefly differ.
        """
        return (
            self._pending is not None
            and self._pending.done()
            and self._pending.exception() is not None
        )

    def wait(self) -> None:
        """Wait until the checkpoint in the background is complete.

        Raises:
            UserError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            wait_for(pending, self.waiting)

    def close(self) -> None:
        """Wait for the checkpoint in the background, and free the copy in host memory.

        Raises:
            UserError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()

    def best(self) -> tuple[float, int] | None:
        """Return the lowest validation loss of a checkpoint, and its step; or None."""
        return run_on_rank0(self._best)

    def load_weights(self, step: int, parameters: Parameters) -> None:
        """Load only the trained weights."""
        self._read(
            step, {f"model.{name}": parameter.data for name, parameter in parameters.items()}
        )

    def _complete(
        self,
        state: State,
        staging: Future[State] | None,
        files: dict[str, int],
        path: Path,
        marker: dict[str, Any],
    ) -> None:
        """Write the files of all ranks, in the thread, once every rank has copied its state.

        Then rank 0 writes the marker and removes old checkpoints.
        """

        def write() -> dict[str, dict[str, Any]]:
            with _errors_of_rank():
                dcp.save(
                    staging.result() if staging else state,
                    storage_writer=ShardWriter(path, files),
                    process_group=self._group,
                )
                return _file_entries(path)

        try:
            if staging:
                gather_results(partial(_await_copy, staging), self._group)
            found = gather_results(write, self._group)
        except UserError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
            kept = self._complete_steps()
            last = (
                f"the newest complete checkpoint is step {kept[-1]}"
                if kept
                else "there is no earlier checkpoint"
            )
            raise UserError(
                f"{path}: could not write the checkpoint: {error}; {last}",
                hint=(
                    "Fix the cause and run the same command again; it resumes from the newest "
                    "complete checkpoint."
                ),
            ) from None
        if dist.get_rank() == 0:
            written = {name: entry for entries in found for name, entry in entries.items()}
            self._mark(path, {**marker, "time": time.time(), "files": written})
            best = self._best()
            for old in self._complete_steps()[: -self._keep]:
                if best is None or old != best[1]:
                    shutil.rmtree(self._path(old))

    def _mark(self, path: Path, marker: dict[str, Any]) -> None:
        replace_text(path / _MARKER, to_json_text(marker), sync=True)
        fsync(path)

    def _prepare_directory(self, path: Path, total: int) -> None:
        shutil.rmtree(path, ignore_errors=True)  # left by an earlier attempt, without a marker
        path.mkdir(parents=True)
        free = shutil.disk_usage(path).free
        if total > free:
            path.rmdir()
            raise UserError(
                f"{path}: a checkpoint needs {format_bytes(total)}, the disk has "
                f"{format_bytes(free)} free; earlier checkpoints are kept",
                hint=(
                    "Free some disk space and run the same command again; it resumes from the "
                    "newest checkpoint."
                ),
            )

    def _damage(self, step: int, marker: dict[str, Any]) -> str | None:
        """Find what is wrong with a checkpoint's files; each rank reads its share of them."""
        mine = sorted(marker["files"].items())[dist.get_rank() :: dist.get_world_size()]
        return next(
            filter(None, gather_results(lambda: _first_damage(self._path(step), mine))), None
        )

    def _refuse_other_run(self, step: int, marker: dict[str, Any]) -> None:
        changed = changed_run(marker["identity"], self._config, self._data_fingerprint)
        if changed:
            raise UserError(
                f"{self._path(step)}: checkpoint of another run: {changed}",
                hint=(
                    "Choose another --output, or use the recipe and data that this run was "
                    "started with."
                ),
            )

    def _quarantine(self, steps: list[int]) -> None:
        for step in steps:
            (self._path(step) / _MARKER).rename(self._path(step) / _CORRUPT)

    def _read(self, step: int, state: State) -> None:
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(self._path(step))))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _complete_steps(self) -> list[int]:
        return [_step(marker) for marker in _markers(self._folder)]

    def _marker(self, step: int) -> dict[str, Any] | None:
        return _read_marker(self._path(step) / _MARKER)

    def _best(self) -> tuple[float, int] | None:
        markers = ((step, self._marker(step)) for step in self._complete_steps())
        losses = [(m["progress"]["validation"], step) for step, m in markers if m is not None]
        scored = [(loss, step) for loss, step in losses if loss is not None and math.isfinite(loss)]
        return min(scored, default=None)


def wait_for(pending: Future[Any], waiting: Callable[[], object], every: float = 1.0) -> None:
    """Wait for what a thread does, and call `waiting` every so many seconds.

    Raises:
        Exception: what the thread raised.
    """
    while not futures.wait([pending], timeout=every).done:
        waiting()
    pending.result()


def newest_identity(folder: Path) -> dict[str, Any] | None:
    """Return the recipe and data of the run whose checkpoints these are, as dotted keys.

    None if there is no readable checkpoint.
    """
    found = filter(None, map(_read_marker, reversed(_markers(folder))))
    return next((marker["identity"] for marker in found), None)


def changed_run(
    identity: Mapping[str, Any], config: RunConfig, data_fingerprint: str | None
) -> str:
    """Describe how a recipe and its data differ from the run that wrote a checkpoint.

    "" if it is the same run.

    Args:
        identity: the dotted keys of that run's recipe, and its data's fingerprint as `data`.
        data_fingerprint: of the data now; None: unknown, and not compared.
    """
    changes = changed_settings(identity, config)
    if data_fingerprint is not None and identity.get("data", data_fingerprint) != data_fingerprint:
        changes.append(("data", identity["data"], data_fingerprint))
    return "; ".join(f"{key} was {before!r} and is now {after!r}" for key, before, after in changes)


def _markers(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-*/{_MARKER}"), key=_step)


def _step(marker: Path) -> int:
    return int(marker.parent.name.removeprefix("step-"))


def _read_marker(path: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        return marker if {"identity", "progress", "files"} <= set(marker) else None
    except (OSError, ValueError, TypeError):  # damage, which the caller reports
        return None


def _state(parameters: Parameters, optimizer: torch.optim.Optimizer | None) -> State:
    """Map flat names to the tensors in use, so that loading fills them in place.

    Only tensors: nothing is pickled.
    """
    state: State = {}
    for name, parameter in parameters.items():
        state[f"model.{name}"] = parameter.data
        moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for key, value in moments.items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def _files(sizes: dict[str, int]) -> dict[str, int]:
    """Assign each tensor's part of a rank's shard to a file, numbered from 1.

    Equal on all ranks up to an uneven split.
    """
    files, filled = {}, 0
    for name, size in sizes.items():
        files[name] = 1 + filled // _FILE_BYTES
        filled += size
    return files


@contextmanager
def _errors_of_rank() -> Iterator[None]:
    """Raise what goes wrong in writing as a UserError that names the rank."""
    try:
        yield
    except CheckpointException as error:
        reasons = {
            f"rank {rank}: {type(cause).__name__}: {cause}"
            for rank, (cause, _) in error.failures.items()
        }
        raise UserError("; ".join(sorted(reasons))) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}") from None


def _await_copy(staging: Future[State]) -> None:
    with _errors_of_rank():
        staging.result()


def _file_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of this rank's share of a checkpoint's files, once on the disk."""
    mine = sorted(path.glob("*.safetensors"))[dist.get_rank() :: dist.get_world_size()]
    for file in mine:
        fsync(file)
    return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in mine}


def _first_damage(path: Path, files: list[tuple[str, dict[str, Any]]]) -> str | None:
    for name, entry in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['size']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} was modified (SHA-256 differs)"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

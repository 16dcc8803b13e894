"""Remove runs to free space: what would go, and what forbids it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.tracking.client import TrackingError, connect, database_file, tracking_uri
from canvastune.tracking.model_registry import CANDIDATE, aliases_of
from components.run_directory import RunRecord, read_record
from components.run_list import RunInfo, disk_bytes, list_runs, nearest_run
from components.run_owner import own_run

_REMOVED = ".removed-"  # a folder that is being deleted: no run, even if that is interrupted
_ARTIFACTS = "kfp"  # in the workspace: a folder per attempt, with one per step
_PREPARED = "prepare-data"  # the step whose artifacts later runs reuse


@dataclass(frozen=True)
class Removal:
    """What the removal of a run deletes."""

    run: RunInfo
    folders: tuple[Path, ...]  # the run's, or only its checkpoints, and its artifacts in kfp/
    bytes: int
    notes: tuple[str, ...]


def plan_removal(
    workspace: Path, names: Sequence[str], *, checkpoints: bool = False
) -> list[Removal]:
    """Find what to delete of some runs; nothing is deleted.

    Args:
        checkpoints: only those of the training, which a finished run does not need.

    Raises:
        UserError: no run of that name; a run that is in progress; an unfinished one's checkpoints;
            a run whose model has an alias in MLflow, or that another run was trained from.
    """
    runs = list_runs(workspace)
    found = [_find(runs, workspace, name) for name in dict.fromkeys(names)]
    for run in found:
        if run.state == "running":
            hint = "Wait for it to end, or stop it."
            if run.on_cluster:
                hint += f" If Kubeflow has no such job any more, delete {run.folder} by hand."
            raise UserError(f"{run.name}: this run is in progress: {run.where}", hint=hint)
    if checkpoints:
        return [_only_checkpoints(run) for run in found]
    others = [run for run in runs if run not in found]
    removals = []
    for run in found:
        _refuse_base_of_others(run, others)
        notes = _refuse_served(run, workspace)
        artifacts, kept = _artifacts(workspace, run, others)
        folders = (run.folder, *artifacts)
        total = run.bytes + sum(disk_bytes(folder) for folder in artifacts)
        removals.append(Removal(run, folders, total, (*notes, *kept)))
    return removals


def remove(removal: Removal) -> None:
    """Delete what was planned.

    Raises:
        UserError: the run is in progress by now; a file cannot be deleted.
    """
    try:
        with own_run(removal.run.folder):
            for folder in removal.folders:
                _delete(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be deleted ({error.strerror})",
            hint="Call the command as the user who owns the file.",
        ) from None


def _delete(folder: Path) -> None:
    """Delete a folder, and what an interrupted removal left next to it."""
    with contextlib.suppress(FileNotFoundError):
        folder.rename(folder.with_name(f"{_REMOVED}{folder.name}"))  # at once: no half of a run
    for leftover in folder.parent.glob(f"{_REMOVED}*"):
        with contextlib.suppress(FileNotFoundError):  # deleted by another removal, just now
            shutil.rmtree(leftover)
    if folder.parent.parent.name == _ARTIFACTS:
        with contextlib.suppress(OSError):  # it is not empty
            folder.parent.rmdir()


def _find(runs: Iterable[RunInfo], workspace: Path, name: str) -> RunInfo:
    known = {run.name: run for run in runs}
    name = Path(name).name  # WORKSPACE/runs/NAME, as other commands take it
    if name not in known:
        raise UserError(f"{workspace / 'runs'}: no run {name!r}", hint=nearest_run(name, known))
    return known[name]


def _only_checkpoints(run: RunInfo) -> Removal:
    if run.state != "finished":
        raise UserError(
            f"{run.name}: {run.state}, and it needs its checkpoints to resume",
            hint="Resume it, or remove the whole run.",
        )
    folder = run.folder / "train" / "checkpoints"
    folders = (folder,) if folder.is_dir() else ()
    return Removal(run, folders, sum(map(disk_bytes, folders)), ())


def _refuse_base_of_others(run: RunInfo, others: Iterable[RunInfo]) -> None:
    """Raise: UserError, another run reads a model or data from this one's folder."""
    for other in others:
        for key, path in _inputs(other):
            if path.is_relative_to(run.folder.resolve()):
                raise UserError(
                    f"{run.name}: run {other.name} uses {path} ({key})",
                    hint=f"Remove {other.name} first, or both: canvastune runs rm {other.name} {run.name}",
                )


def _inputs(run: RunInfo) -> Iterator[tuple[str, Path]]:
    record = _record(run)
    if record is None:
        return
    tree = json.loads(record.config)  # of any version
    texts = {f"data.{key}": tree["data"].get(key) for key in ("source", "validation")}
    mixture = enumerate(tree["data"].get("mixture") or ())
    texts |= {f"data.mixture.{index}": source.get("source") for index, source in mixture}
    for key, text in {"model.id": tree["model"]["id"], **texts}.items():
        if text:  # as it was typed: relative to the folder in which the run was started
            typed = Path(run.directory or os.curdir)
            yield key, (typed / Path(text).expanduser()).resolve()


def _record(run: RunInfo) -> RunRecord | None:
    return None if run.state == "unreadable" else read_record(run.folder)


def _refuse_served(run: RunInfo, workspace: Path) -> list[str]:
    """Return notes about the run's registered models.

    Raises:
        UserError: one of them is the champion or has another alias that a person gave it; MLflow
            cannot be asked, and the recipe registers its models.
    """
    record = _record(run)
    if record is None or not record.mlflow_run_id:
        return []
    config = parse_config(record.config, f"{run.folder}/run.json")
    uri = tracking_uri(config, workspace)
    if uri.startswith("sqlite:///") and not database_file(uri).exists():
        return []  # asking would create it
    server = connect(uri)
    try:
        aliases = server.request(lambda client: aliases_of(client, record.mlflow_run_id))
    except TrackingError as error:
        return _unknown(run, config, f"MLflow at {server} {error}", final=error.final)
    for version, names in aliases.items():
        serious = [name for name in names if name != CANDIDATE]
        if serious:
            raise UserError(
                f"{run.name}: its model is {version} in MLflow, with the alias {serious[0]!r}",
                hint="Set the alias on another version first.",
            )
    return [f"MLflow keeps {version}, whose folder is deleted" for version in aliases]


def _unknown(run: RunInfo, config: RunConfig, reason: str, *, final: bool) -> list[str]:
    name = config.tracking.registered_model
    if name and not final:
        raise UserError(
            f"{run.name}: cannot determine whether its model is the champion of {name}: {reason}",
            hint="Start MLflow, or set MLFLOW_TRACKING_URI, and try again.",
        )
    return [f"not known whether MLflow has registered its model: {reason}"]


def _artifacts(
    workspace: Path, run: RunInfo, others: Iterable[RunInfo]
) -> tuple[list[Path], list[str]]:
    """Return the run's own artifacts in kfp/, and a note about those that other runs need."""
    record, mine = _record(run), []
    for output in sorted((workspace / _ARTIFACTS).glob("*/resolve/executor_output.json")):
        if _run_folder(output) == str(run.folder.absolute()):
            mine += [task for task in sorted(output.parents[1].iterdir()) if task.is_dir()]
    prepared = [task for task in mine if task.name == _PREPARED]
    users = [
        other.name
        for other in others
        if other.state != "finished"
        and record is not None
        and (found := _record(other)) is not None
        and found.data_fingerprint == record.data_fingerprint
    ]
    if prepared and users:
        note = f"its prepared data is kept: {users[0]}, which is not finished, uses it"
        return [task for task in mine if task not in prepared], [note]
    return mine, []


def _run_folder(output: Path) -> str | None:
    """Return the run's folder as an attempt's first step reported it."""
    try:
        return str(json.loads(output.read_text(encoding="utf-8"))["parameterValues"]["run_folder"])
    except (OSError, ValueError, KeyError, TypeError):  # of a step that was killed
        return None

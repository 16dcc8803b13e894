"""`canvastune runs`: list the runs of a workspace, and remove some."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from canvastune.errors import UserError, one_line
from canvastune.io.byte_size import format_bytes
from components.run_directory import BASE_RESULTS
from components.run_list import RunInfo, disk_bytes, list_runs
from components.run_removal import Removal, plan_removal, remove

_HEADER = ("run", "state", "figures", "on disk", "changed")
_SPANS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def show_runs(workspace: Path, *, as_json: bool = False) -> str:
    """Return the runs of a workspace as a table, with what to do about unfinished ones, or as JSON.

    Raises:
        UserError: no such workspace.
    """
    runs = list_runs(workspace)
    free = shutil.disk_usage(workspace).free
    shared = {
        name: disk_bytes(folder)
        for name, folder in (
            ("artifacts and prepared data (kfp/)", workspace / "kfp"),
            (f"answers of base models (runs/{BASE_RESULTS}/)", workspace / "runs" / BASE_RESULTS),
        )
        if folder.is_dir()
    }
    if as_json:
        tree = {
            "workspace": str(workspace.absolute()),
            "free_bytes": free,
            "shared_bytes": sum(shared.values()),
            "runs": [_to_json(run) for run in runs],
        }
        return json.dumps(tree, indent=2)
    if not runs:
        return f"{workspace}: no runs yet"
    now = time.time()
    rows = [_HEADER, *(_row(run, now) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_line(row, widths) for row in rows]
    total = f"{_count(len(runs))}, {format_bytes(sum(run.bytes for run in runs))}"
    parts = [total, *(f"{name} {format_bytes(size)}" for name, size in shared.items())]
    lines += ["", f"{'; '.join(parts)}; {format_bytes(free)} free"]
    for run in runs:
        lines += _advice(run)
    return "\n".join(lines)


def remove_runs(
    workspace: Path,
    names: Sequence[str],
    *,
    checkpoints: bool = False,
    dry_run: bool = False,
    yes: bool = False,
) -> str:
    """Remove runs, after a question; return a line that says what was freed.

    Args:
        checkpoints: only their training's checkpoints.
        dry_run: say what would be deleted, and delete nothing.
        yes: do not ask.

    Raises:
        UserError: as `plan_removal`; there is no terminal to ask at.
    """
    removals = plan_removal(workspace, names, checkpoints=checkpoints)
    total = format_bytes(sum(removal.bytes for removal in removals))
    for removal in removals:
        print(_describe(removal))
    what = f"{'checkpoints of ' if checkpoints else ''}{_count(len(removals))}"
    if dry_run:
        return f"{what}, {total}: nothing was deleted (--dry-run)"
    if not yes and not _agreed(f"Delete {what}, {total}?"):
        return "nothing was deleted"
    for removal in removals:
        remove(removal)
    return f"{what} deleted, {total} freed"


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(
            "nothing was deleted: standard input is not a terminal, so confirmation is not possible",
            hint="Check the list above, then add --yes.",
        )
    print(f"{question} There is no way back. [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _describe(removal: Removal) -> str:
    run = removal.run
    figures = f", {text}" if (text := _figures(run)) else ""
    lines = [f"{run.name}: {run.status}{figures}, {format_bytes(removal.bytes)}"]
    lines += [f"    {folder}" for folder in removal.folders]
    lines += [f"    {note}" for note in removal.notes]
    return "\n".join(lines)


def _row(run: RunInfo, now: float) -> tuple[str, ...]:
    age = "" if run.changed is None else f"{_age(now - run.changed)} ago"
    return run.name, run.status, _figures(run), format_bytes(run.bytes), age


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        text.rjust(width) if _HEADER[column] == "on disk" else text.ljust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _figures(run: RunInfo) -> str:
    for name, (before, after) in run.figures.items():
        show = "{:.3f}" if name.endswith("loss") else "{:.1%}"
        start = "" if before is None else f"{show.format(before)} -> "
        return f"{name} {start}{show.format(after)}"
    return "" if run.step is None else f"step {run.step} of {run.steps}"


def _advice(run: RunInfo) -> list[str]:
    lines = []
    if run.state == "failed" and run.reason:
        message, _, hint = run.reason.partition("\n")
        lines.append(f"\n{run.name} failed: {one_line(message)}")
        lines += [f"  hint: {one_line(hint)}"] if hint else []
    if run.state in ("failed", "interrupted") and run.command:
        there = f"cd {shlex.quote(run.directory)} && "
        here = not run.directory or Path(run.directory) == Path.cwd()
        lines += [f"\nTo resume {run.name}:", f"  {'' if here else there}{run.command}"]
    if run.open_in_mlflow:
        lines += [
            f"\n{run.name} was killed and still counts as running in MLflow. To end it there:",
            f"  canvastune sync {shlex.quote(str(run.folder))}",
        ]
    return lines


def _age(seconds: float) -> str:
    seconds = max(seconds, 0)  # the clock may have gone back
    unit, size = next(((unit, size) for unit, size in _SPANS if seconds >= size), _SPANS[-1])
    return f"{seconds // size:.0f} {unit}"


def _count(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _to_json(run: RunInfo) -> dict[str, Any]:
    figures = {
        name.replace(" ", "_"): {"before": before, "after": after}
        for name, (before, after) in run.figures.items()
    }
    return {**asdict(run), "folder": str(run.folder), "figures": figures}

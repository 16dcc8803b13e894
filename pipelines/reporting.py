"""`canvastune report`: the page of a run again, on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from canvastune.errors import UserError
from canvastune.report.build import write_report
from components.earlier_runs import find_compared, find_run
from components.run_directory import read_record


def report_again(folder: Path, compare: Sequence[Path], out: Path | None) -> Path:
    """Write the report of a run, and return the page's path.

    Args:
        folder: a run's, of the pipeline or of the trainer alone.
        compare: folders of runs whose curves are laid over.
        out: a new folder; None: the run's own `report/`, in whose place the new one comes when it is whole.

    Raises:
        UserError: a folder that is no run's; a run that still goes on, without `out`; an `out` that is not empty.
    """
    run, others = find_run(folder), find_compared(compare)
    if out is not None:
        return write_report(run, out, others)
    record = read_record(folder)
    if record is not None and not record.finished:
        raise UserError(f"{folder}: this run is not finished, and writes its report when it is. Give --output DIR to see it now")
    made, new, old = folder / "report", folder / f".report.new-{os.getpid()}", folder / f".report.old-{os.getpid()}"
    write_report(run, new, others)
    if made.exists():
        made.rename(old)
    new.rename(made)
    shutil.rmtree(old, ignore_errors=True)
    return made / "report.html"

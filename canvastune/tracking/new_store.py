"""Create the file of an embedded MLflow store as MLflow does, without the seconds of its migrations.

MLflow starts a new file with the tables of its first version and applies every migration since. What
that leaves in the file is in mlflow_store.sql, which `python -m tools.mlflow_store` writes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from canvastune.io.atomic import fsync

SCRIPT = Path(__file__).with_name("mlflow_store.sql")


def create_store(database: Path, version: str) -> None:
    """Create the file, unless it exists. MLflow then opens it as any other.

    Args:
        version: of the installed MLflow. One that the script is not of creates its own file.

    Raises:
        sqlite3.OperationalError: it cannot be written.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    if database.exists() or not script.startswith(first_line(version)):
        return
    partial = database.with_name(f".{database.name}.partial-{os.getpid()}")
    try:
        with contextlib.closing(sqlite3.connect(partial)) as connection:
            connection.executescript(f"PRAGMA synchronous = OFF;\n{script}")
        fsync(partial)
        partial.replace(database)
    finally:
        partial.unlink(missing_ok=True)


def first_line(version: str) -> str:
    """Return how the script of an MLflow version begins."""
    return f"-- MLflow {version}: python -m tools.mlflow_store\n"

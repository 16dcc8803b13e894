"""Write what the installed MLflow creates in a new SQLite file, as SQL.

Run `python -m tools.mlflow_store` after an upgrade of MLflow.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path

from canvastune.tracking.client import load_mlflow
from canvastune.tracking.new_store import SCRIPT, first_line


def script() -> str:
    """Return the statements that create MLflow's tables with what its migrations leave in them.

    The default experiment is left out: it has a time and a path, and MLflow adds it where it is
    missing.
    """
    version = load_mlflow().__version__
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"sqlite:///{database}", folder).engine.dispose()
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("DELETE FROM experiments")
            connection.commit()
            # MLflow's statements end lines with a space.
            lines = (line.rstrip() for each in connection.iterdump() for line in each.split("\n"))
            return first_line(version) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    SCRIPT.write_text(script(), encoding="utf-8")

"""Copy MLflow's SQLite databases consistently while the server runs, and keep the newest copies."""

import pathlib
import sqlite3
import sys
import time
from contextlib import closing

folder, keep = pathlib.Path("/mlflow"), int(sys.argv[1])
backups = folder / "backups"
backups.mkdir(exist_ok=True)
began = time.strftime("%Y%m%d-%H%M%S", time.gmtime())  # in the names of all copies
for name in ("mlflow", "auth"):
    database = folder / f"{name}.db"
    if not database.exists():
        continue
    made = backups / f"{name}-{began}.db"
    partial = made.with_suffix(".partial")
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(partial)) as copy:
        source.backup(copy)
        (state,) = copy.execute("PRAGMA integrity_check").fetchone()
    if state != "ok":
        sys.exit(f"{database}: the copy is damaged: {state}")
    partial.rename(made)
    print(f"{made}: {made.stat().st_size} bytes")
    for old in sorted(backups.glob(f"{name}-*.db"))[:-keep]:
        old.unlink()
        print(f"{old}: removed")

"""Replace MLflow's SQLite databases by the copies of one backup, while the server is stopped.

The variable BACKUP is the backup's time, as in the names of its files, or `newest`.
"""

import contextlib
import os
import pathlib
import shutil
import sqlite3
import sys
import time
import urllib.error
import urllib.request

folder, chosen = pathlib.Path("/mlflow"), os.environ["BACKUP"]
backups = folder / "backups"
times = sorted(
    file.stem.partition("-")[2]
    for name in ("mlflow", "auth")
    for file in backups.glob(f"{name}-[0-9]*.db")  # by time, unlike mlflow-old.db
)
if not times:
    sys.exit(f"{backups}: found no backup, expected mlflow-TIME.db")
known = ", ".join(sorted(set(times)))
if chosen == "newest":
    chosen = times[-1]
copies = {
    name: copy for name in ("mlflow", "auth") if (copy := backups / f"{name}-{chosen}.db").exists()
}
if not copies:
    sys.exit(f"BACKUP: found {chosen}, expected newest or one of {known}")
try:
    urllib.request.urlopen(sys.argv[1], timeout=10).close()
    running = True
except urllib.error.HTTPError:
    running = True
except OSError:  # nothing answers at that address
    running = False
if running:
    sys.exit(
        f"{sys.argv[1]}: MLflow answers, expected it to be stopped: scale its Deployment to 0 replicas first"
    )

# All new files are complete before the first old one is touched.
for name, copy in copies.items():
    partial = folder / f"{name}.db.partial"
    shutil.copyfile(copy, partial)
    try:
        with contextlib.closing(sqlite3.connect(partial)) as database:
            (state,) = database.execute("PRAGMA integrity_check").fetchone()
            # An empty file, as a copy that stopped at once leaves, is a database for SQLite.
            if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                state = "it has no tables"
    except sqlite3.DatabaseError as error:
        state = str(error)
    if state != "ok":
        partial.unlink()
        sys.exit(
            f"{copy}: the copy is damaged: {state}; nothing was replaced. Choose another: {known}"
        )
aside = folder / f"replaced-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
aside.mkdir()
for name, copy in copies.items():
    # A journal that stays would be applied to the restored file.
    for suffix in ("", "-journal", "-wal", "-shm"):
        old = folder / f"{name}.db{suffix}"
        if old.exists():
            old.rename(aside / old.name)
    (folder / f"{name}.db.partial").rename(folder / f"{name}.db")
    print(f"{folder / name}.db: restored from {copy}")
print(f"{aside}: what was replaced; delete it once MLflow shows what you expect")

"""A new embedded store is the one that MLflow would have created."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from canvastune.tracking import new_store
from canvastune.tracking.client import TrackingClient, load_mlflow
from canvastune.tracking.shared_store import open_for_forks
from tools import mlflow_store


def contents(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("DELETE FROM experiments")  # the default one has a time and a path
        return list(connection.iterdump())


def open_store(database: Path) -> TrackingClient:
    client = TrackingClient(f"sqlite:///{database}")
    assert client.request(lambda mlflow: mlflow.get_experiment("0")).name == "Default"
    return client


def test_the_script_creates_what_the_installed_mlflow_creates() -> None:
    made, kept = mlflow_store.script(), new_store.SCRIPT.read_text(encoding="utf-8")
    assert in_any_order(made) == in_any_order(kept), "run python -m tools.mlflow_store"


def in_any_order(script: str) -> list[list[str]]:
    """Return the lines of each statement: MLflow's order of constraints and indices is by chance."""
    statements = script.split(";\n")
    return sorted(
        sorted(line.strip().rstrip(",") for line in statement.split("\n"))
        for statement in statements
    )


def test_mlflow_opens_a_store_from_the_script(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    new_store.create_store(database, load_mlflow().__version__)
    made = contents(database)
    client = open_store(database)
    assert contents(database) == made, "MLflow changed what it found"
    assert client.experiment("one") == "1"
    assert not list(tmp_path.glob("*partial*"))


def test_a_store_that_exists_is_kept(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"kept")
    new_store.create_store(database, load_mlflow().__version__)
    assert database.read_bytes() == b"kept"


def test_a_new_store_says_which_runs_its_default_experiment_has_and_an_older_one_is_not_touched(
    tmp_path: Path,
) -> None:
    """Neither what a person wrote nor a description that is missing since the store was made."""
    new, older = (f"sqlite:///{tmp_path}/{name}.db" for name in ("new", "older"))
    note = "mlflow.note.content"
    tags = TrackingClient(new).request(lambda client: client.get_experiment("0")).tags
    assert "`tracking.experiment`" in tags[note]
    new_store.create_store(tmp_path / "older.db", load_mlflow().__version__)
    assert TrackingClient(older).request(lambda client: client.get_experiment("0")).tags == {}
    TrackingClient(new).request(lambda client: client.set_experiment_tag("0", note, "Ours."))
    again = TrackingClient(new).request(lambda client: client.get_experiment("0"))
    assert again.tags == {note: "Ours."}


def test_another_version_of_mlflow_creates_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.sql"
    other.write_text("-- MLflow 1.0.0: python -m tools.mlflow_store\nnot SQL", encoding="utf-8")
    monkeypatch.setattr(new_store, "SCRIPT", other)
    new_store.create_store(tmp_path / "mlflow.db", load_mlflow().__version__)
    assert not (tmp_path / "mlflow.db").exists()
    client = open_store(tmp_path / "mlflow.db")
    assert client.request(lambda mlflow: mlflow.get_experiment("0")).tags


SHARED = """
import os, sys, threading
from pathlib import Path
from canvastune.tracking.client import connect
from canvastune.tracking.shared_store import open_for_forks

uri = sys.argv[1]
assert not open_for_forks(uri), "a store that no one has created was opened"
creating = os.fork()
if creating == 0:
    connect(uri).experiment("one")
    os._exit(0)
os.waitpid(creating, 0)
assert open_for_forks(uri)
files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.exists()]
assert not [file for file in files if file.endswith(".db")], files
assert threading.active_count() == 1
for number in range(2):
    if (fork := os.fork()) == 0:
        client = connect(uri)._client
        assert client is not None, "the fork opens the store again"
        client.create_run("1")
        os._exit(0)
    assert os.waitpid(fork, 0)[1] == 0
found = connect(uri).request(lambda client: client.search_runs(["1"]))
print(len(found), "runs")
"""


def test_forks_use_the_store_that_was_opened_for_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED, f"sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "2 runs\n", done.stderr


def test_a_store_that_cannot_be_opened_is_left_to_the_forks(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database")
    assert not open_for_forks(f"sqlite:///{tmp_path}/mlflow.db")
    assert not open_for_forks("http://127.0.0.1:9")

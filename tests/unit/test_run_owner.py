"""A run's folder has one owner at a time, through the whole pipeline."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import load_config
from canvastune.errors import UserError
from components import run_owner
from components.run_owner import OWNER, OWNER_FILE, find_owner, own_run
from pipelines.cli import main
from pipelines.local_runner import run_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"
_HOLD = """
import sys, time
from pathlib import Path
from components.run_owner import own_run
with own_run(Path(sys.argv[1]), "canvastune run my.yaml --run-name mine"):
    print("owned", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(code: str, *arguments: str, **environment: str) -> Iterator[Any]:
    """A second process, once it has said its first line; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the other process has ended"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_start_is_refused_at_once_naming_host_process_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "mine"
    with another_process(_HOLD, str(folder)) as other:
        before = time.monotonic()
        command = ["run", str(RECIPE), "--workspace", str(tmp_path), "--run-name", "mine"]
        assert main(command) == 1
        assert time.monotonic() - before < 10, "it waited"
        error = capsys.readouterr().err
        assert error.count("\n") == 2, f"more than a message and a hint: {error}"
        assert re.search(
            rf"runs/mine: .* process {other.pid} on {socket.gethostname()}\b.*"
            r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
            error,
        ), error
        assert "--run-name" in error
        owner = find_owner(folder)
        assert owner is not None
        assert (owner.process, owner.command) == (
            other.pid,
            "canvastune run my.yaml --run-name mine",
        )
        assert [path.name for path in folder.iterdir()] == [OWNER_FILE], "something was written"


def test_a_killed_process_owns_nothing_and_the_next_one_knows_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with another_process(_HOLD, str(folder)) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert find_owner(folder) is None
        with own_run(folder) as before:
            assert before is not None
            assert before.process == other.pid
            owner = find_owner(folder)
            assert owner is not None
            assert owner.process == os.getpid()


def test_an_owner_that_ends_leaves_the_run_but_no_folder_without_one(tmp_path: Path) -> None:
    with own_run(tmp_path / "refused"):
        pass
    assert not (tmp_path / "refused").exists()
    with own_run(tmp_path / "begun") as before:
        (tmp_path / "begun" / "run.json").write_text("{}")
    assert before is None
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["run.json"]
    assert find_owner(tmp_path / "begun") is None
    with own_run(tmp_path / "begun") as before:
        assert before is None, "an orderly end looks like a kill"


def test_those_who_only_look_do_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    with own_run(tmp_path):
        pass
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / OWNER_FILE
    file.write_text("{}")
    looking = os.open(file, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    enough = threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
    enough.start()
    with own_run(tmp_path):
        assert find_owner(tmp_path) is not None
    enough.join()
    os.close(looking)


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_owner.fcntl, "flock", refuse)
    with own_run(tmp_path / "mine"):
        assert (tmp_path / "mine" / OWNER_FILE).is_file()
    assert "No locks available" in caplog.text


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only")]
)
def test_a_workspace_that_cannot_be_written_is_one_line(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    workspace, mkdir = tmp_path / "ws", Path.mkdir
    workspace.mkdir()

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent == workspace:
            raise error
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["run", str(RECIPE), "--workspace", str(workspace)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"canvastune: error: --workspace {workspace}: ")
    assert said.count("\n") == 2, said


def test_folders_of_a_workspace_that_are_read_only_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount that became read-only: the folders are there, for root as well."""
    access = os.access
    monkeypatch.setattr(
        "pipelines.local_runner.os.access",
        lambda path, mode: Path(path).name != "kfp" and access(path, mode),
    )
    with pytest.raises(UserError, match=r"--workspace .*/kfp\b"):
        run_recipe(load_config(RECIPE), tmp_path, None)
    assert not list((tmp_path / "runs").iterdir()), "a folder of a run that never started is left"


def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(RECIPE), "--workspace", str(tmp_path), "--run-name", "my run"]
    assert main(command) == 1
    assert "'my run'" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


_STEP = """
import sys, time
from components.runtime import exit_on_user_error
with exit_on_user_error():
    try:
        print("working", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""


def test_a_step_ends_as_with_ctrl_c_when_the_process_that_owns_its_run_is_killed(
    tmp_path: Path,
) -> None:
    with (
        another_process(_HOLD, str(tmp_path / "mine")) as owner,
        another_process(_STEP, **{OWNER: str(owner.pid)}) as step,
    ):
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert step.wait(20) == 130
        assert "interrupted" in step.stdout.read()

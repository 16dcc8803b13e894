"""A step that is forked from the warm process behaves as one that an interpreter was started for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from canvastune.errors import parse_error
from pipelines.warm_start import fork, search_path, server_ids, step_variables, warm_processes
from pipelines.warm_start.server import KFP, job_name

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
ROOT = Path(__file__).parents[2]
PROGRAM = "tests.support.forked"
# A server that has only what the program needs, or one more module.
SERVER = """
import sys
from pipelines.warm_start import server
server.main({needed!r}, *sys.argv[1:])
"""
SECONDS = 20.0


@contextlib.contextmanager
def warm(*needed: str) -> Iterator[None]:
    """Start a server of other jobs, and the one of the program that it hands them on to."""
    codes = SERVER.format(needed={}), SERVER.format(needed={PROGRAM: (PROGRAM, *needed)})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in step_variables().items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        with warm_processes([(sys.executable, "-c", code) for code in codes]):
            patch.setenv("PATH", search_path())
            yield


@pytest.fixture(scope="module", autouse=True)
def warm_server() -> Iterator[None]:
    with warm():
        yield


def start(
    *arguments: str, python: Sequence[str] = ("python3",), **options: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*python, "-m", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen[str], text: str = "") -> tuple[int, str, str]:
    out, err = process.communicate(text, timeout=SECONDS)
    return process.returncode, out, err


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def parent(**options: Any) -> int:
    code, out, err = ended(start("parent", **options))
    assert code == 0, err
    return int(out)


def test_a_step_is_a_child_of_the_process_that_has_its_libraries() -> None:
    assert parent() == server_ids()[-1]
    assert parent(python=[os.environ["PYTHON_EXEC"], "-u"]) == server_ids()[-1]


def test_ctrl_c_reaches_a_server_only_through_its_command() -> None:
    assert [os.getpgid(server) for server in server_ids()] == list(server_ids())


def test_pytorch_does_not_take_back_its_operators_at_the_end_of_a_fork() -> None:
    def taken_back() -> int:
        found = [(each, each.peek()) for each in weakref.finalize._registry]  # type: ignore[attr-defined]
        ours = [each for each, what in found if what and what[1] is torch.library._del_library]
        return sum(each.atexit for each in ours)

    assert taken_back(), "there is nothing to keep: fork._keep_operators may go"
    fork._keep_operators()
    assert not taken_back()


def test_a_fork_has_the_streams_folder_and_environment_of_its_caller(tmp_path: Path) -> None:
    said = []
    for python in ("python3", sys.executable):
        environment = {**os.environ, "FORKED_VARIABLE": "given"}
        process = start(
            "report",
            "--a",
            "b c",
            python=[python],
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
        )
        code, out, err = ended(process, "from standard input")
        said.append((code, json.loads(out), err))
    assert said[0] == said[1]
    assert said[0][1]["folder"] == str(tmp_path)
    assert said[0][1]["variable"] == "given"
    assert said[0][1]["input"] == "from standard input"
    assert said[0][1]["leads_session"]


def test_a_fork_names_its_callers_without_their_source() -> None:
    """Torchrun asks for them before its ranks start: the source is searched for in all modules."""
    assert json.loads(ended(start("callers"))[1]) == ["main", None]


def test_a_fork_ignores_the_signals_that_its_caller_ignores() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ignoring = start("report")
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        other = start("report")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert json.loads(ended(ignoring)[1])["ignores_hangup"]
    assert not json.loads(ended(other)[1])["ignores_hangup"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("exit", "0"), 0),
        (("exit", "3"), 3),
        (("exit", "130"), 130),
        (("kill", str(int(signal.SIGKILL))), -signal.SIGKILL),
        (("kill", str(int(signal.SIGABRT))), -signal.SIGABRT),
    ],
)
def test_a_fork_ends_as_a_process_does(arguments: tuple[str, ...], code: int) -> None:
    assert ended(start(*arguments))[0] == code
    assert ended(start(*arguments, python=[sys.executable]))[0] == code


def test_the_traceback_of_a_fork_is_its_own() -> None:
    code, _, err = ended(start("fail", "the reason"))
    assert code == 1
    assert err.rstrip().endswith("ValueError: the reason")
    assert "client.py" not in err
    assert parent() == server_ids()[-1], "a failed step took the server with it"


def test_a_full_disk_ends_a_fork_without_a_traceback() -> None:
    code, _, err = ended(start("fill"))
    error = parse_error(err)
    assert code == 1
    assert error is not None
    assert error.hint
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("own_session", [True, False])
def test_a_signal_reaches_the_fork_once(
    tmp_path: Path, number: signal.Signals, own_session: bool
) -> None:
    record = tmp_path / "record"
    before = signal.signal(number, lambda *_: None)  # not ignored, as in a shell's background
    try:
        process = start("wait", str(record), start_new_session=own_session)
    finally:
        signal.signal(number, before)
    eventually(record.exists, "the program did not start")
    process.send_signal(number)
    assert ended(process)[0] == 7
    assert record.read_text(encoding="utf-8") == number.name


def test_a_fork_ends_with_the_process_that_stands_for_it(tmp_path: Path) -> None:
    record = tmp_path / "record"
    process = start("wait", str(record))
    eventually(lambda: record.exists() and bool(record.read_text()), "did not start")
    fork = int(record.read_text(encoding="utf-8"))
    assert psutil.Process(fork).cmdline()[:5] == ["python3", "-m", PROGRAM, "wait", str(record)]
    process.kill()
    eventually(lambda: not psutil.pid_exists(fork), "the fork outlived its client")
    process.communicate()


@pytest.mark.parametrize("name", ["HF_HOME", "PYTHONHASHSEED", "OMP_PROC_BIND"])
def test_what_libraries_read_while_imported_makes_a_new_interpreter(name: str) -> None:
    found = parent(env={**os.environ, name: "0"})
    assert found not in server_ids()
    assert parent(env={**os.environ, "OMP_NUM_THREADS": "1"}) == server_ids()[-1]


def test_another_module_is_run_by_a_new_interpreter() -> None:
    code = "import os; print(os.getppid())"
    done = subprocess.run(
        ["python3", "-c", code], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert int(done.stdout) == os.getpid()


@pytest.mark.parametrize("ended_server", [0, 1])
def test_without_a_server_every_step_starts_by_itself(ended_server: int) -> None:
    with warm():
        first, second = server_ids()
        assert parent() == second
        os.kill(server_ids()[ended_server], signal.SIGKILL)
        assert parent() not in (first, second)


@pytest.mark.parametrize("obstacle", ["a long path", "a disk without programs"])
def test_where_no_server_can_be_asked_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "a long path":
        folder = tmp_path / ("long" * 25)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    outside = server_ids()
    with warm():
        assert server_ids() == outside, "a second server was started"


def test_an_import_that_fails_is_left_to_the_step(capfd: pytest.CaptureFixture[str]) -> None:
    with warm("no_such_module"):
        assert parent() not in server_ids()
        assert "no_such_module" in capfd.readouterr().err


def test_a_step_is_asked_to_stop_when_its_command_is_killed(tmp_path: Path) -> None:
    record = tmp_path / "record"
    needed = SERVER.format(needed={PROGRAM: (PROGRAM,)})
    code = (
        "import os, subprocess, sys\n"
        "from pipelines.warm_start import warm_processes\n"
        f"with warm_processes([(sys.executable, '-c', {needed!r})]):\n"
        f"    subprocess.run([os.environ['PYTHON_EXEC'], '-m', {PROGRAM!r}, 'wait', {str(record)!r}])"
    )
    environment = {**os.environ, **step_variables()}
    command = subprocess.Popen([sys.executable, "-c", code], env=environment)
    eventually(lambda: record.exists() and bool(record.read_text()), "did not start")
    step = psutil.Process(int(record.read_text(encoding="utf-8")))
    server = step.parent()
    assert server is not None
    command.kill()
    command.wait()
    eventually(lambda: record.read_text(encoding="utf-8") == "SIGTERM", "it was not asked to stop")
    eventually(lambda: not server.is_running(), "the server outlived its command")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (
            [
                "-m",
                KFP,
                "--component_module_path",
                "x.py",
                "--executor_input",
                "{}",
                "--function_to_execute",
                "plan",
            ],
            "plan",
        ),
        (["-u", "-m", "canvastune.train", "-m", "other"], "canvastune.train"),
        (["-c", "-m"], ""),
        (["script.py"], ""),
        (["-m"], ""),
        ([], ""),
    ],
)
def test_a_job_is_known_by_its_step_or_module(arguments: list[str], name: str) -> None:
    assert job_name(arguments) == name

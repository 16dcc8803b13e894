"""A process that is forked from a warm server looks and ends like one that was started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.warm import Popen
from tests.support.warm_server import python_command

_REPORT = """
import json, os, subprocess, sys, torch
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ),
    "session": os.getsid(0) == os.getpid(), "parent": os.getppid(), "name": __name__,
    "threads": torch.get_num_threads(), "executable": sys.executable,
    "open": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
}))
"""


def started(popen: Any, code: str, *arguments: str, **options: Any) -> tuple[Any, str, str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *arguments]
    process = popen(command, stdout=pipe, stderr=pipe, text=True, **options)
    said, errors = process.communicate(timeout=120)
    return process, said, errors


def test_it_gets_what_a_started_process_gets(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cwd": tmp_path, "start_new_session": True}
    options["env"] = {"ANSWER": "42", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    forked = json.loads(started(Popen, _REPORT, "a", "b c", **options)[1])
    fresh = json.loads(started(subprocess.Popen, _REPORT, "a", "b c", **options)[1])
    assert fresh["session"]
    for found in (forked, fresh):
        del found["parent"]
        found["environment"].pop("LC_CTYPE", None)  # a start without a locale sets it
    assert forked == fresh


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(7)",
        "import sys; sys.exit('the reason')",
        "1 / 0",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit, os; atexit.register(print, 'the end'); print('first')",
    ],
)
def test_it_ends_as_a_started_process_does(code: str) -> None:
    forked, fresh = started(Popen, code), started(subprocess.Popen, code)
    assert forked[0].returncode == fresh[0].returncode
    assert forked[1] == fresh[1]
    assert forked[2].splitlines()[-1:] == fresh[2].splitlines()[-1:]


def test_mlflow_s_own_program_is_forked_too() -> None:
    program, pipe = Path(sys.executable).parent / "mlflow", subprocess.PIPE
    environment = {"PATH": str(program.parent)}
    options: dict[str, Any] = {"stdout": pipe, "stderr": pipe, "text": True, "env": environment}
    for arguments, code, said in (
        (["--version"], 0, f"mlflow, version {metadata.version('mlflow')}\n"),
        (["no-command"], 2, ""),
    ):
        with Popen(["mlflow", *arguments], **options) as process:
            assert psutil.Process(process.pid).ppid() != os.getpid(), "it was started"
            out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, said), errors
    asked = python_command(["mlflow", "db"], environment)
    assert asked is not None
    assert (asked.script, asked.arguments) == (str(program), ["db"])
    for other in (["mlflow"], ["sh", "-c", "true"]):
        assert python_command(other, {"PATH": os.defpath}) is None


def test_others_see_its_command_line_and_environment_and_signals_reach_it() -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], 'inner'])"
    wait = "import time; print('here', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", nested, wait]
    environment = {**os.environ, "PLACE": "outer"}
    with Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        seen = psutil.Process(process.pid)
        (child,) = seen.children()
        assert [word for word in seen.cmdline() if word] == command
        assert [word for word in child.cmdline() if word][-2:] == [wait, "inner"]
        assert seen.environ()["PLACE"] == child.environ()["PLACE"] == "outer"
        process.terminate()
        assert process.wait(timeout=10) == -signal.SIGTERM
        child.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()

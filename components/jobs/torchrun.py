"""Processes of training or evaluation in the step's own container, under torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from canvastune.errors import UserError
from components.jobs.pod_diagnostics import failure_reason

SHUTDOWN_TIMEOUT = 10  # seconds for torchrun itself, after the ranks' grace period
_FIRST_RANK = "[default0]:"  # torchrun's prefix of the first rank's lines; the rest is its own


def run_torchrun(
    module: Sequence[str], processes: int, output: Path, grace: int, environment: Mapping[str, str]
) -> None:
    """Run a module in several processes on this machine; relay the first one's output.

    Args:
        module: its name and arguments.
        output: a folder, which keeps every rank's output if one fails.
        grace: seconds that the ranks get to save their state when they are stopped.
        environment: variables in addition to this process's.

    Raises:
        UserError: a rank failed; the message ends with its last lines.
    """
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=output))
    # torchrun's own variable for the interpreter of its ranks
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    command = [python, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}"]
    # torchrun kills the ranks of a stopped run after that time, by default 30 s
    command += [f"--shutdown-timeout={grace}"]
    # every rank's output on disk, the first one's also on ours
    command += [f"--log-dir={logs}", "--redirects=3", "--tee=0:3"]
    command += ["-m", *module]
    # torchrun would set one thread, whatever the machine has
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    variables = {"OMP_NUM_THREADS": threads, **os.environ, **environment}
    own_output: list[str] = []
    with terminating_process(command, variables, grace + SHUTDOWN_TIMEOUT) as torchrun:
        for line in torchrun.stdout or ():
            if line.startswith(_FIRST_RANK):
                print(line.removeprefix(_FIRST_RANK), end="", flush=True)
            else:
                own_output.append(line)
    if torchrun.returncode:
        raise read_failure(torchrun.returncode, "".join(own_output), logs)
    shutil.rmtree(logs)


@contextlib.contextmanager
def terminating_process(
    command: list[str], environment: dict[str, str], grace: float
) -> Iterator[subprocess.Popen[str]]:
    """Start a process that ends, with its children, before this block does.

    On an exception it gets one SIGTERM, and SIGKILL if it does not exit within `grace` seconds.
    """
    # A separate session, so that only we get Ctrl-C: a second signal during shutdown makes torchrun
    # orphan its workers.
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield child
        child.wait()
    except BaseException:  # also a closed pipe: KFP's local runner stops reading before it stops us
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
        raise
    finally:
        if child.poll() is None:
            parent = psutil.Process(child.pid)
            for process in [parent, *parent.children(recursive=True)]:
                process.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
        signal.signal(signal.SIGTERM, previous_handler)


def read_failure(exit_code: int, torchrun: str, logs: Path) -> UserError:
    """Return the reason of a failure, from torchrun's own output and the ranks' log files."""
    ranks: dict[int, str] = {}
    # JSON events are on standard output, text on standard error, which is last
    for file in sorted(logs.rglob("attempt_0/*/std*.log"), reverse=True):
        rank = int(file.parent.name)
        ranks[rank] = ranks.get(rank, "") + file.read_text(encoding="utf-8", errors="replace")
    error = failure_reason(exit_code, torchrun, ranks)
    return UserError(str(error), hint=error.hint or f"Every rank's output is in {logs}.")

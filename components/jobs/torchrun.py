"""Processes of training or evaluation in the step's own container; several under torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil

from canvastune.errors import UserError
from components.jobs.pod_diagnostics import failure_reason, rank_failure

SHUTDOWN_TIMEOUT = 10  # seconds for torchrun itself, after the ranks' grace period
_FIRST_RANK = "[default0]:"  # torchrun's prefix of the first rank's lines; the rest is its own
_ONLY_RANK = {  # as torchrun would set them; the port is any that is free
    **dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
    "MASTER_ADDR": "127.0.0.1",
}


def run_ranks(module: Sequence[str], processes: int, output: Path, grace: int) -> None:
    """Run a module in processes on this machine; relay the first one's output.

    Args:
        module: its name and arguments.
        processes: one runs by itself: torchrun's agent would take a second to start and to end.
        output: a folder, which keeps every rank's output if one fails.
        grace: seconds that the ranks get to save their state when they are stopped.

    Raises:
        UserError: a rank failed; the message ends with its last lines.
    """
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=output))
    # torchrun would set one thread, whatever the machine has
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    variables = {"OMP_NUM_THREADS": threads, **os.environ}
    run = _run_one if processes == 1 else partial(_run_torchrun, processes)
    run(module, variables, logs, grace)
    shutil.rmtree(logs)


def _run_one(module: Sequence[str], variables: dict[str, str], logs: Path, grace: int) -> None:
    log = logs / "rank0.log"
    with (
        log.open("w", encoding="utf-8") as copy,
        terminating_process(
            [_python(), "-u", "-m", *module], variables | _ONLY_RANK, grace
        ) as rank,
    ):
        for line in rank.stdout or ():
            copy.write(line)
            print(line, end="", flush=True)
    if rank.returncode:
        said = log.read_text(encoding="utf-8")
        raise _with_logs(rank_failure(0, rank.returncode, said), logs)


def _run_torchrun(
    processes: int, module: Sequence[str], variables: dict[str, str], logs: Path, grace: int
) -> None:
    command = [_python(), "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}"]
    # torchrun kills the ranks of a stopped run after that time, by default 30 s
    command += [f"--shutdown-timeout={grace}"]
    # every rank's output on disk, the first one's also on ours
    command += [f"--log-dir={logs}", "--redirects=3", "--tee=0:3"]
    command += ["-m", *module]
    own_output: list[str] = []
    with terminating_process(command, variables, grace + SHUTDOWN_TIMEOUT) as torchrun:
        for line in torchrun.stdout or ():
            if line.startswith(_FIRST_RANK):
                print(line.removeprefix(_FIRST_RANK), end="", flush=True)
            else:
                own_output.append(line)
    if torchrun.returncode:
        raise read_failure(torchrun.returncode, "".join(own_output), logs)


def _python() -> str:
    """Return torchrun's own variable for the interpreter of its ranks."""
    return os.environ.get("PYTHON_EXEC", sys.executable)


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
    return _with_logs(failure_reason(exit_code, torchrun, ranks), logs)


def _with_logs(error: UserError, logs: Path) -> UserError:
    return UserError(str(error), hint=error.hint or f"Every rank's output is in {logs}.")

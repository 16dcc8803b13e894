"""Start the servers, and put their client where the steps look for Python."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")  # a fork cannot use what its parent asked them for
_LONGEST_ADDRESS = 100  # bytes of a socket's path; the kernel takes 107
_SERVER = (sys.executable, "-m", "pipelines.warm_start.server")
_SERVERS = ((*_SERVER, "without-torch"), (*_SERVER, "with-torch"))
_CLIENT = Path(__file__).with_name("client.py")
PYTHON_EXEC = "PYTHON_EXEC"  # torchrun's: the interpreter that it starts the ranks with

# Process ids of the servers, and the folder of their `python3`.
_served: list[tuple[tuple[int, ...], Path]] = []


def step_variables() -> dict[str, str]:
    """Return the environment of a local run's steps, where it differs from that of the command."""
    return {
        # Threads that spin while they wait starve the other rank of a small machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONSAFEPATH": "1",  # a datasets.py in the current folder is not the library
        "PYTHONUNBUFFERED": "1",  # output appears at once
        "TQDM_DISABLE": "1",  # a progress bar would print a line per update
    }


def server_ids() -> tuple[int, ...]:
    """Return the process ids of the servers inside `warm_processes`; outside there are none."""
    return _served[-1][0] if _served else ()


def search_path() -> str:
    """Return the PATH of a local run's steps: `python3` is this interpreter, or its stand-in."""
    folders = [str(folder) for _, folder in _served[-1:]]
    folders += [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join(folders)


@contextlib.contextmanager
def warm_processes(server_commands: Sequence[Sequence[str]] = _SERVERS) -> Iterator[None]:
    """Serve forks to what the block starts with PYTHON_EXEC, or with `python3` of `search_path`.

    Where a fork is not safe or not possible, every process starts by itself, as it does if the
    servers end early.

    Args:
        server_commands: clients ask the first one; each gets the next one's address as an argument.
    """
    if sys.platform != "linux" or any(map(os.path.exists, _GPU_DRIVERS)):
        yield
        return
    # Removed here and nowhere else: a TemporaryDirectory would be removed by forks of this process.
    folder = Path(tempfile.mkdtemp(prefix="canvastune-warm-"))
    try:
        with _serve(folder, server_commands):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _serve(folder: Path, server_commands: Sequence[Sequence[str]]) -> Iterator[None]:
    addresses = [str(folder / f"socket{number}") for number in range(len(server_commands))]
    python = folder / "bin" / "python3"
    command = [sys.executable, "-I", "-S", str(_CLIENT), addresses[0], sys.executable]
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    python.chmod(0o700)
    # A disk may be mounted such that no program on it can be run.
    if len(os.fsencode(addresses[-1])) > _LONGEST_ADDRESS or not os.access(python, os.X_OK):
        yield
        return
    before = os.environ.get(PYTHON_EXEC)
    os.environ[PYTHON_EXEC] = str(python)
    others = [[other] for other in addresses[1:]] + [[]]
    servers = [
        _start([*command, *other], address)
        for command, address, other in zip(server_commands, addresses, others, strict=True)
    ]
    _served.append((tuple(server.pid for server in servers), python.parent))
    try:
        yield
    finally:
        _served.pop()
        for server in servers:
            server.kill()
            server.wait()
            assert server.stdout is not None
            server.stdout.close()
        os.environ.pop(PYTHON_EXEC)
        if before is not None:
            os.environ[PYTHON_EXEC] = before


def _start(command: Sequence[str], address: str) -> subprocess.Popen[bytes]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fsencode(address))
        listener.listen(64)  # who asks before the server runs waits
        return subprocess.Popen(
            command,
            env={**os.environ, **step_variables()},
            stdin=listener.fileno(),
            stdout=subprocess.PIPE,  # its end here is closed with this process
            process_group=0,  # Ctrl-C is for this process and its steps
        )

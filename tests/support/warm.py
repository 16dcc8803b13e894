"""Python processes without the seconds that their imports take: forked from one that made them.

A test that starts the program's commands uses `Popen` like subprocess.Popen. The processes have
their own id, signals, exit code, environment, streams, session and command line, and what they
start (torchrun its ranks, Kubeflow's local runner its steps) is forked as well. Only the start of
the interpreter is left out: the libraries are imported, whatever the environment says of them.
"""

from __future__ import annotations

import inspect
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from tests.support.warm_server import PIPES, PLAIN, START_CHILD, job_of, python_command

_SERVER = Path(__file__).with_name("warm_server.py")
_ROOM = 64 * 1024  # bytes for a command line and for an environment, which children write there


class _Server:
    """The process that has imported the libraries; it ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["ROOM"] = " " * _ROOM
        command = [sys.executable, "-P", str(_SERVER), str(other.fileno()), " " * _ROOM]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[other.fileno()])
        other.close()

    def fork(self, job: dict[str, Any], streams: Sequence[int]) -> tuple[int, int]:
        """Return the process id and a pipe that gets its wait status."""
        status, theirs = os.pipe()
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(job).encode()], [theirs, *streams])
            os.close(theirs)
            answer = self._channel.recv(64)
        if not answer:
            raise RuntimeError("the process to fork from has ended: its error is above")
        return int(answer), status


_servers: dict[int, _Server] = {}  # by process: a fork of this one needs its own


class _Forked(subprocess.Popen[Any]):
    """A Popen whose Python processes are forked from a server; other commands start as ever."""

    _status: int | None = None
    _waitpid_lock: threading.Lock
    _handle_exitstatus: Callable[[int], None]
    _close_pipe_fds: Callable[..., None]

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(START_CHILD).bind(self, *arguments).arguments
        command = [os.fsdecode(part) for part in given["args"]]
        environment = os.environ if given["env"] is None else given["env"]
        if python_command(command, environment) is None:
            START_CHILD(self, *arguments)
            return
        if os.getpid() not in _servers:
            _servers[os.getpid()] = _Server()
        job, streams = job_of(given)
        self.pid, self._status = _servers[os.getpid()].fork(job, streams)
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in PIPES))

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._status is None:
            return cast(tuple[int, int], PLAIN._try_wait(self, flags))
        if not select.select([self._status], [], [], 0 if flags & os.WNOHANG else None)[0]:
            return 0, 0
        said = os.read(self._status, 4)
        if len(said) != 4:
            raise RuntimeError(f"the process that {self.args!r} was forked from has ended")
        os.close(self._status)
        return self.pid, int(struct.unpack("i", said)[0])

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._status is None:
            return cast(int | None, PLAIN._internal_poll(self, *arguments, **options))
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


# Elsewhere a fork is not safe once libraries are loaded, and there is no /proc to write to.
Popen: type[subprocess.Popen[Any]] = _Forked if sys.platform == "linux" else subprocess.Popen

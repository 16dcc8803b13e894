"""The process that tests/support/warm.py forks from: `warm_server.py FD PADDING`.

It imports what the program's commands import, and forks for each job that comes through the socket
FD. PADDING, and the environment's variable ROOM, are room for the command line and the environment
of a child, so that others see in /proc what it was started with.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

WARM = (
    "torch.distributed.run",
    "canvastune.train",
    "canvastune.evaluate",
    "canvastune.merge",
    "canvastune.report.build",
    "kfp.dsl.executor_main",
    "pipelines.cli",
    "pipelines.finetune",
    "pipelines.local_runner",
    *(
        f"components.{step}.step"
        for step in ("resolve", "prepare_data", "plan", "train", "merge_lora", "evaluate", "report")
    ),
    "transformers.models.gemma4.modeling_gemma4",  # imported when a model is built
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
)
PLAIN: Any = subprocess.Popen  # whose own methods, which are not public, are needed
START_CHILD = PLAIN._execute_child
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_KEPT_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)  # what ignores them starts so, too
_KFP = "kfp.dsl.executor_main"
_SCRIPTS = ("mlflow",)  # programs next to the interpreter


class Python(NamedTuple):
    """What a command line of Python's asks for."""

    module: str | None
    code: str | None
    arguments: list[str]
    safe_path: bool
    component: str | None = None  # the source of a Kubeflow step
    script: str | None = None  # the path of one of _SCRIPTS


def python_command(command: Sequence[str], environment: Mapping[str, str]) -> Python | None:
    """Read `python [-P] [-u] -m MODULE ...`, the same with `-c CODE`, a program of _SCRIPTS, and the shell
    command of a Kubeflow step; None: something else.
    """
    words = list(command)
    if words[0] == "sh" and len(words) > 3 and _KFP in words[2]:
        # The shell writes the component's source to a file and runs this module on it.
        return Python(_KFP, None, words[4:], False, component=words[3])
    if words[0] not in (sys.executable, "python3", "python"):
        script = shutil.which(words[0], path=environment.get("PATH", os.defpath))
        return Python(None, None, words[1:], True, script=script) if _is_ours(script) else None
    options = set()
    for at, word in enumerate(words[1:], 1):
        if word == "-m":
            return Python(words[at + 1], None, words[at + 2 :], "-P" in options)
        if word == "-c":
            return Python(None, words[at + 1], words[at + 2 :], "-P" in options)
        if word not in ("-P", "-u"):
            return None
        options.add(word)
    return None


def _is_ours(script: str | None) -> bool:
    """Return whether a program is a script of this interpreter."""
    own = Path(sys.executable).parent
    return script is not None and Path(script).parent == own and Path(script).name in _SCRIPTS


def job_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Return what a child needs to know of the arguments of Popen's method, and its streams."""
    job = {
        "command": [os.fsdecode(part) for part in given["args"]],
        "environment": dict(os.environ if given["env"] is None else given["env"]),
        "folder": os.fspath(given["cwd"] or os.getcwd()),
        "session": given["start_new_session"],
        "group": given["process_group"],
        "ignored": [n for n in _KEPT_IGNORED if signal.getsignal(n) == signal.SIG_IGN],
    }
    own = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    return job, [place if stream == -1 else stream for place, stream in enumerate(own)]


class _Pristine(NamedTuple):
    """What a process that was forked from a busy one gets back, as if it had just started."""

    path: list[str]
    executable: str
    streams: tuple[Any, Any, Any]
    handlers: dict[str, tuple[list[logging.Handler], int, bool]]
    warnings: list[Any]

    @classmethod
    def take(cls) -> _Pristine:
        handlers = {
            name: (list(logger.handlers), logger.level, logger.propagate)
            for name, logger in _loggers().items()
        }
        streams = (sys.stdin, sys.stdout, sys.stderr)
        return cls(list(sys.path), sys.executable, streams, handlers, list(warnings.filters))

    def restore(self) -> None:
        sys.path[:] = self.path
        sys.executable = self.executable
        sys.stdin, sys.stdout, sys.stderr = self.streams
        for name, logger in _loggers().items():
            handlers, logger.level, logger.propagate = self.handlers.get(name, ([], 0, True))
            logger.handlers = list(handlers)
        manager: Any = logging.root.manager
        manager._clear_cache()
        filters: Any = warnings.filters
        filters[:] = self.warnings
        tempfile.tempdir = None


def _loggers() -> dict[str, logging.Logger]:
    made = logging.root.manager.loggerDict.items()
    named = {name: logger for name, logger in made if isinstance(logger, logging.Logger)}
    return {**named, "root": logging.root}


def serve(channel: socket.socket) -> None:
    """Fork for each job until the other end of the channel closes; report how children end."""
    for module in WARM:
        importlib.import_module(module)
    if threading.active_count() > 1:
        raise RuntimeError(f"a fork would lose {threading.enumerate()}: an import started them")
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    # kfp and torchrun ask for the stack at every call. The lines of source that they do not use are
    # searched for in all modules, of which a fork has thousands.
    inspect.stack.__defaults__ = (0,)
    pristine = _Pristine.take()
    gc.freeze()  # what is here stays as it is in every child
    PLAIN._execute_child = _starter(pristine)
    ended, wake = os.pipe()
    for pipe in (ended, wake):
        os.set_blocking(pipe, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    while True:
        waited: list[Any] = [channel, ended]
        ready = select.select(waited, [], [])[0]
        if ended in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(ended, 4096)
            _report(statuses)
        if channel in ready:
            message, (status, *streams), _, _ = _receive(channel)
            if not message:
                return
            child = os.fork()
            if child == 0:
                _become(json.loads(message), streams, pristine)
            for stream in streams:
                os.close(stream)
            statuses[child] = status
            channel.send(str(child).encode())


def _receive(channel: socket.socket) -> tuple[bytes, list[int], int, Any]:
    message, files, flags, address = socket.recv_fds(channel, 2**20, 4)
    return message, files or [-1], flags, address


def _report(statuses: dict[int, int]) -> None:
    while statuses:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        pipe = statuses.pop(child)
        with contextlib.suppress(BrokenPipeError):  # no one waits for it any more
            os.write(pipe, struct.pack("i", status))
        os.close(pipe)


def _starter(pristine: _Pristine) -> Callable[..., None]:
    """Return what replaces Popen's own method below the server: it forks where Python would be
    started.
    """

    def start_child(self: Any, *arguments: Any) -> None:
        given = inspect.signature(START_CHILD).bind(self, *arguments).arguments
        command = [os.fsdecode(part) for part in given["args"]]
        environment = os.environ if given["env"] is None else given["env"]
        if given["shell"] or given["pass_fds"] or python_command(command, environment) is None:
            START_CHILD(self, *arguments)
            return
        job, streams = job_of(given)
        for stream in (sys.stdout, sys.stderr, *pristine.streams[1:]):
            stream.flush()  # or the child would write it, too
        self.pid = os.fork()
        if self.pid == 0:
            _become(job, streams, pristine)
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in PIPES))

    return start_child


_LEFT: list[
    Any
] = []  # connections of the process that this one was forked from: only it closes them


def _leave_connections() -> None:
    """Let this copy of a busy process open its own connections to databases."""
    from sqlalchemy.engine import Engine

    from canvastune.tracking.client import connect

    connect.cache_clear()
    engines = [each for each in gc.get_objects() if issubclass(type(each), Engine)]
    _LEFT.extend(engine.pool for engine in engines)
    for engine in engines:
        engine.dispose(close=False)


def _forget_cluster() -> None:
    """Let this process import the client of Kubernetes again, which reads KUBECONFIG then."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "kubernetes"]:
        del sys.modules[name]


def _become(job: Mapping[str, Any], streams: Sequence[int], pristine: _Pristine) -> NoReturn:
    """Do what a new interpreter does with this command line; exit with its exit code."""
    code = 1
    try:
        _leave_connections()
        gc.freeze()  # the parent's objects stay: their files are closed below
        signal.set_wakeup_fd(-1)
        if job["session"]:
            os.setsid()
        elif job["group"] is not None and job["group"] >= 0:
            os.setpgid(0, job["group"])
        own = [os.dup(stream) for stream in streams]
        for place, stream in enumerate(own):
            os.dup2(stream, place)
        os.closerange(3, 65536)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in job["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        _forget_cluster()
        pristine.restore()
        code = _run(job["command"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(command: Sequence[str]) -> int:
    import torch

    from pipelines.warm_start.fork import exit_code_of, run_as_main

    asked = python_command(command, os.environ)
    assert asked is not None
    arguments = asked.arguments
    if asked.component is not None:
        source = Path(tempfile.mkdtemp()) / "ephemeral_component.py"
        source.write_text(asked.component, encoding="utf-8")
        os.environ["_KFP_RUNTIME"] = "true"
        arguments = ["--component_module_path", str(source), *arguments]
        command = [sys.executable, "-m", _KFP, *arguments]
    if asked.script is not None:
        command = [sys.executable, asked.script, *arguments]  # as the kernel starts a script
    _show(command)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "PYTHONUNBUFFERED" in os.environ:
        output: Any = sys.stdout
        output.reconfigure(write_through=True)
    searched = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [each for each in searched if each and each not in sys.path]
    for folder in searched:
        if (customization := Path(folder or ".") / "sitecustomize.py").is_file():
            runpy.run_path(str(customization))
            break
    if not asked.safe_path and "PYTHONSAFEPATH" not in os.environ:
        sys.path.insert(0, os.getcwd())
    if asked.script is not None:
        sys.argv = [asked.script, *arguments]
        return exit_code_of(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    if asked.module is not None:
        sys.argv = [asked.module, *arguments]
        return exit_code_of(lambda: run_as_main(sys.argv[0]))
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    code = compile(asked.code or "", "<string>", "exec")
    return exit_code_of(lambda: exec(code, main.__dict__))


def _show(command: Sequence[str]) -> None:
    """Write this process's command line and environment where /proc shows them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = [int(field) for field in fields[45:49]]  # arg_start ... env_end of proc(5)
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    parts = ((command, places[0], places[1]), (variables, places[2], places[3]))
    for words, start, end in parts:
        text = b"".join(os.fsencode(word) + b"\0" for word in words)
        if len(text) >= end - start:
            raise RuntimeError(f"{len(text)} bytes do not fit into {end - start}: more _ROOM")
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

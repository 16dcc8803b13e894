"""Become, in a fork, the process that a new interpreter would be with a given command line."""

from __future__ import annotations

import atexit
import ctypes
import gc
import inspect
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from canvastune.errors import format_error
from canvastune.io.atomic import disk_full

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_SET_NAME = 15  # PR_SET_NAME


def become(
    job: Mapping[str, Any], streams: Sequence[int], *, wait: int, added: Mapping[str, str]
) -> NoReturn:
    """Run a job's module with its streams, environment and folder; exit with its exit code.

    Args:
        wait: a pipe that is closed when the job may start.
        added: variables that imports set.
    """
    code = 1
    gc.freeze()  # what the server has stays: to look at it would copy it
    gc.enable()
    # torchrun asks for the stack at each message. The lines of source, which it does not use, are
    # searched for in all modules.
    inspect.stack.__defaults__ = (0,)
    try:
        _prepare(job, streams, wait)
        os.environ.clear()
        os.environ.update({**added, **job["environment"]})
        _show(job["arguments"])
        code = _run(job["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _prepare(job: Mapping[str, Any], streams: Sequence[int], wait: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    for number in job["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if job["leads_session"]:
        os.setsid()
    else:
        os.setpgid(0, 0)  # a signal to its client's group comes through the client, once
    os.read(wait, 1)
    own = [os.dup(stream) for stream in streams]
    for place, stream in enumerate(own):
        os.dup2(stream, place)
    os.closerange(3, 65536)
    sys.stdout = sys.__stdout__  # the server's own prints went elsewhere
    os.chdir(job["folder"])
    tempfile.tempdir = None
    libc.prctl(_SET_NAME, b"python3")


def _show(arguments: Sequence[str]) -> None:
    """Write this process's command line where `ps` reads it: over the server's and its variables,
    which no one reads any more.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end, environment, room = map(int, fields[45:49])  # arg_start to env_end of proc(5)
    if environment != end:
        return
    text = b" ".join(map(os.fsencode, ("python3", *arguments))).ljust(end - start)
    ctypes.memset(start, 0, room - start)
    ctypes.memmove(start, text, min(len(text), room - start - 1))


def _run(arguments: Sequence[str]) -> int:
    at = arguments.index("-m")
    if "OMP_NUM_THREADS" in os.environ and "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if os.environ.get("PYTHONUNBUFFERED") or "-u" in arguments[:at]:
        for output in (sys.stdout, sys.stderr):
            output.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = list(arguments[at + 1 :])
    return exit_code_of(lambda: run_as_main(sys.argv[0]))


def run_as_main(module: str) -> None:
    """Run a module, which the server may have imported, from its start, as a new interpreter does."""
    warnings.filterwarnings("ignore", message=".*found in sys.modules.*", category=RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _keep_operators() -> None:
    """Let PyTorch's operators end with the process: it would take each of them back before."""
    take_back = getattr(sys.modules.get("torch.library"), "_del_library", None)
    if take_back is not None:
        for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
            if (found := each.peek()) and found[1] is take_back:
                each.atexit = False


def exit_code_of(program: Callable[[], object]) -> int:
    """Run a program to completion; return the exit code that an interpreter would have.

    Threads are waited for, exit handlers run and streams are flushed. Ctrl-C ends this process.
    """
    code: Any = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException as error:
        full = disk_full(error, "the step's outputs")  # which Kubeflow's executor writes
        if full is None:
            traceback.print_exc()
        else:
            print(format_error(full), file=sys.stderr)
        code = 1
        if isinstance(error, KeyboardInterrupt):  # as Python does, so that the caller knows
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]
    _keep_operators()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)

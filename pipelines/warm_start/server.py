"""A process that steps are forked from: `python -m pipelines.warm_start.server JOBS [ADDRESS]`.

Its standard input is the socket that clients connect to, its standard output a pipe that the
command which started it holds. It imports what its JOBS import, in the order in which a run needs
it, and forks for each job as soon as the libraries of that job are there. Other jobs it hands to
the server at ADDRESS. It ends with the command.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from canvastune.tracking.shared_store import STORE, list_packages_for_forks, open_for_forks
from pipelines.warm_start.fork import become

KFP = "kfp.dsl.executor_main"
# Large imports are in parts: a job waits for the one that runs when it comes.
_MLFLOW = (
    *("sqlalchemy.orm", "mlflow", "mlflow.store.tracking.sqlalchemy_store"),
    *("mlflow.store.tracking.sqlalchemy_workspace_store", "alembic.command"),
    "sqlalchemy.dialects.sqlite",
)
_RECORDED = (KFP, "components.runtime")  # a step whose records a later one sends to MLflow
_STEP = (*_RECORDED, *_MLFLOW)
_PACKAGES = "mlflow.utils.requirements_utils"
_MODELS_IN_MLFLOW = ("mlflow.pyfunc", "mlflow.utils.search_logged_model_utils", _PACKAGES)
_ANSWERS_IN_MLFLOW = ("mlflow.tracing.client", "opentelemetry.sdk.metrics")
_PREPARE = ("datasets", "canvastune.preparation.prepare", "canvastune.evaluation.preflight")
_TRAIN = (
    *("torch", "torch._dynamo", "tabulate"),  # the last at the end of a process with the second
    *("torch.distributed.run", "peft", "canvastune.train"),
    *("transformers.models.gemma4.modeling_gemma4", "peft.utils.transformers_weight_conversion"),
)
_MODEL = ("canvastune.merge", "canvastune.evaluation.run", *_STEP)
# Two servers import at the same time: PyTorch takes one of them seconds. By the step, or else the
# module, that a job runs; in the order in which a run comes to them.
JOBS: dict[str, dict[str, tuple[str, ...]]] = {
    "without-torch": {
        "resolve": (*_RECORDED, "components.resolve.step"),
        "plan": (*_RECORDED, "components.plan.step"),
        "train": (*_STEP, "components.train.step", *_MODELS_IN_MLFLOW),
        "finish": (*_STEP, "components.finish.step"),
    },
    "with-torch": {
        "prepare_data": (*_RECORDED, *_PREPARE, "components.prepare_data.step"),
        "torch.distributed.run": _TRAIN,
        "canvastune.train": _TRAIN,
        "merge_lora": ("components.merge_lora.step", *_MODEL, *_MODELS_IN_MLFLOW),
        "evaluate": ("components.evaluate.step", *_MODEL, *_ANSWERS_IN_MLFLOW),
        "report": (*_STEP, "components.report.step", "matplotlib.backends.backend_agg"),
        "pipelines.cli": (*_PREPARE, "pipelines.cli"),  # `canvastune prepare` of the demo
    },
}
# What these need is imported once this job has come: earlier it would hold up the steps
# before, the command itself and the imports of the ranks, for which training waits longest, on
# maybe two processors.
_AFTER = {"train": "train", "merge_lora": "canvastune.train"}
_RANKS = ("torch.distributed.run", "canvastune.train")
# Read while libraries are imported: a job where one differs needs a separate interpreter.
_READ_AT_IMPORT = (
    *("PYTHON", "LD_", "HF_", "TRANSFORMERS_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "CUDA_"),
)
_READ_LATER = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")  # `become` does what they ask for
_COMMAND = 1  # the end of a pipe that "can be read" once no one has its other end
_HANDSHAKE = 10.0  # seconds for a client, which has the whole job ready, to send it


@dataclass(eq=False)
class _Job:
    """What a client waits for."""

    client: socket.socket
    streams: list[int]
    what: Mapping[str, Any]
    process: int = 0  # 0: not forked yet
    needs: tuple[str, ...] = field(default=())


class Server:
    """Imports libraries and forks jobs, both in one thread: a fork keeps no other."""

    def __init__(
        self, listener: socket.socket, needed: Mapping[str, tuple[str, ...]], other: str = ""
    ) -> None:
        """
        Args:
            needed: the modules that each job imports.
            other: address of the server that takes other jobs; "": there is none.
        """
        self._listener, self._needed, self._other = listener, needed, other
        self._jobs: list[_Job] = []
        self._imported: set[str] = set()
        self._started_with = dict(os.environ)  # an import may set a variable
        self._closed = self._stopping = False  # no more jobs; the command has ended
        self._importing = False
        self._asked: set[str] = set()  # names of the jobs that have come
        self._stores: dict[str, bool] = {}  # by address, of runs: whether it was opened
        self._ended, wake = os.pipe()
        for pipe in (self._ended, wake):
            os.set_blocking(pipe, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, self._child_ended)

    def serve(self) -> None:
        """Serve until the command that started this process has ended, and all its jobs."""
        while self._jobs or not self._closed:
            self._answer(timeout=None if self._next_import() is None else 0)
            self._fork_what_is_ready()
            if module := self._next_import():
                self._import(module)
                self._fork_what_is_ready()
            if self._imported.issuperset(itertools.chain(*self._needed.values())):
                self._open_stores()

    def _import(self, module: str) -> None:
        self._importing = True
        self._report()
        try:
            import_module(module)
        except Exception as error:  # a step that imports it by itself says what is wrong
            print(f"canvastune: steps start without a warm process: {error}", file=sys.stderr)
            self._close()
            return
        finally:
            self._importing = False
        self._imported.add(module)

    def _open_stores(self) -> None:
        for store in [each for each, opened in self._stores.items() if not opened]:
            self._stores[store] = open_for_forks(store)

    def _child_ended(self, *_: object) -> None:
        if self._importing:  # which may take a second; else the loop does it
            self._report()

    def _next_import(self) -> str | None:
        """Return what a waiting job still needs, else what the next one will; None: all is there."""
        if self._closed:
            return None
        waiting = [job.needs for job in self._jobs if not job.process]
        next_jobs = itertools.takewhile(
            lambda name: name not in _AFTER or _AFTER[name] in self._asked, self._needed
        )
        later = (self._needed[name] for name in next_jobs)
        needed = (module for needs in (*waiting, *later) for module in needs)
        return next((module for module in needed if module not in self._imported), None)

    def _answer(self, timeout: float | None) -> None:
        """Take new jobs, report those that ended, and end those whose client has gone."""
        clients = {job.client: job for job in self._jobs}
        others: list[Any] = [self._ended, *([] if self._stopping else [_COMMAND])]
        others += [] if self._closed else [self._listener]
        ready = select.select([*others, *clients], [], [], timeout)[0]
        if self._listener in ready:
            self._take()
        if self._ended in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._ended, 4096)
            self._report()
        for client in [each for each in ready if each in clients]:
            if clients[client] in self._jobs and _is_gone(client):
                self._drop(clients[client])
        if _COMMAND in ready:
            self._stop()

    def _take(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(_HANDSHAKE)
        streams: list[int] = []
        try:
            size, streams, _, _ = socket.recv_fds(client, 4, 4)
            text = b"".join(_read(client, struct.unpack("I", size)[0]))
            job = _Job(client, list(streams), json.loads(text))
        except (OSError, ValueError, struct.error):
            _close(client, streams)
            return
        if len(job.streams) > 3:  # another server handed it on, with its client
            client.close()
            job.client = socket.socket(fileno=job.streams.pop())
            job.client.settimeout(_HANDSHAKE)
        asked = job_name(job.what["arguments"])
        self._asked.add(asked)
        if not self._has_environment(job.what["environment"]):
            _close(job.client, job.streams)  # which then starts an interpreter
        elif asked in self._needed:
            job.needs = self._needed[asked]
            self._jobs.append(job)
            if store := job.what["environment"].get(STORE):
                self._stores.setdefault(store, False)
        else:
            self._hand_on(job, text)
            _close(job.client, job.streams)

    def _hand_on(self, job: _Job, text: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as other, contextlib.suppress(OSError):
            other.connect(self._other)
            files = [*job.streams, job.client.fileno()]
            socket.send_fds(other, [struct.pack("I", len(text))], files)
            other.sendall(text)

    def _fork_what_is_ready(self) -> None:
        for job in self._jobs:
            if not job.process and self._imported.issuperset(job.needs):
                self._fork(job)

    def _fork(self, job: _Job) -> None:
        go, started = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(started)
            become(job.what, job.streams, wait=go, added=self._set_by_imports())
        os.close(go)
        job.process = process
        for stream in job.streams:
            os.close(stream)
        try:
            job.client.sendall(struct.pack("i", process))
            job.client.recv(1)  # the client passes signals on from here on
        except OSError:
            os.kill(process, signal.SIGKILL)
        os.close(started)

    def _has_environment(self, environment: Mapping[str, str]) -> bool:
        """Return whether a job's libraries would be imported with the settings of this process."""
        return _read_at_import(environment) == _read_at_import(self._started_with)

    def _set_by_imports(self) -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if self._started_with.get(name) != value
        }

    def _report(self) -> None:
        for job in [each for each in self._jobs if each.process]:
            try:
                process, status = os.waitpid(job.process, os.WNOHANG)
            except ChildProcessError:  # reported meanwhile, by the handler of a signal
                continue
            if process:
                self._jobs.remove(job)
                with contextlib.suppress(OSError):
                    job.client.sendall(struct.pack("i", status))
                job.client.close()

    def _drop(self, job: _Job) -> None:
        """End a job whose client was killed, and what it started: no one waits for it."""
        if job.process:
            _kill(job.process)
        else:
            self._refuse(job)

    def _refuse(self, job: _Job) -> None:
        self._jobs.remove(job)
        _close(job.client, job.streams)

    def _stop(self) -> None:
        """End with the command: its step gets the chance to save what it has, as on Ctrl-C."""
        self._stopping = True
        self._close()
        for job in self._jobs:
            # A step ends what it started, and torchrun its ranks.
            if job.process and job_name(job.what["arguments"]) not in _RANKS:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(job.process, signal.SIGTERM)

    def _close(self) -> None:
        """Let who asks from here on, or waits, start an interpreter."""
        self._closed = True
        self._listener.close()
        for job in [each for each in self._jobs if not each.process]:
            self._refuse(job)


def job_name(arguments: list[str]) -> str:
    """Return the step, or else the module, that a command line of Python's runs; "" for others."""
    module, rest = "", list(arguments)
    if "-m" in rest[:2] and rest[0] in ("-m", "-u"):
        at = rest.index("-m")
        module, rest = (*rest[at + 1 : at + 2], "")[0], rest[at + 2 :]
    if module != KFP:
        return module
    step = dict(zip(rest[::2], rest[1::2], strict=False)).get("--function_to_execute", "")
    return step


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_IMPORT) and name not in _READ_LATER
    }


def import_module(module: str) -> None:
    """Import a module as a step does. Raises: RuntimeError, it starts a thread."""
    if module == "mlflow":
        from canvastune.tracking.client import load_mlflow

        load_mlflow()
    importlib.import_module(module)
    if module == _PACKAGES:
        list_packages_for_forks()
    if threading.active_count() > 1:
        raise RuntimeError(f"a fork would lose {threading.enumerate()}: {module} started them")


def _read(client: socket.socket, size: int) -> Iterator[bytes]:
    while size:
        part = client.recv(min(size, 2**20))
        if not part:
            raise ConnectionError
        size -= len(part)
        yield part


def _is_gone(client: socket.socket) -> bool:
    try:
        return not client.recv(16)
    except ConnectionError:
        return True


def _close(client: socket.socket, streams: list[int]) -> None:
    for stream in streams:
        os.close(stream)
    client.close()


def _kill(process: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for each in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def main(needed: Mapping[str, tuple[str, ...]], other: str = "") -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the terminal's are for the steps
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    os.environ["_KFP_RUNTIME"] = "true"  # as a step does: without Kubeflow's compiler
    sys.stdout = sys.stderr  # until a fork has its own
    gc.disable()  # nothing here is garbage: it would only be searched for while imports create it
    with socket.socket(fileno=0) as listener:
        Server(listener, needed, other).serve()


if __name__ == "__main__":
    main(JOBS[sys.argv[1]], *sys.argv[2:])

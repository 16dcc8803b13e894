"""Encode conversations in several processes, in order; their number does not change the result."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

from canvastune.errors import UserError
from canvastune.preparation.chat_template import ChatEncoder, EncodedConversation
from canvastune.preparation.conversation import Conversation, InvalidRow

if TYPE_CHECKING:  # the readers import libraries that an encoder process does not need
    from canvastune.preparation.readers import Row

Batch: TypeAlias = "list[tuple[Row, Conversation | InvalidRow]]"
_QUEUED = 3  # batches per process that wait, or are done before their turn to be written
_MOST_PROCESSES = 8
_SERVE = (  # with this process's module search path
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from canvastune.preparation.tokenize_pool import serve_encoder; serve_encoder()"
)


def encode(
    batches: Iterator[Batch],
    encoder: ChatEncoder,
    processes: int,
    *,
    local_batches: int,
    pool: Callable[[ChatEncoder, int], EncoderPool],
) -> Generator[tuple[Batch, list[EncodedConversation | InvalidRow]], None, None]:
    """Encode the conversations of each batch, in order: first in this process only, then in all of
    them.

    Args:
        processes: including this one, which reads, submits and writes, and encodes while the others
            have enough to do.
        local_batches: encoded in this process before others are started.
        pool: starts the other processes.
    """
    for batch in itertools.islice(batches, local_batches if processes > 1 else None):
        yield batch, encoder.encode(_conversations_of(batch))
    first = next(batches, None)
    if first is None:
        return
    with pool(encoder, processes - 1) as workers:
        waiting: deque[tuple[Batch, Future[Any]]] = deque()

        def oldest() -> tuple[Batch, list[EncodedConversation | InvalidRow]]:
            while not waiting[0][1].done() and encode_newest(waiting, encoder):
                pass
            batch, answer = waiting.popleft()
            return batch, answer.result()

        for batch in itertools.chain([first], batches):
            waiting.append((batch, workers.encode(_conversations_of(batch))))
            while waiting and (waiting[0][1].done() or len(waiting) > _QUEUED * processes):
                yield oldest()
        while waiting:
            yield oldest()


def encode_newest(waiting: deque[tuple[Batch, Future[Any]]], encoder: ChatEncoder) -> bool:
    """Encode the newest batch that no process has started, since the processes take the oldest
    next.

    Returns:
        False if all batches are started.
    """
    for at, (batch, answer) in reversed(list(enumerate(waiting))):
        if not answer.done() and answer.cancel():
            done: Future[Any] = Future()
            done.set_result(encoder.encode(_conversations_of(batch)))
            waiting[at] = batch, done
            return True
    return False


def _conversations_of(batch: Batch) -> list[Conversation]:
    return [talk for _, talk in batch if isinstance(talk, Conversation)]


def usable_cpus() -> int:
    """Return the CPUs that this process may use by affinity and container limit; at most 8."""
    own = min(
        _MOST_PROCESSES,
        len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
    )
    limit = Path("/sys/fs/cgroup/cpu.max")
    share, period = limit.read_text(encoding="ascii").split() if limit.is_file() else ("max", "")
    return own if share == "max" else max(1, min(own, int(share) // int(period)))


class EncoderPool:
    """Encoder processes, each used by two threads of this one; all stop when the block ends."""

    def __init__(
        self, encoder: ChatEncoder, count: int, process: Callable[[], EncoderProcess] | None = None
    ) -> None:
        """Prepare the pool; entering it starts the processes.

        Args:
            process: starts one. Default: EncoderProcess.
        """
        self._start = process or EncoderProcess
        self._workers: list[EncoderProcess] = []
        self._idle: queue.SimpleQueue[EncoderProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(2 * count)
        self._first = pickle.dumps(sys.path) + pickle.dumps(encoder, pickle.HIGHEST_PROTOCOL)
        self._count = count

    def __enter__(self) -> EncoderPool:
        try:
            for _ in range(self._count):
                self._workers.append(worker := self._start())
                ready = self._threads.submit(self._request, worker, self._first)
                self._threads.submit(self._wait, worker, ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)

    def encode(self, conversations: list[Conversation]) -> Future[Any]:
        """Return a future of what ChatEncoder.encode returns for these conversations."""
        request = pickle.dumps(conversations, pickle.HIGHEST_PROTOCOL)
        return self._threads.submit(lambda: self._request(self._idle.get(), request))

    def _request(self, worker: EncoderProcess, request: bytes) -> Any:
        try:
            return worker.request(request)
        finally:
            self._idle.put(worker)

    def _wait(self, worker: EncoderProcess, ready: Future[Any]) -> None:
        # waits, so that no thread takes a batch that this process could encode meanwhile
        ready.exception()
        self._idle.put(worker)


class EncoderProcess:
    """Another process with an encoder; it exits when its input ends, as when this one is killed."""

    def __init__(self) -> None:
        # No fork, since libraries have threads here, and not multiprocessing's spawn, which runs
        # the main module again. A separate process group: Ctrl-C is for this process, which stops
        # the others. Nothing is imported from the current directory.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,
            pipesize=2**20,
        )
        self._requests = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)
        self._sending, self._receiving = threading.Lock(), threading.Condition()
        self._sent = self._received = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, request: bytes) -> Any:
        """Send a pickled request and wait for its response.

        A second thread may send one meanwhile, so that the process continues without a pause.
        """
        try:
            with self._sending:
                place, self._sent = self._sent, self._sent + 1
                self._requests.write(request)
                self._requests.flush()
            with self._receiving:
                self._receiving.wait_for(lambda: self._received == place)
                try:
                    return pickle.load(self._answers)
                finally:
                    self._received += 1
                    self._receiving.notify_all()
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            reason = "killed, perhaps for lack of memory" if code == -9 else f"exit code {code}"
            raise UserError(
                f"prepare_data: an encoder process exited early ({reason})",
                hint="Run the step again, with more memory if the process was killed.",
            ) from None

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            # Part of a request may be left, to a process that has exited.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve_encoder() -> None:
    """Run an encoder process: receive a ChatEncoder, then lists of conversations; send lists of
    encoded ones.

    Messages are pickled, from standard input to the original standard output; other output goes to
    standard error.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answer: Any = None  # the first one reports that this process is ready
    encoder: ChatEncoder = pickle.load(requests)
    gc.freeze()  # collect garbage only among the conversations
    try:
        while True:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
            answer = encoder.encode(pickle.load(requests))
    except (EOFError, BrokenPipeError):  # all is done, or the parent process has exited
        os._exit(0)  # unsent results are discarded

"""Conversations to tokens in several processes, in order: what is rendered and tokenized does not depend on how many there are."""

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
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

from canvastune.errors import UserError
from canvastune.preparation.chat_format import ChatEncoder, Conversation, Encoded, InvalidRow

if TYPE_CHECKING:  # rows come from libraries that a process which tokenizes would import for nothing
    from canvastune.preparation.readers import Row

Batch: TypeAlias = "list[tuple[Row, Conversation | InvalidRow]]"
_ALONE = 2  # batches encoded in this process before others are started, which takes them a second
_QUEUED = 3  # batches of each process that wait or are done before their turn to be written
_MOST_PROCESSES = 8
_SERVE = (  # in a process that finds the modules that this one finds
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from canvastune.preparation.tokenize_pool import serve_encoder; serve_encoder()"
)


def encode(
    batches: Iterator[Batch], encoder: ChatEncoder, processes: int
) -> Generator[tuple[Batch, list[Encoded | InvalidRow]], None, None]:
    """Encode the conversations of each batch, in order: the first ones here, the others here and in processes of their own.

    Args:
        processes: this one is among them. It reads, hands out and writes; while the others have enough to do, it encodes as well.
    """
    for batch in itertools.islice(batches, _ALONE if processes > 1 else None):
        yield batch, encoder.encode(_has_conversations(batch))
    first = next(batches, None)
    if first is None:
        return
    with Workers(encoder, processes - 1) as workers:
        waiting: deque[tuple[Batch, Future[Any]]] = deque()

        def oldest() -> tuple[Batch, list[Encoded | InvalidRow]]:
            while not waiting[0][1].done() and _encode_newest(waiting, encoder):
                pass
            batch, answer = waiting.popleft()
            return batch, answer.result()

        for batch in itertools.chain([first], batches):
            waiting.append((batch, workers.encode(_has_conversations(batch))))
            while waiting and (waiting[0][1].done() or len(waiting) > _QUEUED * processes):
                yield oldest()
        while waiting:
            yield oldest()


def _encode_newest(waiting: deque[tuple[Batch, Future[Any]]], encoder: ChatEncoder) -> bool:
    """Encode one batch that no process has begun with, the newest: the older ones are what the processes take next. False: none."""
    for at, (batch, answer) in reversed(list(enumerate(waiting))):
        if not answer.done() and answer.cancel():
            done: Future[Any] = Future()
            done.set_result(encoder.encode(_has_conversations(batch)))
            waiting[at] = batch, done
            return True
    return False


def _has_conversations(batch: Batch) -> list[Conversation]:
    return [talk for _, talk in batch if isinstance(talk, Conversation)]


def usable_cpus() -> int:
    """Cores that this process may use: those it is given, and a container's share of them."""
    own = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    limit = Path("/sys/fs/cgroup/cpu.max")
    share, period = limit.read_text(encoding="ascii").split() if limit.is_file() else ("max", "")
    return own if share == "max" else max(1, min(own, int(share) // int(period)))


class Workers:
    """Processes that encode, each asked by two threads of this one in turn. All of them are gone when the block ends."""

    def __init__(self, encoder: ChatEncoder, count: int) -> None:
        self._workers: list[EncoderProcess] = []
        self._idle: queue.SimpleQueue[EncoderProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(2 * count)
        self._first = pickle.dumps(sys.path) + pickle.dumps(encoder, pickle.HIGHEST_PROTOCOL)
        self._count = count

    def __enter__(self) -> Workers:
        try:
            for _ in range(self._count):
                self._workers.append(worker := EncoderProcess())
                ready = self._threads.submit(self._ask, worker, self._first)
                self._threads.submit(self._stand_by, worker, ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    def encode(self, conversations: list[Conversation]) -> Future[Any]:
        """What ChatEncoder.encode returns for these conversations, in the future."""
        request = pickle.dumps(conversations, pickle.HIGHEST_PROTOCOL)
        return self._threads.submit(lambda: self._ask(self._idle.get(), request))

    def _ask(self, worker: EncoderProcess, request: bytes) -> Any:
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)

    def _stand_by(self, worker: EncoderProcess, ready: Future[Any]) -> None:
        ready.exception()  # waits: until then no thread takes what this process can encode
        self._idle.put(worker)


class EncoderProcess:
    """Another process with an encoder. It ends with this one, whatever ends it: its input is then at its end."""

    def __init__(self) -> None:
        # Not a fork (libraries have threads here), and not multiprocessing's spawn, which would run the main module again. A group of
        # its own: Ctrl-C is for this process, which ends the others. Nothing is imported from the current folder.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,
            pipesize=2**20,
        )
        self._requests, self._answers = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self._sending, self._receiving = threading.Lock(), threading.Condition()
        self._sent = self._received = 0

    def ask(self, request: bytes) -> Any:
        """Send a pickled request and wait for its answer. A second thread may ask meanwhile: the process then goes on without a pause."""
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
            why = "killed; perhaps the memory did not suffice" if code == -9 else f"exit code {code}"
            raise UserError(
                f"prepare_data: a process that tokenizes ended before its work was done ({why}). Start the step again"
            ) from None

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):  # half a request, to a process that is gone
                pipe.close()


def serve_encoder() -> None:
    """What an EncoderProcess runs: a ChatEncoder comes in, then lists of conversations; lists of encoded ones go out, until the end.

    All of it is pickled, from standard input to what was standard output; whatever else is printed goes to standard error.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answer: Any = None  # the first one says that this process is ready
    encoder: ChatEncoder = pickle.load(requests)
    gc.freeze()  # what is here by now stays: garbage is looked for among the conversations alone
    try:
        while True:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
            answer = encoder.encode(pickle.load(requests))
    except (EOFError, BrokenPipeError):  # all is done, or the process that asks is gone
        os._exit(0)  # what was not sent is nobody's

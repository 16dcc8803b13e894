"""What a person sees of a local run: Kubeflow's local runner, told step by step."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from canvastune.errors import ERROR_PREFIX, format_error, parse_error
from canvastune.logging import format_event, in_json, level_of, read_event

_KEPT_LINES = 400  # of the step that is running, for its last words


class LocalOutput(io.TextIOBase):
    """Between Kubeflow's local runner and the person: says which step runs, passes its words on, and remembers its last ones.

    It stands in for standard output, where the runner prints what a step says, and filters the runner's own log records.
    """

    def __init__(self, out: TextIO) -> None:
        self.failure: tuple[str, str] | None = None  # the step that failed first, and why
        self._out, self._unfinished = out, ""
        self._said: list[str] = []  # by the step that is running
        self._in_dump = self._in_error = False
        self._task = ""  # the step that is running
        self._started = time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Put the narrator between."""
        root, level = logging.getLogger(), logging.getLogger().level
        root.setLevel(logging.INFO)  # a cache hit is told at that level, outside of the runner's own setting
        root.addFilter(self._of_the_runner)
        try:
            with contextlib.redirect_stdout(self), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the runner's, on image names that mean nothing here
                yield
        finally:
            root.removeFilter(self._of_the_runner)
            root.setLevel(level)

    def write(self, text: str) -> int:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def _of_the_runner(self, record: logging.LogRecord) -> bool:
        message = re.sub("\x1b\\[[0-9]+m", "", record.getMessage())
        if found := re.match(r"Executing task '(.+)'", message):
            self._said, self._in_error, self._started = [], False, time.monotonic()
            self._task = _step_name(found[1])
            self._show(f"\n{self._task}", "task_started")
        elif found := re.match(r"Task '(.+)' finished with status FAILURE", message):
            self._fail(_step_name(found[1]))
        elif found := re.match(r"Task '?([\w-]+)'? finished with status SUCCESS", message):
            seconds = round(time.monotonic() - self._started, 1)
            self._show(f"    {seconds:.1f} s", "task_finished", seconds=seconds)
        elif found := re.match(r"Task (\S+) cache hit", message):
            self._task = _step_name(found[1])
            self._show(f"\n{self._task}\n    reused: the same data, model and settings were prepared before", "task_reused")
        elif record.levelno >= logging.ERROR:
            self._show(message, level="error", message=message)
        return False

    def _line(self, line: str) -> None:
        line = line.removeprefix("    ").rstrip()
        if self._in_dump or line.startswith("[KFP Executor "):  # the executor's log, and the inputs that it prints
            self._in_dump = line.endswith("Got executor_input:") or (self._in_dump and line != "}")
            return
        if not line or set(line) == {"-"}:
            return
        self._said = [*self._said[-_KEPT_LINES:], line]
        self._in_error = self._in_error or line.startswith(ERROR_PREFIX)
        if not self._in_error:  # said once, at the end
            known = read_event(line) or {}  # a step's own event keeps its time
            fields = known or {"message": line, "level": level_of(line)}
            self._show(f"    {line}", **{"event": "log", **fields})

    def _fail(self, step: str) -> None:
        self._show("    failed", "task_failed", level="error")
        said = "\n".join(self._said)
        if self.failure is None:
            error, last = parse_error(said), self._said[-1].strip() if self._said else "it printed nothing"
            self.failure = step, format_error(error).removeprefix(ERROR_PREFIX) if error else last

    def _show(self, line: str, event: str = "log", **fields: Any) -> None:
        if in_json():
            line = format_event(event, task=self._task, **fields)
        self._out.write(line + "\n")  # not print(): the runner has replaced that too
        self._out.flush()


def _step_name(task: str) -> str:
    """`evaluate-2` is the same step in the graph's other branch."""
    return re.sub(r"-\d+$", "", task).replace("-", "_")

"""Show a local run step by step: the output of Kubeflow's local runner, in text or JSON."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from canvastune.errors import ERROR_PREFIX, UserError, parse_error
from canvastune.logging import format_event, read_event

_KEPT_LINES = 400  # of the running step's output, for the reason of a failure

# kfp.local returns no status of a task, only a pipeline's outputs: these sentences of its log are
# all it reports while
# it runs. tests/unit/test_local_output.py holds them to the installed version.
_TASK_STARTED = re.compile(r"Executing task '(.+)'")
_TASK_SUCCEEDED = re.compile(r"Task '?([\w-]+)'? finished with status SUCCESS")
_TASK_FAILED = re.compile(r"Task '(.+)' finished with status FAILURE")
_TASK_CACHED = re.compile(r"Task (\S+) cache hit")
_COLOR = re.compile("\x1b\\[[0-9]+m")


class LocalOutput(io.TextIOBase):
    """Stand in for standard output while Kubeflow's local runner runs, and filter its log records.

    Shows which step runs, passes its output on, and keeps the reason of the first failure.
    """

    def __init__(self, out: TextIO, *, json: bool = False) -> None:
        """
        Args:
            out: gets the lines.
            json: write one JSON object per line; a step's own events keep their fields and get
                `task`.
        """
        # the step that failed first, and its error
        self.failure: tuple[str, UserError] | None = None
        self._out, self._json, self._unfinished = out, json, ""
        self._output: list[str] = []  # the last lines of the running step
        self._in_dump = self._in_error = False
        self._task = ""  # the running step
        self._started = time.monotonic()

    @property
    def step(self) -> str:
        """The running step, or the last one; "" before the first."""
        return self._task

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Redirect standard output and the runner's log records to this object."""
        root, level = logging.getLogger(), logging.getLogger().level
        root.setLevel(
            logging.INFO
        )  # a cache hit is logged at that level, outside of the runner's own setting
        root.addFilter(self._filter_record)
        try:
            with contextlib.redirect_stdout(self), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the runner's, about image names that mean nothing here
                yield
        finally:
            root.removeFilter(self._filter_record)
            root.setLevel(level)

    def write(self, text: str) -> int:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._handle_line(line)
        return len(text)

    def _filter_record(self, record: logging.LogRecord) -> bool:
        message = _COLOR.sub("", record.getMessage())
        if found := _TASK_STARTED.match(message):
            self._output, self._in_error, self._started = [], False, time.monotonic()
            self._task = _step_name(found[1])
            self._show(f"\n{self._task}", "task_started")
        elif found := _TASK_FAILED.match(message):
            self._fail(_step_name(found[1]))
        elif _TASK_SUCCEEDED.match(message):
            seconds = round(time.monotonic() - self._started, 1)
            self._show(f"    {seconds:.1f} s", "task_finished", seconds=seconds)
        elif found := _TASK_CACHED.match(message):
            self._task = _step_name(found[1])
            self._show(
                f"\n{self._task}\n"
                "    reused: the same data, model and settings were prepared before",
                "task_reused",
            )
        elif record.levelno >= logging.ERROR:
            self._show(message, level="error", message=message)
        return False

    def _handle_line(self, line: str) -> None:
        line = line.removeprefix("    ").rstrip()
        if self._in_dump or line.startswith(
            "[KFP Executor "
        ):  # the executor's log, and the inputs that it prints
            self._in_dump = line.endswith("Got executor_input:") or (self._in_dump and line != "}")
            return
        if not line or set(line) == {"-"}:
            return
        self._output = [*self._output[-_KEPT_LINES:], line]
        found = read_event(line)
        self._in_error = self._in_error or line.startswith(ERROR_PREFIX)
        if not self._in_error and (
            found is None or found["event"] != "error"
        ):  # an error is logged once, at the end of the run
            self._show(f"    {line}", **(found or {"event": "log", "message": line}))

    def _fail(self, step: str) -> None:
        self._show("    failed", "task_failed", level="error")
        if self.failure is None:
            self.failure = step, self._error()

    def _error(self) -> UserError:
        if error := parse_error("\n".join(self._output)):
            return error
        last = self._output[-1].strip() if self._output else "no output"
        return UserError(str((read_event(last) or {}).get("message", last)))

    def _show(self, line: str, event: str = "log", **fields: Any) -> None:
        if self._json:
            line = format_event(event, **{"task": self._task, **fields})
        self._out.write(line + "\n")  # not print(): the runner has replaced that too
        self._out.flush()


def _step_name(task: str) -> str:
    """Return the step of a task: `evaluate-2` is the same step in the graph's other branch."""
    return re.sub(r"-\d+$", "", task).replace("-", "_")

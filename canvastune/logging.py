"""What a person sees while something long runs: lines, and a bar on a terminal; or, on request, one JSON object per line."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_FORMAT = "CANVASTUNE_LOG_FORMAT"  # "json" in a process whose lines become objects: its own events are written as such
FORMATS = ("text", "json")
FORMAT_HELP = "json: every line is an object with time, level and event (default: text)"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TROUBLE = ("skipped_step", "damaged_checkpoint", "restarted")  # events of a run that went on
_ERROR = re.compile(r"canvastune: error: |Traceback \(")
_WARNING = re.compile(r"WARN(ING)?\b|\S*\bwarnings?\b:|\S+: \w*Warning: ", re.IGNORECASE)


def in_json() -> bool:
    """Whether this process's lines become JSON objects."""
    return os.environ.get(LOG_FORMAT) == "json"


def format_event(event: str, *, level: str = "info", **fields: Any) -> str:
    """One object: time (UTC), level, event, and what else is known. Numbers that are not finite become null, as JSON has none."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    rank = {"rank": int(os.environ["RANK"])} if "RANK" in os.environ else {}
    text = json.dumps({"time": now, "level": level, "event": event, **rank, **fields}, ensure_ascii=False)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def read_event(line: str) -> dict[str, Any] | None:
    """The object in a line that `format_event` wrote; None for any other line."""
    if not line.startswith('{"time": '):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"level", "event"} <= found.keys() else None


def level_of(line: str) -> str:
    """The level of a line that somebody wrote for people."""
    return "error" if _ERROR.match(line) else "warning" if _WARNING.match(line) else "info"


def say(line: str, event: str = "log", **fields: Any) -> None:
    """A line for people on standard output, or the event that it tells of."""
    print(format_event(event, message=line, **fields) if in_json() else line, flush=True)


def speak(form: str) -> None:
    """With `json`, every line of this process and of those that it starts is from here on one JSON object on standard output.

    The process is split in two. The child comes back from this call and does the work; the parent never does: it turns each line that the
    work writes, libraries' and other processes' own included, into an object, hands signals on, and ends with the work's exit code.
    Call it before threads and devices are in use.
    """
    if form != "json":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # none is lost between the split and the handlers
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)  # a terminal's Ctrl-C goes to the parent alone, which hands it on once
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(reading)
        os.close(writing)
        for stream in (sys.stdout, sys.stderr):
            getattr(stream, "reconfigure")(line_buffering=True)  # noqa: B009
        os.environ |= {LOG_FORMAT: "json", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return
    os.close(writing)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads any more: end as `cat` would
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: _hand_on(worker, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _translate(reading)
    _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)  # what the work has to put away, the work puts away


def _hand_on(worker: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, number)


def _translate(reading: int) -> None:
    """Write every line that comes as one object, until the last process that could write one has ended."""
    failing = False
    with open(reading, encoding="utf-8", errors="replace", newline="\n") as lines:
        for text in lines:
            line = text.rstrip().rpartition("\r")[2]  # of a bar, the last state
            if not line.strip():
                continue
            known = read_event(line) is not None
            if not known:
                level = "error" if failing else level_of(line)
                failing = level == "error"
                event = "error" if line.startswith("canvastune: error: ") else "log"
                line = format_event(event, level=level, message=line.strip().removeprefix("canvastune: error: "))
            failing = failing and not known  # what follows the first line of an error belongs to it
            os.write(1, f"{line}\n".encode())


class TrainingProgress:
    """Lines on standard error, with a bar below them where that is a terminal. On the first rank only."""

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._started, self._first_step = time.monotonic(), None
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """Print a record of metrics.jsonl where it is due."""
        step = record["step"]
        if record["kind"] == "train":
            if self._first_step is None:
                self._first_step, self._started = step - 1, time.monotonic() - record["seconds"]
            if self._bar is not None:
                self._bar.update(self._task, completed=step)
            if step == 1 or step % self._log_every == 0 or step == self._steps:
                self._print(
                    f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {record['loss']:.4f}  "
                    f"diffusion {record['diffusion_loss']:.4f}  autoregressive {record['autoregressive_loss']:.4f}  "
                    f"grad norm {record['grad_norm']:.3g}  lr {record['lr']:.3g}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s  {self._left(step)}",
                    {**record, "steps": self._steps, "seconds_left": round(self._seconds_left(step))},
                )
        elif record["kind"] == "validation":
            levels = "  ".join(f"t={level} {loss:.4f}" for level, loss in record["levels"].items())
            self._print(f"step {step}: validation loss {record['loss']:.4f}  ({levels})", record)
        elif record["event"] != "checkpoint" or record["detail"]:
            self._print(f"step {step}: {record['event']} {record['detail']}".rstrip(), record)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, step: int) -> float:
        return (time.monotonic() - self._started) / (step - (self._first_step or 0)) * (self._steps - step)

    def _left(self, step: int) -> str:
        seconds = self._seconds_left(step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _print(self, line: str, record: dict[str, Any]) -> None:
        if in_json():
            fields = {key: value for key, value in record.items() if key not in ("kind", "time", "event")}
            event = record.get("event", record["kind"])
            print(format_event(event, level="warning" if event in _TROUBLE else "info", **fields), file=sys.stderr, flush=True)
        else:
            self._console.print(line, markup=False)

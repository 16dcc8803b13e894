"""Configure log output (plain lines or one JSON object per event) and the training progress bar.

Modules log with `logger = logging.getLogger(__name__)`. Programs call `configure_logging` once, at
their start. Only the standard library is imported at the top: `canvastune doctor` runs before
anything is installed.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from canvastune.errors import UserError, format_error

if TYPE_CHECKING:
    from rich.progress import Progress

LOG_FORMAT = "CANVASTUNE_LOG_FORMAT"  # "json" also for the processes that a program starts
FORMATS = ("text", "json")
FORMAT_HELP = "json: log each event as an object with time, level and event (default: text)"
# Events of metrics.jsonl after which training continues.
WARNING_EVENTS = ("skipped_step", "damaged_checkpoint", "restarted")

# __main__: a module that was started with `python -m`.
_OUR_PACKAGES = ("canvastune", "components", "pipelines", "__main__")
# The progress of the pipeline is its programs' output; the engine keeps standard output free.
_STDOUT_PACKAGES = ("components", "pipelines")

logger = logging.getLogger(__name__)


def configure_logging(log_format: str = "text") -> None:
    """Send the log records of this process to the standard streams.

    Our packages log from level INFO on rank 0 and from WARNING on the other ranks; libraries log
    from WARNING. Text goes to standard error, except for what `components` and `pipelines` report;
    all JSON goes to standard output.

    Args:
        log_format: "json", also for processes that this one starts; "text", unless the process that
            started this one logs JSON.
    """
    if log_format == "json":
        # Progress bars of libraries are no log lines.
        os.environ |= {LOG_FORMAT: "json", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    handler = StandardStreamHandler()
    handler.setFormatter(JsonFormatter() if json_requested() else TextFormatter())
    root = logging.getLogger()
    for other in list(root.handlers):
        # Kubeflow's executor shows every library's INFO.
        if type(other) in (logging.StreamHandler, StandardStreamHandler):
            root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for package in _OUR_PACKAGES:
        logging.getLogger(package).setLevel(
            logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
        )
    logging.captureWarnings(True)
    if json_requested():
        sys.excepthook = _log_uncaught


def json_requested() -> bool:
    """Return True if this process or the one that started it was asked for JSON."""
    return os.environ.get(LOG_FORMAT) == "json"


def event(name: str, **fields: Any) -> dict[str, Any]:
    """Return the `extra` of a log call whose JSON object has its own event name and fields.

    A record with an empty message appears in JSON only:
    `logger.info("", extra=event("prepared", rows_read=7))`.
    """
    return {"event": name, "fields": fields}


def log_error(error: UserError) -> None:
    """Log a user's mistake: its message and hint, without a traceback."""
    logger.error("%s", error, extra={"hint": error.hint})


def log_exception(error: BaseException) -> None:
    """Log a failure of the program: its traceback and, in JSON, the exception as the message."""
    logger.error("%s: %s", type(error).__name__, error, exc_info=error, extra=event("exception"))


class TextFormatter(logging.Formatter):
    """Format a record as the plain line that a person reads."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info and getattr(record, "event", "") == "exception":
            return self.formatException(record.exc_info)
        if hasattr(record, "event"):
            text = message
        elif record.levelno >= logging.ERROR and _is_ours(record):
            text = format_error(UserError(message, hint=getattr(record, "hint", "")))
        else:
            text = (
                message
                if record.levelno < logging.WARNING
                else f"{record.levelname} {message.rstrip()}"
            )
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object: time (UTC), level, event, message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        failed = record.levelno >= logging.ERROR and _is_ours(record)
        fields = {"message": message} if (message := record.getMessage().strip()) else {}
        if hint := getattr(record, "hint", ""):
            fields["hint"] = hint
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        fields |= getattr(record, "fields", {})
        name = getattr(record, "event", "error" if failed else "log")
        return format_event(name, level=record.levelname.lower(), **fields)


class StandardStreamHandler(logging.Handler):
    """Write to sys.stdout and sys.stderr; look them up each time, since runners replace them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_ours(record) and record.levelno < logging.WARNING:
            return
        try:
            if isinstance(self.formatter, JsonFormatter):
                stream = sys.stdout
            elif record.getMessage():
                stdout = (
                    record.name.partition(".")[0] in _STDOUT_PACKAGES
                    and record.levelno < logging.ERROR
                )
                stream = sys.stdout if stdout else sys.stderr
            else:
                return
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:
            self.handleError(record)


def format_event(event: str, *, level: str = "info", **fields: Any) -> str:
    """Return an event as one JSON object on one line: time, level, rank and fields.

    The time is now, in UTC; a field `time` replaces it.

    Numbers that are not finite become null, since JSON has none.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    rank = {"rank": int(os.environ["RANK"])} if "RANK" in os.environ else {}
    text = json.dumps(
        {"time": now, "level": level, "event": event, **rank, **fields},
        ensure_ascii=False,
        default=str,
    )
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def read_event(line: str) -> dict[str, Any] | None:
    """Return the object in a line that `format_event` wrote; None for any other line."""
    if not line.startswith('{"time": '):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"level", "event"} <= found.keys() else None


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OUR_PACKAGES


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log_exception(error)


class TrainingProgress:
    """Log the records of metrics.jsonl that are due, with a bar below them on a terminal.

    Used on rank 0 only.
    """

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._first: tuple[int, float] | None = None  # step, and when it had ended
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not json_requested():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            # While it runs it replaces sys.stderr, and so puts log lines above the bar.
            self._bar = Progress(
                *columns,
                console=Console(stderr=True, highlight=False, soft_wrap=True),
                transient=True,
            )
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl if it is due."""
        step = record["step"]
        if record["kind"] == "train":
            if self._first is None:
                self._first = step, time.monotonic()
            if self._bar is not None:
                self._bar.update(self._task, completed=step)
            if step == 1 or step % self._log_every == 0 or step == self._steps:
                left = self._seconds_left(step)
                shown = "" if left is None else f"  {left // 60}:{left % 60:02d} left"
                self._log(
                    f"step {step:>{len(str(self._steps))}}/{self._steps}  "
                    f"loss {record['loss']:.4f}  diffusion {record['diffusion_loss']:.4f}  "
                    f"autoregressive {record['autoregressive_loss']:.4f}  "
                    f"grad norm {record['grad_norm']:.3g}  lr {record['lr']:.3g}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s{shown}",
                    {**record, "steps": self._steps, "seconds_left": left},
                )
        elif record["kind"] == "validation":
            levels = "  ".join(f"t={level} {loss:.4f}" for level, loss in record["levels"].items())
            self._log(f"step {step}: validation loss {record['loss']:.4f}  ({levels})", record)
        elif record["event"] != "checkpoint" or record["detail"]:
            happened = record["event"].replace("_", " ")
            self._log(f"step {step}: {happened} {record['detail']}".rstrip(), record)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, step: int) -> int | None:
        """Return the time for the rest; None after the first step, which takes longer than others."""
        first, ended = self._first or (step, 0.0)
        if step == first:
            return 0 if step == self._steps else None
        return round((time.monotonic() - ended) / (step - first) * (self._steps - step))

    def _log(self, line: str, record: dict[str, Any]) -> None:
        fields = {
            key: value for key, value in record.items() if key not in ("kind", "time", "event")
        }
        name = record.get("event", record["kind"])
        level = logging.WARNING if name in WARNING_EVENTS else logging.INFO
        logger.log(level, "%s", line, extra={"event": name, "fields": fields})

"""A program for tests of processes: `python -m tests.support.forked ACTION ...` says what it finds."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def main() -> None:
    action, *rest = sys.argv[1:]
    if action == "report":
        found = {
            "arguments": rest,
            "input": sys.stdin.read(),
            "folder": os.getcwd(),
            "variable": os.environ.get("FORKED_VARIABLE"),
            "leads_session": os.getsid(0) == os.getpid(),
            "ignores_hangup": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
            "main": __name__,
        }
        print(json.dumps(found))
        print("to standard error", file=sys.stderr)
    elif action == "parent":
        print(os.getppid(), flush=True)
    elif action == "callers":
        print(json.dumps([inspect.stack()[0].function, inspect.stack()[0].code_context]))
    elif action == "exit":
        sys.exit(int(rest[0]))
    elif action == "fail":
        raise ValueError(rest[0])
    elif action == "fill":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "kill":
        os.kill(os.getpid(), int(rest[0]))
        time.sleep(60)
    elif action == "wait":
        _wait(Path(rest[0]))


def _wait(record: Path) -> None:
    """Write `record` with the id of this process, and what signal then ends it."""

    def end(number: int, _: FrameType | None) -> None:
        record.write_text(signal.Signals(number).name, encoding="utf-8")
        sys.exit(7)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    record.write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(60)
    sys.exit(8)


if __name__ == "__main__":
    main()

"""Run `python -m MODULE` many times at the cost of one start: import the libraries once, fork for
each run.

    PYTHONPATH=TREE python -P tools/loss_compare/warm_start.py < jobs > results

Each line of standard input is a job, `{"module", "arguments", "folder", "ranks", "log"}`; its line
of standard
output is the list of exit codes, one per rank. `ranks` 0 is a plain command; 1 and more set the
variables that
`torchrun --nproc-per-node` sets. The output of all ranks goes to the file `log`. Nothing of the
project is
imported except the modules to run, so that this works with any version.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

WARM = ("canvastune.train", "canvastune.evaluate", "pipelines.cli")


def main() -> None:
    """Run jobs until standard input ends."""
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # no copy-on-write of the parent's objects by the collector
    _answer(str(sys.modules["canvastune"].__path__[0]))
    for line in sys.stdin:
        job = json.loads(line)
        codes = _run(job)
        if (
            any(codes)
            and "address already in use" in Path(job["log"]).read_text(errors="replace").lower()
        ):
            codes = _run(job)  # another process took the port in between
        _answer(codes)


def _answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _run(job: dict[str, Any]) -> list[int]:
    ranks = job["ranks"]
    port = _free_port() if ranks else 0
    children = []
    for rank in range(max(ranks, 1)):
        child = os.fork()
        if child == 0:
            if ranks:
                place = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "LOCAL_WORLD_SIZE": ranks,
                    "MASTER_PORT": port,
                }
                os.environ.update(
                    {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1"
                )
            _become(job)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _become(job: dict[str, Any]) -> None:
    """Run the module and exit with its exit code."""
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [job["module"], *job["arguments"]]
    warnings.filterwarnings("ignore", message=".*found in sys.modules.*", category=RuntimeWarning)
    code: Any = 0
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Skip only the teardown of modules, which takes longer than most of the commands.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


if __name__ == "__main__":
    main()

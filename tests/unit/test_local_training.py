"""The training processes of the step itself: they can save before they are killed, and their
failure is shown.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from canvastune.errors import UserError
from components.jobs.torchrun import read_failure, run_ranks, terminating_process

TORCHRUN = """
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 10957)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 10958)
"""


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, BrokenPipeError]
)  # the latter: our output's reader exits first
def test_training_is_asked_to_stop_before_it_is_killed(
    error: type[BaseException], tmp_path: Path
) -> None:
    saving = (
        "import pathlib, signal, sys; signal.signal(15, lambda *_:"
        f" (pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit()))"
    )
    waiting = "print('ready', flush=True); signal.pause()"
    children = []

    def interrupted() -> None:
        with terminating_process(
            [sys.executable, "-c", f"{saving}; {waiting}"], dict(os.environ), grace=60
        ) as child:
            children.append(child)
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            raise error

    with pytest.raises(error):
        interrupted()
    assert children[0].returncode is not None, "it still runs"
    assert (tmp_path / "saved").exists(), "killed before it could save its state"


def _write_log(logs: Path, rank: int, text: str) -> None:
    file = logs / "some-id" / "attempt_0" / str(rank) / "stderr.log"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_failed_training_shows_the_first_ranks_error(tmp_path: Path) -> None:
    _write_log(
        tmp_path,
        0,
        "warming up\ncanvastune: error: batch 3 does not divide\nby 2\n  hint: Use 4.\n",
    )
    _write_log(tmp_path, 1, "")
    error = read_failure(1, TORCHRUN, tmp_path)
    assert (str(error), error.hint) == ("batch 3 does not divide\nby 2", "Use 4.")


def test_failed_training_shows_the_last_lines_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    _write_log(tmp_path, 0, "closed by peer\n")
    _write_log(
        tmp_path, 1, "\n".join(f"line {number}" for number in range(100)) + "\nValueError: here\n"
    )
    error = read_failure(1, TORCHRUN, tmp_path)
    first, *lines = str(error).splitlines()
    assert first == snapshot("rank 1 exited with code -9; its last lines:")
    assert lines == [*(f"line {number}" for number in range(51, 100)), "ValueError: here"]
    assert str(tmp_path) in error.hint, "the other ranks' output cannot be found"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `program` that a test writes, and an interpreter that finds it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "output").mkdir()
    return tmp_path / "program.py"


def test_a_single_rank_knows_that_it_is_alone(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text(
        "import os, sys; print(os.environ['WORLD_SIZE'], os.environ['RANK'], *sys.argv[1:])"
    )
    output = program.with_name("output")
    run_ranks(("program", "a", "b c"), 1, output, 1)
    assert capfd.readouterr().out == "1 0 a b c\n"
    assert not list(output.iterdir()), "logs of a rank that succeeded were kept"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('said'); raise SystemExit(4)", "rank 0 exited with code 4; its last lines:\nsaid"),
        ("import os; os.kill(os.getpid(), 9)", "rank 0 exited with code -9; its last lines:\n"),
        ("raise SystemExit(3)", "training was asked to stop and saved its state"),
        ("print('canvastune: error: no rows'); exit(1)", "no rows"),
    ],
)
def test_the_failure_of_a_single_rank_is_told_as_torchrun_tells_it(
    program: Path, code: str, message: str
) -> None:
    program.write_text(code)
    with pytest.raises(UserError) as failure:
        run_ranks(("program",), 1, program.with_name("output"), 1)
    assert str(failure.value) == message
    assert len(list(program.with_name("output").glob("logs-*/rank0.log"))) == 1

"""The training processes of the step itself: asked to stop before they are killed, and their failure told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from components.train import torchrun as local

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


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])  # the latter: whoever listened to us went away first
def test_training_is_asked_to_stop_before_it_is_killed(error: type[BaseException], tmp_path: Path) -> None:
    saving = f"import pathlib, signal, sys; signal.signal(15, lambda *_: (pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit()))"
    waiting = "print('ready', flush=True); signal.pause()"
    children = []

    def interrupted() -> None:
        with local._running([sys.executable, "-c", f"{saving}; {waiting}"], dict(os.environ), grace=60) as child:
            children.append(child)
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            raise error

    with pytest.raises(error):
        interrupted()
    assert children[0].returncode is not None, "it still runs"
    assert (tmp_path / "saved").exists(), "killed before it could save its state"


def _said(logs: Path, rank: int, text: str) -> None:
    file = logs / "some-id" / "attempt_0" / str(rank) / "stderr.log"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_failed_training_tells_the_first_ranks_error(tmp_path: Path) -> None:
    _said(tmp_path, 0, "warming up\ncanvastune: error: batch 3 does not divide\nby 2\n")
    _said(tmp_path, 1, "")
    assert local._why(1, TORCHRUN, tmp_path) == "batch 3 does not divide\nby 2"


def test_failed_training_tells_the_last_words_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    _said(tmp_path, 0, "closed by peer\n")
    _said(tmp_path, 1, "\n".join(f"line {number}" for number in range(100)) + "\nValueError: here\n")
    words = local._why(1, TORCHRUN, tmp_path)
    assert words.startswith("rank 1 ended with exit code -9; its last lines:")
    assert "ValueError: here" in words
    assert "closed by peer" not in words
    assert "line 10\n" not in words, "more than the last lines"

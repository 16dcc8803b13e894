"""What was done is kept, whatever became of the process."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from canvastune.errors import UserError
from canvastune.evaluation.answer_cache import AnswerCache

RESULT = {"texts": {"a": "72 \u2028 \U0001f34e\n"}, "seconds": 0.1 + 0.2, "film": None}


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "deep" / "journal") as journal:
        assert journal.find({"rows": ["a"]}) is None
        journal.keep({"rows": ["a"], "seed": 1}, RESULT)
    with AnswerCache(tmp_path / "deep" / "journal") as journal:
        assert len(journal) == 1
        assert journal.find({"seed": 1, "rows": ("a",)}) == RESULT
        assert journal.find({"seed": 2, "rows": ["a"]}) is None


def test_half_a_line_is_cut_off_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for kept in (1, 2):
        with AnswerCache(path) as journal:
            assert len(journal) == kept - 1
            journal.keep({"piece": kept}, RESULT)
        with path.open("ab") as file:
            file.write(b'{"piece": "5f0a')
    with AnswerCache(path) as journal:
        assert [journal.find({"piece": piece}) for piece in (1, 2)] == [RESULT, RESULT]
    path.write_bytes(b"{")
    with AnswerCache(path) as journal:
        assert len(journal) == 0
    assert not path.exists(), "an empty journal is left behind"


def test_two_evaluations_do_not_share_a_journal(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "journal") as journal:
        journal.keep({"piece": 1}, RESULT)
        with pytest.raises(UserError, match=r"journal: another evaluation is at work here"):
            AnswerCache(tmp_path / "journal")


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("not a journal\n")
    with pytest.raises(UserError, match=r"journal: damaged\. Remove this file"):
        AnswerCache(tmp_path / "journal")


def test_a_full_disk_loses_nothing_that_was_done(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerCache(path) as journal:
        journal.keep({"piece": 1}, RESULT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            with pytest.raises(UserError, match=r"journal: cannot be written .* Make room, and the same command goes on"):
                journal.keep({"piece": 2}, RESULT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with AnswerCache(path) as journal:
        assert (journal.find({"piece": 1}), journal.find({"piece": 2})) == (RESULT, None)
        journal.keep({"piece": 2}, RESULT)
    assert path.read_bytes().count(b"\n") == 2

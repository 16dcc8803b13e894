"""Saved results survive whatever happens to the process."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from canvastune.errors import UserError
from canvastune.evaluation.answer_cache import AnswerCache

RESULT = {"texts": {"a": "72 \u2028 \U0001f34e\n"}, "seconds": 0.1 + 0.2, "film": None}


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "deep" / "cache") as cache:
        assert cache.get({"rows": ["a"]}) is None
        cache.put({"rows": ["a"], "seed": 1}, RESULT)
    with AnswerCache(tmp_path / "deep" / "cache") as cache:
        assert len(cache) == 1
        assert cache.get({"seed": 1, "rows": ("a",)}) == RESULT
        assert cache.get({"seed": 2, "rows": ["a"]}) is None


def test_half_a_line_is_cut_off_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for kept in (1, 2):
        with AnswerCache(path) as cache:
            assert len(cache) == kept - 1
            cache.put({"piece": kept}, RESULT)
        with path.open("ab") as file:
            file.write(b'{"piece": "5f0a')
    with AnswerCache(path) as cache:
        assert [cache.get({"piece": piece}) for piece in (1, 2)] == [RESULT, RESULT]
    path.write_bytes(b"{")
    with AnswerCache(path) as cache:
        assert len(cache) == 0
    assert not path.exists(), "an empty cache is left behind"


def test_two_evaluations_do_not_share_a_cache(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "cache") as cache:
        cache.put({"piece": 1}, RESULT)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "cache"))):
            AnswerCache(tmp_path / "cache")


def test_a_corrupt_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a cache\n")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "cache"))):
        AnswerCache(tmp_path / "cache")


def test_a_full_disk_loses_nothing_that_was_done(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerCache(path) as cache:
        cache.put({"piece": 1}, RESULT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            with pytest.raises(UserError, match=re.escape(str(path))):
                cache.put({"piece": 2}, RESULT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with AnswerCache(path) as cache:
        assert (cache.get({"piece": 1}), cache.get({"piece": 2})) == (RESULT, None)
        cache.put({"piece": 2}, RESULT)
    assert path.read_bytes().count(b"\n") == 2

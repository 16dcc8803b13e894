"""A buffer that is lent again and again."""

from __future__ import annotations

import pytest
import torch

from canvastune.model import scratch
from canvastune.model.scratch import borrow

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_free", [])


def test_the_next_one_gets_the_same_memory_in_its_own_shape_and_dtype() -> None:
    with borrow((4, 6), LIKE) as first:
        assert (first.shape, first.dtype) == ((4, 6), torch.float32)
        address = first.data_ptr()
    with borrow((3, 5), LIKE.to(torch.bfloat16)) as second:
        assert (second.shape, second.dtype) == ((3, 5), torch.bfloat16)
        assert second.data_ptr() == address
    with borrow((40, 60), LIKE) as larger:  # which replaces it
        replaced = larger.data_ptr()
    with borrow((4, 6), LIKE) as last:
        assert last.data_ptr() == replaced


def test_who_asks_while_it_is_lent_gets_other_memory() -> None:
    with borrow((4,), LIKE) as outer:
        outer.fill_(1)
        with borrow((4,), LIKE) as inner:
            inner.fill_(2)
        assert outer.tolist() == [1] * 4
    assert len(scratch._free) == 1


def test_a_buffer_is_back_after_an_error_and_a_large_one_is_not_kept() -> None:
    with pytest.raises(KeyError), borrow((4,), LIKE):
        raise KeyError
    assert len(scratch._free) == 1
    scratch._free.clear()
    with borrow((scratch.KEPT_BYTES // 4 + 1,), LIKE):
        pass
    assert not scratch._free


def test_what_is_not_on_a_cpu_comes_from_its_own_allocator() -> None:
    with borrow((2, 3), torch.zeros(1, device="meta")) as buffer:
        assert buffer.device.type == "meta"
    assert not scratch._free

"""A large buffer that a CPU's results are written to again and again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

KEPT_BYTES = 2**25  # of a buffer that is kept for the next one
_NOTHING = torch.empty(0, dtype=torch.uint8)
_free: list[torch.Tensor] = []  # at most one: uint8


@contextlib.contextmanager
def borrow(shape: tuple[int, ...], like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Lend a buffer of this shape, with another tensor's dtype and device, until the block ends.

    Its values are arbitrary. On a CPU it is the memory of the buffer before, of up to 32 MiB: memory
    that is new from the system costs page faults, which can take longer than the matmul that
    fills it. While it is lent, another call gets new memory. A GPU's allocator keeps memory by
    itself.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size > KEPT_BYTES:
        yield like.new_empty(shape)
        return
    try:
        buffer = _free.pop()
    except IndexError:  # it is lent, or there is none yet
        buffer = _NOTHING
    if len(buffer) < size:
        buffer = _NOTHING  # freed before more memory is asked for
        buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(like.dtype).view(shape)
    finally:
        _free[:] = [max(buffer, *_free, key=len)] if _free else [buffer]

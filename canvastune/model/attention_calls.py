"""Which calls of attention a packed batch takes, and their sizes: the engine makes them, the planner
counts them without PyTorch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Scores that a call of several canvases may compute for each one that a canvas sees. Up to here a
# CPU takes as long as with a call for each; all of an answer of 16 blocks at once takes two to
# three times as long. Fewer calls copy fewer keys, and fill a GPU, which a canvas of 256 rows does
# not. Calls grow with the keys seen, so that the copies grow in proportion to the canvases.
_MOST_SCORES = 1.25
_ALIGNMENT = 8  # elements of a mask's row: CUDA's kernels copy a mask with other strides


class Sight(NamedTuple):
    """What a canvas sees other than itself: clean positions `first` to `stop` of its example."""

    example: int
    rows: int  # of the canvas
    first: int
    stop: int

    @property
    def keys(self) -> int:
        return self.stop - self.first + self.rows


@dataclass(frozen=True)
class CanvasCall:
    """Neighboring canvases of one example that attend in one call.

    Either all have as many rows and keys and form a batch, each with a copy of its keys, or they
    form one sequence over the keys that any of them sees, with a mask.
    """

    canvases: tuple[Sight, ...]

    @property
    def example(self) -> int:
        return self.canvases[0].example

    @property
    def is_batch(self) -> bool:
        return len({(canvas.rows, canvas.keys) for canvas in self.canvases}) == 1

    @property
    def rows(self) -> int:
        """Rows of all canvases."""
        return sum(canvas.rows for canvas in self.canvases)

    @property
    def first(self) -> int:
        """First clean position that any of them sees."""
        return min(canvas.first for canvas in self.canvases)

    @property
    def stop(self) -> int:
        """End of the clean positions that any of them sees."""
        return max(canvas.stop for canvas in self.canvases)

    @property
    def key_rows(self) -> int:
        """Rows of keys, and of values, that are copied for the call."""
        if self.is_batch:
            return sum(canvas.keys for canvas in self.canvases)
        return self.stop - self.first + self.rows

    @property
    def scores(self) -> int:
        """Pairs of a row and a key that the call computes, masked ones included."""
        if self.is_batch:
            return sum(canvas.rows * canvas.keys for canvas in self.canvases)
        return self.rows * self.key_rows

    @property
    def mask_shape(self) -> tuple[int, int] | None:
        """Rows and columns of the call's mask; None: it has none."""
        return None if self.is_batch else (self.rows, aligned(self.key_rows))


@functools.lru_cache(maxsize=256)  # layers of one type ask for the same
def canvas_calls(
    canvases: tuple[tuple[int, int, int], ...], window: int | None
) -> tuple[CanvasCall, ...]:
    """Return the calls in which canvases attend: as few as their masks allow without much waste.

    Neighbors with as many rows and keys form a batch without a mask: in sliding layers, all but
    those near the example's beginning. The others join while few of a call's scores are masked.

    Args:
        canvases: example, first position of the block, and rows, of each canvas; ascending.
        window: of a sliding layer; None: full attention.
    """
    # Only what precedes the block, never its own clean tokens. On sliding layers, the last
    # window - 1 positions before the block's start, the same for each of its rows: what
    # block-by-block inference keeps in its cache.
    sights = [
        Sight(example, rows, 0 if window is None else max(0, start - (window - 1)), start)
        for example, start, rows in canvases
    ]
    alike = itertools.groupby(sights, key=lambda canvas: (canvas.example, canvas.rows, canvas.keys))
    calls: list[CanvasCall] = []
    for _, group in alike:
        call = CanvasCall(tuple(group))
        if calls and len(call.canvases) == 1:
            joined = CanvasCall((*calls[-1].canvases, *call.canvases))
            seen = sum(canvas.rows * canvas.keys for canvas in joined.canvases)
            mergeable = len(calls[-1].canvases) == 1 or not calls[-1].is_batch
            same = calls[-1].example == call.example
            if same and mergeable and joined.scores <= _MOST_SCORES * seen:
                calls[-1] = joined
                continue
        calls.append(call)
    return tuple(calls)


def sliding_calls(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each call of a sliding layer over `length` clean rows, more than `window`,
    and the keys that any of them sees.

    Half a window of rows: more would see many masked keys, fewer would be many small calls.
    """
    size = -(-window // 2)
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(max(0, start - window + 1), stop)


def canvas_mask_elements(calls: Iterable[CanvasCall]) -> int:
    """Return the elements of the masks of these calls."""
    shapes = [call.mask_shape for call in calls]
    return sum(shape[0] * shape[1] for shape in shapes if shape)


def clean_mask_elements(length: int, window: int) -> int:
    """Return the elements of the masks of sliding layers over `length` clean rows, whose calls share
    a few.
    """
    shapes = {
        (own.stop - own.start, seen.stop - seen.start)
        for own, seen in sliding_calls(length, window)
    }
    return sum(rows * aligned(keys) for rows, keys in shapes) if length > window else 0


def aligned(columns: int) -> int:
    """Return the elements of a mask's row, those that no one reads included."""
    return -(-columns // _ALIGNMENT) * _ALIGNMENT

"""Seconds that training waits for its checkpoints, which are written in the background."""

from __future__ import annotations

import math
from dataclasses import dataclass

DISK_RATE = 2e9  # bytes per second that a workspace is assumed to write
MOST_SHARE = 0.10  # goal: of a run's time


@dataclass(frozen=True)
class CheckpointTimes:
    """What the checkpoints of a run cost, at `DISK_RATE`."""

    write: float  # seconds to write one
    last: float  # seconds to write the last one, which has no optimizer state
    waited: float  # seconds in which training stands, over the run
    share: float  # of the run's time
    # Steps between checkpoints, at most all, with which only the last one is waited for.
    hidden_from: int
    enough: int  # steps of a run in which only the last one takes `MOST_SHARE`


def checkpoint_times(
    size: int, last_size: int, steps: int, every: int, step_seconds: float, *, asynchronous: bool
) -> CheckpointTimes:
    """Return the times of a run whose checkpoints have `size` bytes, and the last one `last_size`.

    In the background, one is written while the next `every` steps run; the next one waits for it,
    as does the end of the run for the last one. Not counted: the copy to the host's memory.
    """
    write, last, training = size / DISK_RATE, last_size / DISK_RATE, steps * step_seconds
    saves = math.ceil(steps / every)
    if asynchronous:
        intervals = [every] * (saves - 2) + [steps - (saves - 1) * every] * (saves > 1)
        waited = last + sum(max(0.0, write - interval * step_seconds) for interval in intervals)
    else:
        waited = (saves - 1) * write + last
    return CheckpointTimes(
        write,
        last,
        waited,
        waited / (training + waited),
        min(steps, math.ceil(write / step_seconds)),
        math.ceil((1 / MOST_SHARE - 1) * last / step_seconds),
    )

"""Seconds that training waits for its checkpoints, which are written in the background, and what
runs meanwhile.

A checkpoint is first copied to pinned host memory, while the next step runs up to its update, and
written from there while further steps run. The next checkpoint waits for those files, and so does
the end of the run for the last one. Full fine-tuning has no last one: its model is written instead.
Without `train.async_checkpoints` nothing is copied first, and
training waits for all files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DISK_RATE = 2e9  # bytes per second that a workspace is assumed to write
# Bytes per second of a process that pins its host memory, once per run: 16 GB take 8 s
# (NVIDIA/cudf#23477).
PIN_RATE = 2e9
MOST_SHARE = 0.10  # goal: of a run's time


@dataclass(frozen=True)
class CheckpointTimes:
    """What the checkpoints of a run cost, in seconds, at `DISK_RATE`."""

    write: float  # to write one, while training runs
    last: float  # to write the last one, which has no optimizer state; 0: there is none
    staging: float  # to copy one to host memory
    pinning: float  # to allocate and pin that memory, before the first copy
    staged: float  # that training waits for copies and pinning, over the run
    behind: float  # that training waits for files, which outlast the steps between, or are the last
    overlapped: float  # that files are written while training runs, over the run
    waited: float  # that training waits, over the run: staged and behind
    share: float  # waited, of the run's time
    # Steps between checkpoints, at most all, with which only the last one is waited for.
    hidden_from: int
    enough: int  # steps of a run in which only the last one takes `MOST_SHARE`


def checkpoint_times(
    size: int,
    last_size: int,
    steps: int,
    every: int,
    step_seconds: float,
    *,
    asynchronous: bool,
    ranks: int,
    host_rate: float,
    pinned: bool = True,
    until_update: float = 0.0,
) -> CheckpointTimes:
    """Return the times of a run whose checkpoints have `size` bytes, and the last one `last_size`.

    A run without a last one has a `last_size` of 0.

    Args:
        ranks: that copy equal parts at the same time.
        host_rate: bytes per second that each copies to host memory.
        pinned: the host memory is pinned, before the first copy.
        until_update: seconds of a step before its update, which must not change what is being copied.
    """
    write, last, training = size / DISK_RATE, last_size / DISK_RATE, steps * step_seconds
    saves = math.ceil(steps / every)
    written = (saves - 1) * write + last
    if not asynchronous:
        waited = written
        staging = pinning = staged = overlapped = 0.0
        only_last, behind = last, written
    else:
        staging, last_staging = (each / ranks / host_rate for each in (size, last_size))
        pinning, last_pinning = (
            each / ranks / PIN_RATE if pinned else 0.0 for each in (size, last_size)
        )
        copies = [staging + pinning, *[staging] * (saves - 2)][: saves - 1]
        only_last = last_pinning + last_staging + last
        if not copies:
            pinning = last_pinning
        staged = sum(max(0.0, copy - until_update) for copy in copies)
        staged += last_staging + (0.0 if copies else last_pinning)
        intervals = [every] * (saves - 2) + [steps - (saves - 1) * every] * (saves > 1)
        behind = last + sum(
            max(0.0, write - (interval * step_seconds - min(copy, until_update)))
            for interval, copy in zip(intervals, copies, strict=True)
        )
        waited, overlapped = staged + behind, written - behind
    return CheckpointTimes(
        write=write,
        last=last,
        staging=staging,
        pinning=pinning,
        staged=staged,
        behind=behind,
        overlapped=overlapped,
        waited=waited,
        share=waited / (training + waited),
        hidden_from=min(steps, math.ceil((write + until_update) / step_seconds)),
        enough=math.ceil((1 / MOST_SHARE - 1) * only_last / step_seconds),
    )

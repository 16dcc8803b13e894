"""Detect ranks that hang or have exited, and name them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

import torch.distributed as dist

EXIT_HUNG = 4  # exit code of a rank that ended a run because some rank hangs
_ANSWER_SECONDS = 5.0
_OWN_CODE = str(Path(__file__).parents[1])
_DISTRIBUTED = os.path.dirname(dist.__file__)
_WAITING = ", waiting for other ranks"
logger = logging.getLogger(__name__)


class RankLostError(RuntimeError):
    """Another rank has exited, which ends the run; the message names it."""


class RankRegistry:
    """Find out what became of the other ranks, over the store of the rendezvous.

    The store still answers when collectives no longer do.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def report_exit(self, error: BaseException) -> None:
        """Publish why this rank exits."""
        with contextlib.suppress(RuntimeError):  # the lost node may be the one that runs the store
            self._store.set(f"died/{self._rank}", f"{type(error).__name__}: {error}")

    def missing_ranks(self, activity: str) -> str | None:
        """Describe the ranks that exited, after a collective of this rank has failed.

        Returns None on all ranks but the lowest surviving one, so that it is printed once.
        """
        locations = self._answers(f"{activity}: {_stack_location(sys._getframe())}")
        if min(locations, default=self._rank) != self._rank:
            return None
        missing = sorted(set(range(self._world_size)) - set(locations))
        if not missing:
            return (
                f"the connection between ranks broke {activity}, and all ranks are still running:"
                " check the network"
            )
        return "; ".join(
            f"rank {rank} died {activity}: {self._last_error(rank)}" for rank in missing
        )

    def hung_ranks(self, activity: str, frame: FrameType | None) -> str:
        """Describe the ranks that hang, for a rank whose main thread is in `frame`."""
        locations = self._answers(f"{activity}: {_stack_location(frame)}")
        absent = sorted(set(range(self._world_size)) - set(locations))
        if absent:
            return (
                f"rank {', '.join(map(str, absent))} does not respond: its process is stopped, or"
                " its node is down"
            )
        (usual, count), *_ = Counter(locations.values()).most_common(1)
        suspects = [rank for rank in sorted(locations) if _WAITING not in locations[rank]]
        if len(suspects) in (0, self._world_size):
            suspects = [
                rank
                for rank in sorted(locations)
                if locations[rank] != usual or count == self._world_size
            ]
        described = "; ".join(f"rank {rank} is {locations[rank]}" for rank in suspects)
        return f"{described}; most ranks are {usual}"

    def _answers(self, own: str) -> dict[int, str]:
        answers = {self._rank: own}
        deadline = time.monotonic() + _ANSWER_SECONDS
        try:
            self._store.set(f"standing/{self._rank}", own)
            while len(answers) < self._world_size and time.monotonic() < deadline:
                for rank in set(range(self._world_size)) - set(answers):
                    if self._store.check([f"standing/{rank}"]):
                        answers[rank] = self._store.get(f"standing/{rank}").decode()
                time.sleep(0.1)
        except RuntimeError as error:
            logger.warning(
                "rank %d: the rendezvous store does not respond either: %s", self._rank, error
            )
        return answers

    def _last_error(self, rank: int) -> str:
        with contextlib.suppress(RuntimeError):
            if self._store.check([f"died/{rank}"]):
                return self._store.get(f"died/{rank}").decode()
        return "it reported no error: killed (out of memory?), or its node is down"


class Watchdog:
    """End this process when its main thread hangs, and name the rank that hangs.

    A collective waits for its last rank, so one rank that hangs stops all of them, and none can
    tell from inside a collective which one is missing. A thread on each rank can.
    """

    def __init__(self, rank_registry: RankRegistry, timeout: float) -> None:
        """
        Args:
            timeout: seconds without a `heartbeat` after which the run ends.
        """
        self._rank_registry, self._timeout = rank_registry, timeout
        self._last, self.activity = time.monotonic(), "at its start"
        self._closed = threading.Event()
        main_thread = threading.get_ident()
        threading.Thread(
            target=self._watch, args=(main_thread,), name="watchdog", daemon=True
        ).start()

    def heartbeat(self, activity: str) -> None:
        """Record progress, and what the main thread does next (`in step 12`)."""
        self._last, self.activity = time.monotonic(), activity

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self, main_thread: int) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 10)):
            silent = time.monotonic() - self._last
            if silent > self._timeout:
                frame = sys._current_frames().get(main_thread)
                hung = self._rank_registry.hung_ranks(self.activity, frame)
                logger.error("no progress for %.0f s (train.hang_timeout): %s", silent, hung)
                os._exit(EXIT_HUNG)


def _stack_location(frame: FrameType | None) -> str:
    """Describe where a thread is: its innermost frame in our own code, and whether it waits."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    if not stack:
        return "nowhere"
    own = [entry for entry in stack if entry.filename.startswith(_OWN_CODE)]
    shown = own[-1] if own else stack[-1]
    waits = any(_DISTRIBUTED in entry.filename for entry in stack)
    place = f"{Path(shown.filename).name}:{shown.lineno}"
    return f"at {place} in {shown.name}{_WAITING if waits else ''}"

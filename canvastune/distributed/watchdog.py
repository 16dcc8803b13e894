"""Detect ranks that hang or exited, and name them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

import torch.distributed as dist

EXIT_HUNG = 4  # exit code of a rank that ended a run in which a rank hangs


_ANSWER_SECONDS = 5.0


_OWN_CODE = str(Path(__file__).parents[1])


_DISTRIBUTED = os.path.dirname(dist.__file__)


_WAITING = ", waiting for other ranks"


class RankLostError(RuntimeError):
    """Another rank is gone, and with it the run; the words name it."""


class RankRegistry:
    """Tells what became of the other ranks, over the store that the ranks met at: it answers where collectives no longer do."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def report_exit(self, error: BaseException) -> None:
        """Say why this rank goes, to those who will miss it."""
        with contextlib.suppress(RuntimeError):  # the store's own node may be the one that is gone
            self._store.set(f"died/{self._rank}", f"{type(error).__name__}: {error}")

    def missing_ranks(self, doing: str) -> str | None:
        """Who is gone, in words, for a rank whose collective has failed; None on all ranks but the first of those still there."""
        places = self._answers(f"{doing}: {_stack_location(sys._getframe())}")
        if min(places, default=self._rank) != self._rank:
            return None
        gone = sorted(set(range(self._world_size)) - set(places))
        if not gone:
            return f"the connection between ranks broke {doing}, and all of them are still there: look at the network"
        return "; ".join(f"rank {rank} died {doing}: {self._last_error(rank)}" for rank in gone)

    def hung_ranks(self, doing: str, frame: FrameType | None) -> str:
        """Who hangs, in words, for a rank whose main thread waits in `frame`."""
        places = self._answers(f"{doing}: {_stack_location(frame)}")
        absent = sorted(set(range(self._world_size)) - set(places))
        if absent:
            return f"rank {', '.join(map(str, absent))} does not answer: the process is stopped, or its node is gone"
        (usual, count), *_ = Counter(places.values()).most_common(1)
        suspects = [rank for rank in sorted(places) if _WAITING not in places[rank]]
        if len(suspects) in (0, self._world_size):
            suspects = [rank for rank in sorted(places) if places[rank] != usual or count == self._world_size]
        return "; ".join(f"rank {rank} stands {places[rank]}" for rank in suspects) + f"; usual is {usual}"

    def _answers(self, mine: str) -> dict[int, str]:
        answers = {self._rank: mine}
        deadline = time.monotonic() + _ANSWER_SECONDS
        try:
            self._store.set(f"standing/{self._rank}", mine)
            while len(answers) < self._world_size and time.monotonic() < deadline:
                for rank in set(range(self._world_size)) - set(answers):
                    if self._store.check([f"standing/{rank}"]):
                        answers[rank] = self._store.get(f"standing/{rank}").decode()
                time.sleep(0.1)
        except RuntimeError as error:
            print(f"canvastune: rank {self._rank}: the ranks' meeting point does not answer either: {error}", file=sys.stderr, flush=True)
        return answers

    def _last_error(self, rank: int) -> str:
        with contextlib.suppress(RuntimeError):
            if self._store.check([f"died/{rank}"]):
                return self._store.get(f"died/{rank}").decode()
        return "it said nothing: killed (out of memory?), or its node is gone"


class Watchdog:
    """Ends this process when its main thread makes no progress, with words that name the rank that hangs.

    A collective waits for its last rank, so one rank that hangs stops all, and none of them can tell from inside a collective
    who is missing. A thread on each of them can.
    """

    def __init__(self, rank_registry: RankRegistry, timeout: float) -> None:
        """
        Args:
            timeout: seconds without a `heartbeat` after which the run ends.
        """
        self._roll_call, self._timeout = rank_registry, timeout
        self._last, self.doing = time.monotonic(), "at its start"
        self._closed = threading.Event()
        threading.Thread(target=self._watch, args=(threading.get_ident(),), name="watchdog", daemon=True).start()

    def heartbeat(self, doing: str) -> None:
        """Something was finished, and this is done next (`in step 12`)."""
        self._last, self.doing = time.monotonic(), doing

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self, main_thread: int) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 10)):
            silent = time.monotonic() - self._last
            if silent > self._timeout:
                verdict = self._roll_call.hung_ranks(self.doing, sys._current_frames().get(main_thread))
                print(f"canvastune: error: no progress for {silent:.0f} s (train.hang_timeout): {verdict}", file=sys.stderr, flush=True)
                os._exit(EXIT_HUNG)


def _stack_location(frame: FrameType | None) -> str:
    """Where a thread stands: its innermost place in our own code, and whether it waits for other ranks there."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    if not stack:
        return "nowhere"
    own = [place for place in stack if place.filename.startswith(_OWN_CODE)]
    shown = own[-1] if own else stack[-1]
    waits = any(_DISTRIBUTED in place.filename for place in stack)
    return f"at {Path(shown.filename).name}:{shown.lineno} in {shown.name}{_WAITING if waits else ''}"

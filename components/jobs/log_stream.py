"""Rank 0's words, passed on as they come: whatever cuts the log off, no line is lost and none comes twice."""

from __future__ import annotations

import re
from collections import deque

from components.jobs.client import KubernetesClient
from components.jobs.pod_diagnostics import LAST_LINES, ended, restarts
from components.jobs.pod_spec import FIRST_RANK
from components.jobs.states import Object

_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)$")


class LogStream:
    """The log of the pod that a selector finds. Every look asks for what came since the last line, so a cut connection costs nothing."""

    def __init__(self, api: KubernetesClient, selector: str) -> None:
        self._api, self._selector = api, selector
        self._kept: deque[str] = deque(maxlen=LAST_LINES)
        self._pod, self._restarts = "", 0
        self._forget_time()
        self._tail: int | None = None

    def begin_at_end(self) -> None:
        """Pass on the last lines alone of what was said before."""
        self._tail = LAST_LINES

    def pass_on(self) -> None:
        """Print what the first rank has said since the last call."""
        for pod in self._api.pods(self._selector):
            self._turn_to(pod)
            for line in self._news(pod["metadata"]["name"], previous=False):
                self._print(line)

    def last_words(self) -> str:
        """The last lines that were passed on, as the end of a message; "" if there were none."""
        return "; the last lines of rank 0:\n" + "\n".join(self._kept) if self._kept else ""

    def _forget_time(self) -> None:
        self._since: str | None = None
        self._time, self._at_time = "", 0  # of the last line, and how many lines had that time

    def _turn_to(self, pod: Object) -> None:
        name, uid, again = pod["metadata"]["name"], pod["metadata"]["uid"], restarts(pod)
        if uid != self._pod:
            self._pod, self._restarts = uid, again
            self._forget_time()
        if again > self._restarts:
            for line in self._news(name, previous=True):
                self._print(line)
            ends = [end for status in pod["status"].get("containerStatuses") or () if (end := ended(status))]
            how = f" ({ends[0].get('reason')}, exit code {ends[0].get('exitCode')})" if ends else ""
            print(f"pod {name} ended{how} and is started again: training goes on from the newest checkpoint", flush=True)
            self._restarts = again
            self._forget_time()

    def _news(self, pod: str, *, previous: bool) -> list[str]:
        tail, self._tail = self._tail, None
        fresh, seen = [], 0
        for line in self._api.log(pod, since=self._since, tail=tail, previous=previous):
            stamp, _, words = line.partition(" ")
            parts = _TIME.match(stamp)
            if parts is None:
                continue
            when = f"{parts[1]}.{parts[2] or ''}"
            seen = seen + 1 if when == self._time else 1
            if when < self._time or (when == self._time and seen <= self._at_time):
                continue  # the API server's `since` is to the second
            self._time, self._at_time, self._since = when, seen, parts[1] + parts[3]
            fresh.append(words)
        return fresh

    def _print(self, line: str) -> None:
        if line.startswith(FIRST_RANK):
            words = line.removeprefix(FIRST_RANK).removeprefix(" ")
            self._kept.append(words)
            print(words, flush=True)

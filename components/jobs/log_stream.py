"""Relay rank 0's log as it is written: no line is lost or repeated, whatever interrupts it."""

from __future__ import annotations

import logging
import re
from collections import deque

from components.jobs.client import KubernetesClient
from components.jobs.pod_diagnostics import (
    TAIL_LINES,
    own_containers,
    restart_count,
    terminated_state,
)
from components.jobs.pod_spec import FIRST_RANK
from components.jobs.states import Object

logger = logging.getLogger(__name__)

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)$")


class LogPosition:
    """A place in the log of one container, up to which it has been read.

    Each call asks for lines after the last one that was seen, so a cut connection loses nothing.
    """

    def __init__(self) -> None:
        self._since: str | None = None
        self._time, self._at_time = "", 0  # of the last line, and how many lines had that time

    def new_lines(
        self,
        api: KubernetesClient,
        pod: str,
        *,
        tail: int | None = None,
        previous: bool = False,
        container: str | None = None,
    ) -> list[str]:
        """Return the lines since the last call, without their timestamps; see `client.log`."""
        new, seen = [], 0
        for line in api.log(
            pod, since=self._since, tail=tail, previous=previous, container=container
        ):
            stamp, _, text = line.partition(" ")
            parts = _TIMESTAMP.match(stamp)
            if parts is None:
                continue
            when = f"{parts[1]}.{parts[2] or ''}"
            seen = seen + 1 if when == self._time else 1
            if when < self._time or (when == self._time and seen <= self._at_time):
                continue  # the API server's `since` is to the second
            self._time, self._at_time, self._since = when, seen, parts[1] + parts[3]
            new.append(text)
        return new


class LogStream:
    """The log of one container of the pod that a selector finds."""

    def __init__(self, api: KubernetesClient, selector: str, container: str) -> None:
        self._api, self._selector, self._container = api, selector, container
        self._last_lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._pod, self._restarts = "", 0
        self._position = LogPosition()
        self._tail: int | None = None

    def start_at_end(self) -> None:
        """Relay only the last lines of what has been written so far."""
        self._tail = TAIL_LINES

    def relay(self) -> None:
        """Print what rank 0 has written since the last call."""
        for pod in self._api.pods(self._selector):
            self._follow(pod)
            self._print_new(pod["metadata"]["name"])

    def last_lines(self) -> str:
        """Return the last relayed lines as the end of a message; "" if there were none."""
        lines = "\n".join(self._last_lines)
        return f"; the last lines of rank 0:\n{lines}" if lines else ""

    def _follow(self, pod: Object) -> None:
        """Switch to a new pod; of a restarted container, print the rest of the previous log."""
        name, uid, restarts = pod["metadata"]["name"], pod["metadata"]["uid"], restart_count(pod)
        if uid != self._pod:
            self._pod, self._restarts = uid, restarts
            self._position = LogPosition()
        if restarts > self._restarts:
            self._print_new(name, previous=True)
            statuses = own_containers(pod)
            ends = [end for status in statuses if (end := terminated_state(status))]
            how = f" ({ends[0].get('reason')}, exit code {ends[0].get('exitCode')})" if ends else ""
            logger.warning(
                f"pod {name} exited{how} and is restarted: training resumes from the newest "
                "checkpoint (reason=PodRestarted)"
            )
            self._restarts = restarts
            self._position = LogPosition()

    def _print_new(self, pod: str, *, previous: bool = False) -> None:
        tail, self._tail = self._tail, None
        for line in self._position.new_lines(
            self._api, pod, tail=tail, previous=previous, container=self._container
        ):
            if line.startswith(FIRST_RANK):
                text = line.removeprefix(FIRST_RANK).removeprefix(" ")
                self._last_lines.append(text)
                print(text, flush=True)  # a formatted line of the pod's own log

"""Why pods do not start, or why they ended: their status and events in plain words, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from canvastune.config import RunConfig
from canvastune.errors import ERROR_PREFIX, format_error, parse_error
from components.jobs.states import Object

_RANK = re.compile(r"\[rank (\d+)\]: ?(.*)")
_PULL = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
_EVICTED = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated", "Shutdown")


class PodBlocker(NamedTuple):
    """What keeps a pod from running."""

    words: str
    can_pass: bool  # False: nothing will change it but a person


def find_blocker(pod: Object, events: list[Object], config: RunConfig) -> PodBlocker | None:
    """What holds a pod up that is not running; None if it does, or if nothing is known."""
    if pod["status"].get("phase") != "Pending":
        return None
    warned = " ".join(f"{event.get('reason', '')}: {event.get('message', '')}" for event in events[-3:])
    return _hold_of_container(pod, warned, config) or _hold_of_place(pod, warned, config)


def _hold_of_container(pod: Object, warned: str, config: RunConfig) -> PodBlocker | None:
    name = pod["metadata"]["name"]
    for status in _containers(pod):
        waiting = status.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message") or warned
        if reason in _PULL:
            image = config.cluster.image
            return PodBlocker(f"pod {name} cannot get its image {image} ({message}). Check cluster.image, and cluster.pull_secrets", False)
        if reason in ("CreateContainerConfigError", "CreateContainerError"):
            return PodBlocker(f"pod {name} cannot be set up ({message}). Create what is missing, or correct cluster.secret_env", False)
    return None


def _hold_of_place(pod: Object, warned: str, config: RunConfig) -> PodBlocker | None:
    name, cluster = pod["metadata"]["name"], config.cluster
    message = next((str(c.get("message")) for c in pod["status"].get("conditions") or () if c.get("reason") == "Unschedulable"), None)
    if message is None:
        return (
            PodBlocker(f"pod {name} is not started yet: {warned}. Wait, or look at kubectl describe pod {name}", True) if warned else None
        )
    if "persistentvolumeclaim" in message and "not found" in message:
        return PodBlocker(f"pod {name} waits for a claim that does not exist ({message}). Create it, or correct cluster.claim", False)
    wanted = {cluster.gpu_resource or "": config.parallel.nproc_per_node, "cpu": cluster.cpu, "memory": cluster.memory}
    asked = ", ".join(f"{key} {value}" for key, value in wanted.items() if key and value)
    return PodBlocker(
        f"no node has room for pod {name} ({message}). It asks for {asked}, and waits. Ask for less, or change "
        "cluster.node_selector and cluster.tolerations",
        True,
    )


def was_evicted(pods: Iterable[Object]) -> str | None:
    """The words on a pod that was taken from its node, rather than failing by itself; None if there is none."""
    for pod in pods:
        status = pod["status"]
        reason = status.get("reason") or ""
        disrupted: Object = next(
            (c for c in status.get("conditions") or () if c.get("type") == "DisruptionTarget" and c.get("status") == "True"), {}
        )
        if reason in _EVICTED or (disrupted and status.get("phase") == "Failed"):
            said = disrupted.get("message") or status.get("message") or ""
            return f"pod {pod['metadata']['name']} was taken from its node ({': '.join(filter(None, (reason, said)))})"
    return None


def failed_first(pods: Iterable[Object]) -> tuple[Object, dict[str, Any]] | None:
    """The pod whose container failed first, and how it ended (a `ContainerStateTerminated`); None if none has failed."""
    ends = [(pod, end) for pod in pods for status in _containers(pod) if (end := ended(status)) and end.get("exitCode")]
    return min(ends, key=lambda found: found[1].get("finishedAt") or "", default=None)


def ended(status: Object) -> dict[str, Any] | None:
    """How a container ended, or the one before it that was started again; None if it never did."""
    return status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated")


def restarts(pod: Object) -> int:
    """How often the pod's container was started again."""
    return sum(status.get("restartCount", 0) for status in _containers(pod))


def describe(pod: Object, end: Object, log: list[str], config: RunConfig) -> str:
    """Why a pod failed.

    Args:
        end: how its container ended.
        log: its last lines, without their times.
    """
    code, reason = end["exitCode"], end.get("reason")
    said: dict[int, list[str]] = {}
    torchrun = []
    for line in log:
        if marked := _RANK.match(line):
            said.setdefault(int(marked[1]), []).append(marked[2])
        else:
            torchrun.append(line)
    found = failure_reason(code, "\n".join(torchrun), {rank: "\n".join(lines) for rank, lines in said.items()})
    name = pod["metadata"]["name"]
    if reason == "OOMKilled":
        limit = config.cluster.memory or "what its node has"
        found = (
            f"it used more memory than it may ({limit}) and was killed. Raise cluster.memory, or lower cluster.shm or "
            f"train.micro_batch_size. {found}"
        )
    return f"pod {name} ended with exit code {code} ({reason or 'no reason given'}): {found}"


def _containers(pod: Object) -> list[dict[str, Any]]:
    return pod["status"].get("containerStatuses") or []


LAST_LINES = 50


_STOPPED = 3  # exit code of a rank that saved its state because it was asked to stop


_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)  # of torchrun's summary of a failure


def failure_reason(code: int, torchrun: str, said: Mapping[int, str]) -> str:
    """The reason of a failure: a rank's own error if there is one, else the last lines of the rank that failed first.

    Args:
        code: torchrun's exit code.
        torchrun: what it said itself.
        said: what each rank said.
    """
    for rank in sorted(said):
        reason = parse_error(said[rank])
        if reason is not None:
            return format_error(reason).removeprefix(ERROR_PREFIX)
    cause = _ROOT_CAUSE.search(torchrun)
    if cause is None:
        return f"torchrun ended with exit code {code}:\n" + tail(torchrun or "\n".join(said.values()))
    rank, exit_code = int(cause[1]), int(cause[2])
    if exit_code == _STOPPED:
        return "training was asked to stop, and its state is saved: the same run goes on from there"
    return f"rank {rank} ended with exit code {exit_code}; its last lines:\n{tail(said.get(rank, ''))}"


def tail(text: str) -> str:
    """The last lines."""
    return "\n".join(text.rstrip().splitlines()[-LAST_LINES:])

"""Why pods do not start and why they ended, from their status, events and logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from canvastune.config import RunConfig
from canvastune.errors import UserError, parse_error
from components.jobs.states import Object

TAIL_LINES = 50
# Reasons to search logs for: `reason=POD...`.
IMAGE_PULL_FAILED = "ImagePullFailed"
CONTAINER_CONFIG_ERROR = "ContainerConfigError"
VOLUME_CLAIM_NOT_FOUND = "VolumeClaimNotFound"
POD_UNSCHEDULABLE = "PodUnschedulable"
POD_NOT_STARTED = "PodNotStarted"
POD_EVICTED = "PodEvicted"
_PULL_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
_CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError")
_EVICTED = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated", "Shutdown")
_STOPPED = 3  # exit code of a rank that saved its state because it was asked to stop
_RANK_LINE = re.compile(r"\[rank (\d+)\]: ?(.*)")
_ROOT_CAUSE = re.compile(  # in torchrun's summary of a failure
    r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL
)


class PodBlocker(NamedTuple):
    """What keeps a pod from running."""

    reason: str
    message: str
    hint: str
    permanent: bool  # only a person's change ends it


def find_blocker(pod: Object, events: list[Object], config: RunConfig) -> PodBlocker | None:
    """Find what keeps a pending pod from running; None if it is not pending or nothing is known."""
    if pod["status"].get("phase") != "Pending":
        return None
    warnings = " ".join(f"{e.get('reason', '')}: {e.get('message', '')}" for e in events[-3:])
    return _container_blocker(pod, warnings, config) or _scheduling_blocker(pod, warnings, config)


def _container_blocker(pod: Object, warnings: str, config: RunConfig) -> PodBlocker | None:
    name = pod["metadata"]["name"]
    for status in _containers(pod):
        waiting = status.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message") or warnings
        if reason in _PULL_REASONS:
            return PodBlocker(
                IMAGE_PULL_FAILED,
                f"pod {name} cannot pull its image {config.cluster.image} ({message})",
                "Check cluster.image and cluster.pull_secrets.",
                permanent=True,
            )
        if reason in _CONFIG_REASONS:
            return PodBlocker(
                CONTAINER_CONFIG_ERROR,
                f"pod {name} cannot create its container ({message})",
                "Create the missing object, or correct cluster.secret_env.",
                permanent=True,
            )
    return None


def _scheduling_blocker(pod: Object, warnings: str, config: RunConfig) -> PodBlocker | None:
    name, cluster = pod["metadata"]["name"], config.cluster
    conditions = pod["status"].get("conditions") or ()
    message = next(
        (str(c.get("message")) for c in conditions if c.get("reason") == "Unschedulable"), None
    )
    if message is None:
        blocker = PodBlocker(
            POD_NOT_STARTED,
            f"pod {name} has not started: {warnings}",
            f"Wait, or look at kubectl describe pod {name}.",
            permanent=False,
        )
        return blocker if warnings else None
    if "persistentvolumeclaim" in message and "not found" in message:
        return PodBlocker(
            VOLUME_CLAIM_NOT_FOUND,
            f"pod {name} waits for a claim that does not exist ({message})",
            "Create the claim, or correct cluster.claim.",
            permanent=True,
        )
    resources = {
        cluster.gpu_resource or "": config.parallel.nproc_per_node,
        "cpu": cluster.cpu,
        "memory": cluster.memory,
    }
    requests = ", ".join(f"{key} {value}" for key, value in resources.items() if key and value)
    return PodBlocker(
        POD_UNSCHEDULABLE,
        f"no node has room for pod {name} ({message}); it requests {requests} and waits",
        "Request less, or change cluster.node_selector and cluster.tolerations.",
        permanent=False,
    )


def find_eviction(pods: Iterable[Object]) -> str | None:
    """Describe the first pod that was evicted rather than failed; None if none was."""
    for pod in pods:
        status = pod["status"]
        reason = status.get("reason") or ""
        conditions = status.get("conditions") or ()
        disruption: Object = next(
            (
                c
                for c in conditions
                if c.get("type") == "DisruptionTarget" and c.get("status") == "True"
            ),
            {},
        )
        if reason in _EVICTED or (disruption and status.get("phase") == "Failed"):
            message = disruption.get("message") or status.get("message") or ""
            why = ": ".join(filter(None, (reason, message)))
            return f"pod {pod['metadata']['name']} was evicted from its node ({why})"
    return None


def first_failure(pods: Iterable[Object]) -> tuple[Object, dict[str, Any]] | None:
    """Find the pod whose container failed first and its ContainerStateTerminated, if any failed."""
    failures = [
        (pod, end)
        for pod in pods
        for status in _containers(pod)
        if (end := terminated_state(status)) and end.get("exitCode")
    ]
    return min(failures, key=lambda failure: failure[1].get("finishedAt") or "", default=None)


def terminated_state(status: Object) -> dict[str, Any] | None:
    """Return how a container, or the one that it replaced, ended; None if neither did."""
    return status.get("state", {}).get("terminated") or status.get("lastState", {}).get(
        "terminated"
    )


def restart_count(pod: Object) -> int:
    """Return how often the pod's containers were restarted."""
    return sum(status.get("restartCount", 0) for status in _containers(pod))


def describe(pod: Object, end: Object, log: list[str], config: RunConfig) -> UserError:
    """Return the error of a failed pod.

    Args:
        end: how its container ended (a ContainerStateTerminated).
        log: its last lines, without timestamps.
    """
    code, reason = end["exitCode"], end.get("reason")
    ranks: dict[int, list[str]] = {}
    torchrun = []
    for line in log:
        if match := _RANK_LINE.match(line):
            ranks.setdefault(int(match[1]), []).append(match[2])
        else:
            torchrun.append(line)
    outputs = {rank: "\n".join(lines) for rank, lines in ranks.items()}
    error = failure_reason(code, "\n".join(torchrun), outputs)
    message, hint = str(error), error.hint
    if reason == "OOMKilled":
        limit = config.cluster.memory or "its node's memory"
        message = f"it exceeded its memory limit ({limit}) and was killed. {message}"
        hint = "Raise cluster.memory, or lower cluster.shm or train.micro_batch_size."
    name = pod["metadata"]["name"]
    return UserError(
        f"pod {name} exited with code {code} ({reason or 'no reason given'}): {message}",
        hint=hint or "Fix the cause and start the same run again: it resumes from its checkpoints.",
    )


def failure_reason(exit_code: int, torchrun: str, ranks: Mapping[int, str]) -> UserError:
    """Return a rank's own error if one printed any, else the tail of the rank that failed first.

    Args:
        exit_code: torchrun's.
        torchrun: torchrun's own output.
        ranks: the output of each rank.
    """
    for rank in sorted(ranks):
        error = parse_error(ranks[rank])
        if error is not None:
            return error
    cause = _ROOT_CAUSE.search(torchrun)
    if cause is None:
        output = torchrun or "\n".join(ranks.values())
        return UserError(f"torchrun exited with code {exit_code}; its last lines:\n{tail(output)}")
    rank, rank_code = int(cause[1]), int(cause[2])
    if rank_code == _STOPPED:
        return UserError(
            "training was asked to stop and saved its state",
            hint="Start the same run again: it resumes from there.",
        )
    output = tail(ranks.get(rank, ""))
    return UserError(f"rank {rank} exited with code {rank_code}; its last lines:\n{output}")


def tail(text: str) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])


def _containers(pod: Object) -> list[dict[str, Any]]:
    return pod["status"].get("containerStatuses") or []

"""Why pods do not start and why they ended, from their status, events and logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from canvastune.config import RunConfig
from canvastune.errors import UserError, parse_error
from components.jobs.states import KINDS, Object, conditions

TAIL_LINES = 50
# Reasons to search logs for: `reason=POD...`.
IMAGE_PULL_FAILED = "ImagePullFailed"
CONTAINER_CONFIG_ERROR = "ContainerConfigError"
CONTAINER_FAILS = "ContainerFails"
VOLUME_CLAIM_NOT_FOUND = "VolumeClaimNotFound"
POD_UNSCHEDULABLE = "PodUnschedulable"
POD_NOT_STARTED = "PodNotStarted"
POD_EVICTED = "PodEvicted"
_PULL_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
_CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError")
_CRASHES = "CrashLoopBackOff"
_ADDED = (
    "Canvastune does not add this container: an admission webhook, the operator or the "
    "TrainingRuntime does. Ask its owner to correct it, or to leave these pods out."
)
_EVICTED = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated", "Shutdown")
_OWN = frozenset(kind.container for kind in KINDS.values())  # names of containers
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
    permanent: bool = True  # only a person's change ends it


def find_blocker(pod: Object, events: list[Object], config: RunConfig) -> PodBlocker | None:
    """Find what keeps a pending pod from running; None if it is not pending or nothing is known."""
    if pod["status"].get("phase") != "Pending":
        return None
    warnings = " ".join(f"{e.get('reason', '')}: {e.get('message', '')}" for e in events[-3:])
    return _container_blocker(pod, warnings, config) or _scheduling_blocker(pod, warnings, config)


def _container_blocker(pod: Object, warnings: str, config: RunConfig) -> PodBlocker | None:
    name = pod["metadata"]["name"]
    for status in containers(pod):
        waiting = status.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message") or warnings
        own = status["name"] in _OWN
        if reason in _PULL_REASONS:
            image = config.cluster.image if own else status.get("image", "")
            return PodBlocker(
                IMAGE_PULL_FAILED,
                f"pod {name} cannot pull its image {image} ({message})"
                if own
                else f"pod {name} cannot pull the image {image} of {status['name']} ({message})",
                "Check cluster.image and cluster.pull_secrets." if own else _ADDED,
            )
        if reason in _CONFIG_REASONS:
            return PodBlocker(
                CONTAINER_CONFIG_ERROR,
                f"pod {name} cannot create its container {status['name']} ({message})",
                "Create the missing object, or correct cluster.secret_env." if own else _ADDED,
            )
        if reason == _CRASHES and not own:  # ours is restarted, and resumes
            return PodBlocker(
                CONTAINER_FAILS,
                f"pod {name} waits for its container {status['name']}, which fails again and again "
                f"({message})",
                f"Look at kubectl logs {name} -c {status['name']}. {_ADDED}",
            )
    return None


def _scheduling_blocker(pod: Object, warnings: str, config: RunConfig) -> PodBlocker | None:
    name, cluster = pod["metadata"]["name"], config.cluster
    message = next(
        (str(c.get("message")) for c in conditions(pod) if c.get("reason") == "Unschedulable"), None
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
        disrupted = (
            c
            for c in conditions(pod)
            if c.get("type") == "DisruptionTarget" and c.get("status") == "True"
        )
        disruption: Object = next(disrupted, {})
        if reason in _EVICTED or (disruption and status.get("phase") == "Failed"):
            message = disruption.get("message") or status.get("message") or ""
            why = ": ".join(filter(None, (reason, message)))
            return f"pod {pod['metadata']['name']} was evicted from its node ({why})"
    return None


def first_failure(pods: Iterable[Object]) -> tuple[Object, Object] | None:
    """Find the pod whose container failed first and its status, if any failed.

    One of ours counts before one that something else added, such as a sidecar that is stopped.
    """
    failures = [
        (pod, status)
        for pod in pods
        for status in containers(pod)
        if (terminated_state(status) or {}).get("exitCode")
    ]
    return min(failures, key=_order, default=None)


def _order(failure: tuple[Object, Object]) -> tuple[bool, str]:
    _, status = failure
    end = terminated_state(status) or {}
    return status["name"] not in _OWN, end.get("finishedAt") or ""


def own_containers(pod: Object) -> list[dict[str, Any]]:
    """Return the statuses of the containers with our processes."""
    return [status for status in containers(pod) if status["name"] in _OWN]


def terminated_state(status: Object) -> dict[str, Any] | None:
    """Return how a container, or the one that it replaced, ended; None if neither did."""
    return status.get("state", {}).get("terminated") or status.get("lastState", {}).get(
        "terminated"
    )


def restart_count(pod: Object) -> int:
    """Return how often our processes in the pod were restarted."""
    return sum(status.get("restartCount", 0) for status in own_containers(pod))


def describe(pod: Object, status: Object, log: list[str], config: RunConfig) -> UserError:
    """Return the error of a failed pod.

    Args:
        status: of the container that failed.
        log: its last lines, without timestamps.
    """
    end = terminated_state(status) or {}
    code, reason, name = end.get("exitCode"), end.get("reason"), pod["metadata"]["name"]
    if status["name"] not in _OWN:
        last = tail("\n".join(log))
        return UserError(
            f"pod {name}: its container {status['name']} exited with code {code} "
            f"({reason or 'no reason given'}); its last lines:\n{last}",
            hint=_ADDED,
        )
    ranks: dict[int, list[str]] = {}
    torchrun = []
    for line in log:
        if match := _RANK_LINE.match(line):
            ranks.setdefault(int(match[1]), []).append(match[2])
        else:
            torchrun.append(line)
    outputs = {rank: "\n".join(lines) for rank, lines in ranks.items()}
    error = failure_reason(end["exitCode"], "\n".join(torchrun), outputs)
    message, hint = str(error), error.hint
    if reason == "OOMKilled":
        limit = config.cluster.memory or "its node's memory"
        message = f"it exceeded its memory limit ({limit}) and was killed. {message}"
        hint = "Raise cluster.memory, or lower cluster.shm or train.micro_batch_size."
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
    rank = int(cause[1])
    return rank_failure(rank, int(cause[2]), ranks.get(rank, ""))


def rank_failure(rank: int, exit_code: int, output: str) -> UserError:
    """Return the error that a rank printed, else its exit code and last lines."""
    if error := parse_error(output):
        return error
    if exit_code == _STOPPED:
        return UserError(
            "training was asked to stop and saved its state",
            hint="Start the same run again: it resumes from there.",
        )
    return UserError(f"rank {rank} exited with code {exit_code}; its last lines:\n{tail(output)}")


def tail(text: str) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])


def containers(pod: Object) -> list[dict[str, Any]]:
    """Return the statuses of a pod's containers, init containers first."""
    kinds = ("initContainerStatuses", "containerStatuses")
    return [status for kind in kinds for status in pod["status"].get(kind) or ()]

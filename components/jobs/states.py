"""What a training job's status means, and what the launcher does then: one row per state, for a PyTorchJob and for a TrainJob."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Object = Mapping[str, Any]  # a Kubernetes object as its JSON has it


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of training job."""

    kind: str
    group: str
    version: str
    plural: str
    first_pod: Mapping[str, str]  # labels that the pod of rank 0 has beside the job's own
    operator: str  # what has to be installed

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"


PYTORCHJOB = Kind(
    kind="PyTorchJob",
    group="kubeflow.org",
    version="v1",
    plural="pytorchjobs",
    first_pod={"training.kubeflow.org/replica-index": "0"},
    operator="Kubeflow's training operator (v1.9)",
)
TRAINJOB = Kind(
    kind="TrainJob",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    plural="trainjobs",
    first_pod={"batch.kubernetes.io/job-completion-index": "0"},
    operator="Kubeflow Trainer (v2.3)",
)
KINDS = {"pytorchjob": PYTORCHJOB, "trainjob": TRAINJOB}


class State(enum.StrEnum):
    """Where a job stands."""

    CREATED = "Created"
    QUEUED = "Queued"
    PENDING = "Pending"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    DELETED = "Deleted"
    UNKNOWN = "Unknown"


class Action(enum.Enum):
    """What the launcher does."""

    WAIT_FOR_PODS = enum.auto()  # for at most cluster.queue_hours, and says what holds the pods up
    WAIT_FOR_END = enum.auto()  # for at most cluster.deadline_hours, and passes rank 0's words on
    TAKE_RESULT = enum.auto()
    EXPLAIN = enum.auto()  # fails with the reason; pods that were evicted are replaced by a new job
    SAY_DELETED = enum.auto()


class Transition(NamedTuple):
    """A state, when a job that is there is in it, what the launcher does, and what it says on entering it."""

    state: State
    holds: Callable[[Object], bool]
    then: Action
    says: str


def _condition(*types: str) -> Callable[[Object], bool]:
    return lambda job: any(c.get("type") in types and c.get("status") == "True" for c in _conditions(job))


def _count(*counters: str) -> Callable[[Object], bool]:
    """Whether a TrainJob's status counts a job of the set as one of these."""
    return lambda job: any(row.get(name, 0) for row in job.get("status", {}).get("jobsStatus") or () for name in counters)


def _silent(job: Object) -> bool:
    """Nobody has said anything about the job yet, or only that it is no longer suspended."""
    return all(c.get("type") == "Suspended" and c.get("status") == "False" for c in _conditions(job))


def _suspended(job: Object) -> bool:
    return _condition("Suspended")(job) or bool((job["spec"].get("runPolicy") or job["spec"]).get("suspend"))


# The first row that holds is the job's state. An end outweighs what else the status still says of the time before.
_TABLE = (
    Transition(State.SUCCEEDED, _condition("Succeeded", "Complete"), Action.TAKE_RESULT, "the job has finished"),
    Transition(State.FAILED, _condition("Failed"), Action.EXPLAIN, "the job has failed"),
    Transition(State.QUEUED, _suspended, Action.WAIT_FOR_PODS, "queued: the job is suspended until its queue admits it"),
    Transition(
        State.RESTARTING,
        lambda job: _condition("Restarting")(job) or _count("failed")(job),
        Action.WAIT_FOR_PODS,
        "restarting: pods ended and are started again; training goes on from its newest checkpoint",
    ),
    Transition(State.RUNNING, lambda job: _condition("Running")(job) or _count("ready")(job), Action.WAIT_FOR_END, "running"),
    Transition(
        State.PENDING,
        lambda job: _condition("Created")(job) or _count("active")(job),
        Action.WAIT_FOR_PODS,
        "pending: the pods wait for nodes, images and volumes",
    ),
    Transition(State.CREATED, _silent, Action.WAIT_FOR_PODS, "created: the operator has not answered yet"),
)
_DELETED = Transition(State.DELETED, lambda _: False, Action.SAY_DELETED, "the job was deleted")
_UNKNOWN = Transition(State.UNKNOWN, lambda _: True, Action.WAIT_FOR_PODS, "unknown: the job's status says nothing that the launcher knows")
ROWS = (*_TABLE, _DELETED, _UNKNOWN)


def transition_for(job: Object | None, uid: str | None = None) -> Transition:
    """The row of the table that a job's status is in.

    Args:
        job: the object as the API server gives it; None: there is none of that name.
        uid: of the job that is meant; another one under its name means that it was deleted.
    """
    if job is None or (uid is not None and job["metadata"]["uid"] != uid):
        return _DELETED
    return next((row for row in _TABLE if row.holds(job)), _UNKNOWN)


def last_message(job: Object) -> str:
    """The operator's own words on the newest condition that is true, as `reason: message`; "" if it has none."""
    for condition in reversed(_conditions(job)):
        if condition.get("status") == "True":
            return ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    return ""


def _conditions(job: Object) -> list[dict[str, Any]]:
    return (job.get("status") or {}).get("conditions") or []

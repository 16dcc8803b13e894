"""What a training job's status means, and what the launcher does then: one row per state."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from components.versions import TRAINER, TRAINING_OPERATOR, Floor

Object = Mapping[str, Any]  # a Kubernetes object, as in its JSON


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of training job."""

    kind: str
    group: str
    version: str
    plural: str
    container: str  # of the processes, in each pod; webhooks may add others
    first_pod: Mapping[str, str]  # labels of rank 0's pod, in addition to the job's own
    floor: Floor  # what must be installed
    newest_fields: tuple[str, ...]  # dotted, below the spec: an older operator's CRD lacks them

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"

    @property
    def operator(self) -> str:
        """Return what must be installed, as part of a sentence."""
        return f"{'the ' if self.floor is TRAINING_OPERATOR else ''}{self.floor}"


_POD_OF_PATCH = "trainingRuntimeSpec.template.spec.replicatedJobs.template.spec.template.spec"
PYTORCHJOB = Kind(
    kind="PyTorchJob",
    group="kubeflow.org",
    version="v1",
    plural="pytorchjobs",
    container="pytorch",
    first_pod={"training.kubeflow.org/replica-index": "0"},
    floor=TRAINING_OPERATOR,
    newest_fields=("nprocPerNode",),
)
TRAINJOB = Kind(
    kind="TrainJob",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    plural="trainjobs",
    container="node",
    first_pod={"batch.kubernetes.io/job-completion-index": "0"},
    floor=TRAINER,
    newest_fields=(
        "activeDeadlineSeconds",
        f"runtimePatches.{_POD_OF_PATCH}.terminationGracePeriodSeconds",
    ),
)
KINDS = {"pytorchjob": PYTORCHJOB, "trainjob": TRAINJOB}


class State(enum.StrEnum):
    """The state of a job; the launcher logs it as `reason=JobSTATE`."""

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

    WAIT_FOR_PODS = enum.auto()  # at most cluster.queue_hours; logs what blocks the pods
    WAIT_FOR_END = enum.auto()  # at most cluster.deadline_hours; relays rank 0's log
    COLLECT_RESULT = enum.auto()
    EXPLAIN_FAILURE = enum.auto()  # fails with the reason; replaces the job if pods were evicted
    REPORT_DELETED = enum.auto()


class Transition(NamedTuple):
    """A state, which jobs are in it, what the launcher does, and what it logs on entering it."""

    state: State
    matches: Callable[[Object], bool]
    action: Action
    message: str


def _condition(*types: str) -> Callable[[Object], bool]:
    return lambda job: any(
        c.get("type") in types and c.get("status") == "True" for c in conditions(job)
    )


def _count(*counters: str) -> Callable[[Object], bool]:
    """Return a test for a TrainJob whose status counts a job of its set under a counter."""
    return lambda job: any(
        row.get(name, 0)
        for row in job.get("status", {}).get("jobsStatus") or ()
        for name in counters
    )


def _has_no_conditions(job: Object) -> bool:
    """Return whether the job has no conditions yet, or only that it is no longer suspended."""
    return all(c.get("type") == "Suspended" and c.get("status") == "False" for c in conditions(job))


def _is_suspended(job: Object) -> bool:
    return _condition("Suspended")(job) or bool(
        (job["spec"].get("runPolicy") or job["spec"]).get("suspend")
    )


# The first row that matches is the job's state: an end outweighs older conditions in the status.
_TABLE = (
    Transition(
        State.SUCCEEDED,
        _condition("Succeeded", "Complete"),
        Action.COLLECT_RESULT,
        "the job has finished",
    ),
    Transition(State.FAILED, _condition("Failed"), Action.EXPLAIN_FAILURE, "the job has failed"),
    Transition(
        State.QUEUED,
        _is_suspended,
        Action.WAIT_FOR_PODS,
        "queued: the job is suspended until its queue admits it",
    ),
    Transition(
        State.RESTARTING,
        lambda job: _condition("Restarting")(job) or _count("failed")(job),
        Action.WAIT_FOR_PODS,
        "restarting: pods exited and are restarted; training resumes from its newest checkpoint",
    ),
    Transition(
        State.RUNNING,
        lambda job: _condition("Running")(job) or _count("ready")(job),
        Action.WAIT_FOR_END,
        "running",
    ),
    Transition(
        State.PENDING,
        lambda job: _condition("Created")(job) or _count("active")(job),
        Action.WAIT_FOR_PODS,
        "pending: the pods wait for nodes, images and volumes",
    ),
    Transition(
        State.CREATED,
        _has_no_conditions,
        Action.WAIT_FOR_PODS,
        "created: the operator has not responded yet",
    ),
)
_DELETED = Transition(State.DELETED, lambda _: False, Action.REPORT_DELETED, "the job was deleted")
_UNKNOWN = Transition(
    State.UNKNOWN,
    lambda _: True,
    Action.WAIT_FOR_PODS,
    "unknown: the launcher knows none of the conditions in the job's status",
)
TRANSITIONS = (*_TABLE, _DELETED, _UNKNOWN)


def transition_for(job: Object | None, uid: str | None = None) -> Transition:
    """Return the row of the table that a job's status matches.

    Args:
        job: the object from the API server; None: no job has that name.
        uid: of the expected job; another one under its name means that it was deleted.
    """
    if job is None or (uid is not None and job["metadata"]["uid"] != uid):
        return _DELETED
    return next((row for row in _TABLE if row.matches(job)), _UNKNOWN)


def last_message(job: Object) -> str:
    """Return the newest true condition as the operator's `reason: message`; "" if it has none."""
    for condition in reversed(conditions(job)):
        if condition.get("status") == "True":
            return ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    return ""


def conditions(one: Object) -> list[dict[str, Any]]:
    """Return the conditions in the status of a job, a pod or another object."""
    return (one.get("status") or {}).get("conditions") or []

"""Why a job has no pods: events on it and on what owns its pods, and its place in Kueue's queue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from canvastune.config import RunConfig
from canvastune.config.cluster import parse_quantity
from components.jobs.pod_diagnostics import PodBlocker
from components.jobs.states import Kind, Object, conditions

# Reasons to search logs for: `reason=POD...`.
QUOTA = "QuotaRefusesPods"
NOT_FOUND = "ObjectNotFound"
JOB_WARNING = "JobWarning"
OPERATOR_SILENT = "OperatorSilent"
WAITING_IN_QUEUE = "WaitingInQueue"
QUEUE_REFUSES = "QueueRefusesJob"
NOT_RESUMED = "JobNotResumed"
_RESUME_SECONDS = 60.0  # in which Kueue resumes a job that it has admitted
# Kueue's reasons of warnings on a job for which it makes no Workload.
_NO_WORKLOAD = ("PriorityClassNotFound", "ErrWorkloadCompose")


class Refusal(NamedTuple):
    """A kind of message that says why pods or a job are refused, as refusals.yaml has it."""

    pattern: re.Pattern[str]
    hint: str  # with {0} for the first group of the pattern
    reason: str = ""
    permanent: bool = True


def read_refusals(kind: str) -> tuple[Refusal, ...]:
    """Read a list of refusals.yaml: "training", "queue" or "steps"."""
    text = Path(__file__).with_name("refusals.yaml").read_text(encoding="utf-8")
    return tuple(
        Refusal(re.compile(each.pop("pattern"), re.IGNORECASE | re.DOTALL), **each)
        for each in yaml.safe_load(text)[kind]
    )


_MUST_SPECIFY = re.compile(r"failed quota: (\S+): must specify (.+)", re.DOTALL)
_EXCEEDED = re.compile(
    r"exceeded quota: (\S+), requested: (.+?), used: (.+?), limited: (.+)", re.DOTALL
)
_REFUSALS, _QUEUE_REFUSALS = read_refusals("training"), read_refusals("queue")
_CREATING = re.compile(
    r'^.*?(?:pods?|jobs?\S*) "[^"]*" (?:is forbidden|is invalid): ', re.IGNORECASE | re.DOTALL
)


def find_job_blocker(
    events: Iterable[Object], config: RunConfig, silent: Kind | None = None
) -> PodBlocker | None:
    """Find why a job's pods are not created; None if nothing says so.

    Args:
        events: warnings about the job and the objects between it and its pods, the newest last.
        silent: the kind of a job to which its operator has not responded for a while.
    """
    found = [_explain(event, config) for event in events]
    if not found and silent is not None:
        return PodBlocker(
            OPERATOR_SILENT,
            f"no operator has responded to the {silent.kind} for over a minute",
            f"Check that {silent.operator} runs: kubectl get pods -A.",
            permanent=False,
        )
    return next((b for b in reversed(found) if b.permanent), found[-1] if found else None)


def _explain(event: Object, config: RunConfig) -> PodBlocker:
    message = " ".join(str(event.get("message") or event.get("reason") or "").split())
    about = event.get("involvedObject") or {}
    what = f"{about.get('kind', 'job')} {about.get('name', '')}".rstrip()
    # Jobs give each attempt's pod another name: without it, the same cause is the same message.
    cause = _CREATING.sub("", message)
    if match := _MUST_SPECIFY.search(message):
        keys = _quota_settings(match[2])
        return PodBlocker(
            QUOTA,
            f"the namespace's quota refuses the pods of {what} ({cause})",
            f"Set {_joined(f'cluster.{key}' for key in keys)} "
            f"(chart: {_joined(f'training.{key}' for key in keys)}).",
        )
    if match := _EXCEEDED.search(message):
        return _exceeded(what, match, cause, config)
    for refusal in _REFUSALS:
        if match := refusal.pattern.search(message):
            group = next((group for group in match.groups() if group), "")
            return PodBlocker(
                refusal.reason,
                f"the pods of {what} are refused ({cause})",
                refusal.hint.format(group),
                refusal.permanent,
            )
    return PodBlocker(
        JOB_WARNING,
        f"{what} reports {event.get('reason') or 'a warning'} ({message})",
        f"Wait, or look at kubectl describe {what.lower().replace(' ', '/')}.",
        permanent=False,
    )


def _quota_settings(listed: str) -> list[str]:
    """Return the settings for resources as in `limits.cpu for: a,b; cpu for: a` or `cpu,memory`."""
    names = [name for part in listed.split(";") for name in part.partition(" for:")[0].split(",")]
    settings = []
    for name in filter(None, map(str.strip, names)):
        kind, _, resource = name.partition(".")
        given = (kind, resource) if kind in ("limits", "requests") else ("requests", name)
        settings.append("resources.{}.{}".format(*given))
    return settings


def _exceeded(what: str, match: re.Match[str], cause: str, config: RunConfig) -> PodBlocker:
    requested, limited = _amounts(match[2]), _amounts(match[4])
    pods = config.cluster.nodes
    never = [
        name
        for name, amount in requested.items()
        if name in limited and pods * amount > limited[name]
    ]
    if never:
        return PodBlocker(
            QUOTA,
            f"the quota {match[1]} never has room for the pods of {what}: {_joined(never)} of "
            f"{pods} {'pod' if pods == 1 else 'pods'} exceeds its limit ({cause})",
            "Request less (cluster.nodes, parallel.nproc_per_node, cluster.resources, cluster.cpu, "
            "cluster.memory), or have the quota raised.",
        )
    return PodBlocker(
        QUOTA,
        f"the quota {match[1]} has no room for the pods of {what} at present ({cause})",
        "Wait until others release what they use, or request less.",
        permanent=False,
    )


def _amounts(listed: str) -> dict[str, float]:
    """Return quantities such as `limits.cpu=32,requests.memory=1Gi`; others are left out."""
    amounts = {}
    for pair in listed.split(","):
        name, _, quantity = pair.strip().partition("=")
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?", quantity):
            amounts[name] = parse_quantity(quantity)
    return amounts


def _joined(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def find_queue_blocker(
    job: Object,
    workloads: list[Object],
    config: RunConfig,
    silent: bool = False,
    events: Iterable[Object] = (),
    now: float = 0.0,
) -> PodBlocker | None:
    """Find what a suspended job waits for, and since when; None if Kueue has just admitted it.

    Args:
        workloads: Kueue's objects for the job.
        silent: the job has been suspended for a while.
        events: warnings about the job, the newest last.
        now: seconds since 1970.
    """
    queue, kind = config.cluster.queue, job["kind"]
    if not workloads:
        return _without_workload(kind, config, silent, events)
    waiting = [w for w in workloads if not _holds(w, "Admitted") and not _holds(w, "Finished")]
    if not waiting:
        since = str((_condition(workloads[0], "Admitted") or {}).get("lastTransitionTime") or "")
        if not since or now - datetime.fromisoformat(since).timestamp() < _RESUME_SECONDS:
            return None
        warnings = [" ".join(f"{e.get('reason')}: {e.get('message')}".split()) for e in events]
        return PodBlocker(
            NOT_RESUMED,
            f"Kueue has admitted the {kind} at {since}, but it is still suspended"
            + "".join(f" ({warning})" for warning in warnings[-1:]),
            f"Check Kueue's log, and that the queue's flavors name nodes that exist: kubectl "
            f"describe workload {workloads[0]['metadata']['name']}.",
            permanent=False,
        )
    workload = waiting[0]
    name, status = workload["metadata"]["name"], workload.get("status") or {}
    where = f"LocalQueue {(workload.get('spec') or {}).get('queueName') or queue}"
    if (workload.get("spec") or {}).get("active") is False:
        return PodBlocker(
            QUEUE_REFUSES,
            f"Kueue's Workload {name} was deactivated in {where}{_why(workload, 'Evicted')}",
            "Start the run again once its cause is fixed, or set spec.active of the Workload.",
        )
    checks = [
        f"admission check {check.get('name')} is {str(check.get('state', '')).lower()}"
        f"{': ' + check['message'] if check.get('message') else ''}"
        for check in status.get("admissionChecks") or ()
        if check.get("state") != "Ready"
    ]
    condition: Mapping[str, Any] = _condition(workload, "QuotaReserved") or {}
    text = "; ".join(checks) if condition.get("status") == "True" else ""
    text = text or str(condition.get("message") or "Kueue has not looked at it yet")
    since = workload["metadata"].get("creationTimestamp") or job["metadata"].get(
        "creationTimestamp", ""
    )
    message = f"queued in {where} since {since}: {' '.join(text.split())}"
    for refusal in _QUEUE_REFUSALS:
        if refusal.pattern.search(f"{condition.get('reason', '')} {text}"):
            return PodBlocker(QUEUE_REFUSES, message, refusal.hint)
    hint = f"Wait, or look at kubectl describe workload {name}."
    return PodBlocker(WAITING_IN_QUEUE, message, hint, permanent=False)


def _without_workload(
    kind: str, config: RunConfig, silent: bool, events: Iterable[Object]
) -> PodBlocker | None:
    """Find why Kueue has no Workload for a suspended job."""
    reasons = [e for e in events if str(e.get("reason", "")).endswith(_NO_WORKLOAD)]
    if reasons:
        missing = str(reasons[-1]["reason"]).endswith("PriorityClassNotFound")
        message = " ".join(str(reasons[-1].get("message", "")).split())
        return PodBlocker(
            NOT_FOUND if missing else QUEUE_REFUSES,
            f"Kueue makes no Workload for the {kind} ({reasons[-1]['reason']}: {message})",
            "Create the priority class, or correct cluster.priority_class (chart: "
            "training.priorityClassName)."
            if missing
            else "Correct what the message names.",
        )
    if not silent:
        return None
    if config.cluster.queue is None:
        return PodBlocker(
            JOB_WARNING,
            f"the {kind} is suspended, but not in a queue",
            "Resume it (suspend: false), or name its queue in cluster.queue.",
            permanent=False,
        )
    priority = config.cluster.priority_class
    return PodBlocker(
        JOB_WARNING,
        f"the {kind} is suspended, but Kueue has no Workload for it",
        f"Check that Kueue runs and manages {kind}s (integrations.frameworks of its "
        "configuration), "
        + (f"that WorkloadPriorityClass {priority} exists, " if priority else "")
        + "and that this account may list workloads.kueue.x-k8s.io.",
        permanent=False,
    )


def _condition(workload: Object, name: str) -> Mapping[str, Any] | None:
    return next((c for c in conditions(workload) if c.get("type") == name), None)


def _holds(workload: Object, name: str) -> bool:
    return (_condition(workload, name) or {}).get("status") == "True"


def _why(workload: Object, name: str) -> str:
    message = (_condition(workload, name) or {}).get("message")
    return f" ({message})" if message else ""

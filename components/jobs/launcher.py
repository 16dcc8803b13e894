"""Run a step's work as one job on Kubernetes: create or adopt it, wait, explain its failure."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from components.jobs import job_diagnostics, pod_diagnostics
from components.jobs.backends import SPEC_HASH, JobContext, manifest
from components.jobs.client import Conflict, KubernetesClient
from components.jobs.log_stream import LogStream
from components.jobs.pod_diagnostics import POD_EVICTED, TAIL_LINES, PodBlocker
from components.jobs.pod_spec import ROLE, RUN_ID, run_label
from components.jobs.preflight import check_prerequisites
from components.jobs.pruned_fields import pruned_fields
from components.jobs.states import (
    KINDS,
    Action,
    Object,
    State,
    Transition,
    last_message,
    transition_for,
)
from components.versions import KUEUE

logger = logging.getLogger(__name__)

_POLL_SECONDS = 5.0
_LOOK_SECONDS = 30.0  # between two looks at what lies between a job and its pods
_SILENT_SECONDS = 60.0  # after which an operator that does not respond is named
_BLOCKED_SECONDS = 300.0  # a permanent blocker ends the wait: registries and webhooks can recover
_DELETION_SECONDS = 900.0  # for the pods of a deleted job to exit
_EXIT_TASK_TIMEOUT = 120.0  # seconds for which a run's exit task retries calls
_SIGTERM_TIMEOUT = 5.0  # seconds for which a step that is being killed retries calls


def run_job(
    config: RunConfig, context: JobContext, result: Path, task: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Do a step's work in the pods of a job.

    Args:
        context: its `environment` may hold secrets, which are removed.
        result: the last file that the work writes; if it exists, the work is done.
        task: pod settings of the pipeline's task (the fields of `dsl.TaskConfig`).

    Returns:
        The job's name and image (with its digest, if the pods report it), as tags; {} if the work
        was done already.

    Raises:
        UserError: the work failed or could not start.
    """
    if result.is_file():
        logger.info(f"already finished: {result} exists")
        return {}
    context = replace(context, environment=_without_secrets(context.environment))
    manifest(config, context, task)  # reports invalid settings before any call
    api = KubernetesClient.from_environment(KINDS[config.cluster.backend])
    tags = launch(api, config, context, task)
    if not result.is_file():
        raise UserError(
            f"{result}: the job has finished, but this step does not see its result",
            hint="Mount the same claim in this step and in the job's pods.",
        )
    return tags


def copy_to_workspace(dataset: Path, run_directory: Path) -> Path:
    """Copy the prepared data to where the pods see it: only this step mounts pipeline artifacts."""
    copy = run_directory / "train" / "data"
    if not copy.exists():
        with atomic_directory(copy) as partial:
            shutil.copytree(dataset, partial, dirs_exist_ok=True)
    return copy


def launch(
    api: KubernetesClient,
    config: RunConfig,
    context: JobContext,
    task: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Create the run's job, or adopt the existing one, and return its tags once it has succeeded.

    Raises:
        UserError: see `run_job`.
        KeyboardInterrupt: (also on SIGTERM) the job is deleted if its run is being ended.
    """
    own_pod = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME")
    owner = _find_workflow(api, own_pod) if own_pod else None
    job = manifest(config, replace(context, owner=owner), task)
    check_prerequisites(api, config, job)
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _Launcher(api, config, job).run()
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def delete_jobs(config: RunConfig, run_id: str) -> None:
    """Delete the unfinished jobs of a run that has ended; errors are only logged.

    Finished jobs are kept, for their logs.
    """
    if config.cluster.backend == "local":
        return
    kind = KINDS[config.cluster.backend]
    try:
        api = KubernetesClient.from_environment(kind)
        api.timeout = _EXIT_TASK_TIMEOUT
        for job in api.jobs(f"{RUN_ID}={run_label(run_id)}"):
            finished = Action.COLLECT_RESULT, Action.EXPLAIN_FAILURE
            if transition_for(job).action not in finished:
                name = job["metadata"]["name"]
                api.delete(name)
                logger.info(f"{kind.kind} {name}: deleted, because its run has ended")
    except UserError as error:
        logger.warning(f"could not look for unfinished jobs of this run: {error}")


class _Launcher:
    def __init__(self, api: KubernetesClient, config: RunConfig, job: Mapping[str, Any]) -> None:
        self._api, self._config, self._manifest, self._clock = api, config, job, api.clock
        self._kind = KINDS[config.cluster.backend]
        self._name, self._labels = job["metadata"]["name"], job["metadata"]["labels"]
        self._uid, self._current = "", None  # type: str, Transition | None
        self._previous_state, self._was_running, self._restarts = State.CREATED, False, 0
        self._waiting_since = self._clock.time()  # for pods, or for the end
        self._blocker: PodBlocker | None = None
        self._blocked_since = 0.0
        self._job_blocker: PodBlocker | None = None
        self._looked_at = 0.0
        self._queue_checked = False
        self._log_stream = LogStream(
            api, self._selector(self._kind.first_pod), self._kind.container
        )

    def run(self) -> dict[str, str]:
        try:
            self._create_or_adopt()
            while not self._poll():
                self._clock.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            self._handle_interrupt()
            raise
        cluster = self._config.cluster
        pods = self._api.pods(self._selector())
        statuses = [s for pod in pods for s in pod_diagnostics.own_containers(pod)]
        image = next((s["imageID"] for s in statuses if s.get("imageID")), cluster.image)
        if cluster.backend == "trainjob" and cluster.ttl_hours is not None:
            self._api.delete(self._name)  # a TrainJob has no TTL
        return {
            "canvastune.job": f"{self._api.namespace}/{self._name}",
            "canvastune.image": image,
        }

    # --- one job, never two

    def _create_or_adopt(self) -> None:
        for other in self._api.jobs(self._selector()):
            name = other["metadata"]["name"]
            if name != self._name:
                logger.info(
                    f"{self._kind.kind} {name}: deleting it: it belongs to this run, but has other settings"
                )
                self._delete(name)
        while True:
            try:
                job = self._api.create(self._manifest)
                self._log(f"created in namespace {self._api.namespace}")
                self._refuse_pruned(job)
            except Conflict:
                existing = self._api.job(self._name)
                if existing is None or not self._adopt_or_delete(existing):
                    continue
                job = existing
            self._uid, self._current = job["metadata"]["uid"], None
            self._waiting_since = self._clock.time()
            return

    def _refuse_pruned(self, job: Object) -> None:
        """Delete a job of which the API server did not store everything, and say what."""
        pruned = pruned_fields(self._manifest["spec"], job["spec"], "spec")
        if pruned:
            others = f" and {len(pruned) - 3} more" if len(pruned) > 3 else ""
            self._give_up(
                f"the API server did not store {', '.join(pruned[:3])}{others}: the installed "
                f"{self._kind.kind} ({self._kind.api_version}) does not have these fields",
                f"Install {self._kind.operator} or newer, with its CRDs, or choose another "
                "cluster.backend.",
            )

    def _adopt_or_delete(self, job: Object) -> bool:
        """Return True to adopt the existing job; otherwise delete it and return False."""
        meta = job["metadata"]
        run_id, annotations = meta.get("labels", {}).get(RUN_ID), meta.get("annotations", {})
        spec_hash = self._manifest["metadata"]["annotations"][SPEC_HASH]
        if (run_id, annotations.get(SPEC_HASH)) != (self._labels[RUN_ID], spec_hash):
            resource = f"{self._kind.plural}.{self._kind.group}"
            raise UserError(
                f"{self._kind.kind} {self._name}: exists in namespace {self._api.namespace}, but "
                "does not belong to this run; it was not changed",
                hint="If it is not needed, delete it "
                f"(kubectl delete {resource} {self._name}), or start a new run.",
            )
        if meta.get("deletionTimestamp"):
            self._log("being deleted; waiting for its pods to exit")
            self._wait_until_deleted(self._name)
            return False
        if transition_for(job).action is Action.EXPLAIN_FAILURE:
            self._log(
                "failed in an earlier attempt; a new job resumes from the newest checkpoint",
                logging.WARNING,
            )
            self._delete(self._name)
            return False
        self._log("exists already; adopting it (reason=JobAdopted)")
        self._log_stream.start_at_end()
        return True

    def _delete(self, name: str) -> None:
        self._api.delete(name)
        self._wait_until_deleted(name)

    def _wait_until_deleted(self, name: str) -> None:
        deadline = self._clock.time() + _DELETION_SECONDS
        while self._api.job(name) is not None:
            if self._clock.time() > deadline:
                raise UserError(
                    f"{self._kind.kind} {name}: deleted, but its pods have not exited for "
                    f"{_DELETION_SECONDS / 60:.0f} minutes",
                    hint=f"Look at kubectl get pods -l {self._selector()}.",
                )
            self._clock.sleep(_POLL_SECONDS)

    # --- one poll

    def _poll(self) -> bool:
        """Look at the job once and do what its state requires; return True once it succeeded."""
        job = self._api.job(self._name)
        row = transition_for(job, self._uid)
        if row is not self._current:
            self._enter(row)
        if row.action is Action.REPORT_DELETED or job is None:
            raise UserError(
                f"{self._kind.kind} {self._name}: deleted while it was "
                f"{self._previous_state.lower()}, by hand or with its namespace"
                f"{self._log_stream.last_lines()}",
                hint="Start the same run again: its checkpoints are kept, and it resumes from the "
                "newest one.",
            )
        self._log_stream.relay()
        if row.action is Action.EXPLAIN_FAILURE:
            self._replace_evicted(job)
        elif row.action in (Action.WAIT_FOR_PODS, Action.WAIT_FOR_END):
            self._check_pods(job, row)
        cluster = self._config.cluster
        if row.action is Action.WAIT_FOR_PODS and self._waited_hours() > cluster.queue_hours:
            blocker = self._blocker.message if self._blocker else row.message
            self._give_up(
                f"its pods did not run within {cluster.queue_hours:g} hours "
                f"(cluster.queue_hours): {blocker}",
                "Raise cluster.queue_hours, or request less.",
            )
        if row.action is Action.WAIT_FOR_END and self._waited_hours() > cluster.deadline_hours:
            self._give_up(
                f"it ran for {cluster.deadline_hours:g} hours (cluster.deadline_hours)",
                "Raise cluster.deadline_hours.",
            )
        return row.action is Action.COLLECT_RESULT

    def _enter(self, row: Transition) -> None:
        """Log a new state, and restart the wait if another action begins."""
        before_running = row.state in (State.QUEUED, State.PENDING, State.CREATED)
        preempted = self._was_running and before_running
        suffix = "; preempted, it will resume from its newest checkpoint" if preempted else ""
        self._log(f"{row.message}{suffix} (reason=Job{row.state})")
        self._previous_state = self._current.state if self._current else State.CREATED
        if self._current is None or row.action is not self._current.action:
            self._waiting_since = self._clock.time()
        self._was_running = self._was_running or row.state is State.RUNNING
        self._warn_without_queue(row)
        self._current, self._job_blocker, self._looked_at = row, None, 0.0

    def _warn_without_queue(self, row: Transition) -> None:
        """Say that a job runs although nothing put it into its queue."""
        queue = self._config.cluster.queue
        if queue and row.state is State.RUNNING and not self._queue_checked:
            self._queue_checked = True
            owner = {"metadata": {"uid": self._uid}}
            owners = [owner, *self._api.children("jobsets", [owner])]
            if self._api.may_list("workloads") and not self._api.children("workloads", owners):
                logger.warning(
                    f"{self._kind.kind} {self._name}: runs outside of queue {queue}, without its "
                    f"quota: Kueue does not manage {self._kind.kind}s here (reason=QueueIgnored). "
                    f"Install {KUEUE} or newer, and add the kind to integrations.frameworks of its "
                    "configuration."
                )

    def _check_pods(self, job: Object, row: Transition) -> None:
        """Log why pods are not there or not running; stop waiting if they never will be."""
        now = self._clock.time()
        pods = self._api.pods(self._selector())
        blockers = []
        for pod in pods:
            if pod["status"].get("phase") == "Pending":
                events = self._api.events(pod["metadata"]["name"])
                found = pod_diagnostics.find_blocker(pod, events, self._config)
                blockers += [found] if found else []
        if len(pods) < self._config.cluster.nodes:
            if now - self._looked_at >= _LOOK_SECONDS:
                self._looked_at, self._job_blocker = now, self._find_job_blocker(job, row)
            blockers += filter(None, [self._job_blocker])
        blocker = min(blockers, key=lambda blocker: not blocker.permanent, default=None)
        if blocker is None:
            self._blocker, self._blocked_since = None, now
            return
        if self._blocker is None or blocker.message != self._blocker.message:
            # ErrImagePull and ImagePullBackOff alternate: that must not restart the wait
            if self._blocker is None or not (blocker.permanent and self._blocker.permanent):
                self._blocked_since = now
            self._blocker = blocker
            queued = blocker.reason == job_diagnostics.WAITING_IN_QUEUE
            logger.log(
                logging.INFO if queued else logging.WARNING,
                f"{blocker.message} (reason={blocker.reason}). {blocker.hint}",
            )
        if blocker.permanent and now - self._blocked_since >= _BLOCKED_SECONDS:
            self._give_up(blocker.message, blocker.hint)

    def _find_job_blocker(self, job: Object, row: Transition) -> PodBlocker | None:
        """Find why the job's pods are not created, from every object between it and them."""
        sets = self._api.children("jobsets", [job])
        silent = self._clock.time() - self._waiting_since >= _SILENT_SECONDS
        if row.state is State.QUEUED:  # events about pods are of the time before it was suspended
            workloads = self._api.children("workloads", [job, *sets])
            meta = job["metadata"]
            events = self._api.events(meta["name"], self._kind.kind, meta["uid"])
            return job_diagnostics.find_queue_blocker(
                job, workloads, self._config, silent, events, self._clock.time()
            )
        chain = [
            (self._kind.kind, job),
            *(("JobSet", one) for one in sets),
            *(("Job", one) for one in self._api.children("jobs", sets)),
        ]
        events = [
            event
            for kind, one in chain
            for event in self._api.events(one["metadata"]["name"], kind, one["metadata"]["uid"])
        ]
        silent = silent and row.state is State.CREATED
        return job_diagnostics.find_job_blocker(
            events, self._config, self._kind if silent else None
        )

    def _give_up(self, message: str, hint: str) -> None:
        self._api.delete(self._name)
        raise UserError(
            f"{self._kind.kind} {self._name}: deleted by the launcher: {message}", hint=hint
        )

    def _waited_hours(self) -> float:
        return (self._clock.time() - self._waiting_since) / 3600

    def _replace_evicted(self, job: Object) -> None:
        """Replace a job whose pods were evicted; explain any other failure."""
        pods = self._api.pods(self._selector())
        eviction, limit = pod_diagnostics.find_eviction(pods), self._config.cluster.restarts
        if eviction is None or self._restarts >= limit:
            raise self._explain_failure(job, pods)
        self._restarts += 1
        logger.warning(
            f"{eviction}: a new job resumes from the newest checkpoint "
            f"(restart {self._restarts} of {limit}, reason={POD_EVICTED})"
        )
        self._delete(self._name)
        self._create_or_adopt()

    def _explain_failure(self, job: Object, pods: list[Object]) -> UserError:
        condition, last_lines = last_message(job), self._log_stream.last_lines()
        if "DeadlineExceeded" in condition or "active longer than" in condition:
            return UserError(
                f"{self._kind.kind} {self._name}: deadline exceeded ({condition}){last_lines}",
                hint="Raise cluster.deadline_hours.",
            )
        summary = f"{self._kind.kind} {self._name}: failed ({condition})"
        failure = pod_diagnostics.first_failure(pods)
        if failure is None:
            return UserError(pod_diagnostics.find_eviction(pods) or f"{summary}{last_lines}")
        pod, status = failure
        name = pod["metadata"]["name"]
        previous = not status.get("state", {}).get("terminated")
        lines = self._api.log(
            name, tail=40 * TAIL_LINES, previous=previous, container=status["name"]
        )
        log = [line.partition(" ")[2] for line in lines]
        error = pod_diagnostics.describe(pod, status, log, self._config)
        events = [
            f"event on {name}: {event.get('reason')}: {event.get('message')}"
            for event in self._api.events(name)
        ]
        return UserError("\n".join([str(error), *events, summary]), hint=error.hint)

    # --- the end of the run

    def _handle_interrupt(self) -> None:
        """Delete the job if its run is ending; keep it if only this step's pod is deleted."""
        self._api.timeout = _SIGTERM_TIMEOUT
        with contextlib.suppress(UserError):
            if self._run_continues():
                self._log(
                    "left running: only this step's pod is being deleted, and the run's next "
                    "attempt adopts the job"
                )
            else:
                self._api.delete(self._name)
                self._log("deleted, because the run was ended; its checkpoints are kept")

    def _run_continues(self) -> bool:
        owners = self._manifest["metadata"].get("ownerReferences")
        workflow = self._api.workflow(owners[0]["name"]) if owners else None
        if workflow is None:
            return False
        spec, status = workflow.get("spec", {}), workflow.get("status", {})
        ending = (
            spec.get("shutdown")
            or spec.get("activeDeadlineSeconds") == 0
            or workflow["metadata"].get("deletionTimestamp")
        )
        return not ending and status.get("phase", "Running") in ("Pending", "Running", "")

    # --- names

    def _selector(self, labels: Mapping[str, str] | None = None) -> str:
        selected = {RUN_ID: self._labels[RUN_ID], ROLE: self._labels[ROLE], **(labels or {})}
        return ",".join(f"{key}={value}" for key, value in selected.items())

    def _log(self, message: str, level: int = logging.INFO) -> None:
        logger.log(level, f"{self._kind.kind} {self._name}: {message}")


def _find_workflow(api: KubernetesClient, own_pod: str) -> dict[str, Any] | None:
    """Return an owner reference to this step's Argo workflow.

    Owned by the step's pod, a job of days would be deleted when that pod is evicted.
    """
    with contextlib.suppress(UserError):
        pod = api.pod(own_pod)
        for reference in (pod or {}).get("metadata", {}).get("ownerReferences") or ():
            if reference["kind"] == "Workflow":
                return {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
    return None


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Remove addresses that hold a password: many people can read manifests."""
    kept = {key: value for key, value in environment.items() if "@" not in urlsplit(value).netloc}
    for name in set(environment) - set(kept):
        logger.warning(
            f"{name}: contains a password; the training pods only get it from cluster.secret_env"
        )
    return kept

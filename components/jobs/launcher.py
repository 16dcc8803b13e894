"""A step's work as a job on Kubernetes: made once, waited for as the table of its states says, with rank 0's words, and why it failed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from components.jobs import pod_diagnostics
from components.jobs.client import Clock, Conflict, KubernetesClient, connect
from components.jobs.log_stream import LogStream
from components.jobs.manifests import SPEC_HASH, JobContext, manifest
from components.jobs.pod_diagnostics import LAST_LINES
from components.jobs.pod_spec import ROLE, RUN_ID, run_label
from components.jobs.preflight import refuse_missing
from components.jobs.states import (
    KINDS,
    Action,
    Object,
    State,
    Transition,
    last_message,
    transition_for,
)

_POLL = 5.0  # seconds between two looks at a job
_HOLD = 300.0  # seconds after which what a person must change ends the wait; registries and webhooks have their moments
_GONE = 900.0  # seconds that a deleted job's pods get to end in
_LAST_CALLS = 120.0  # seconds that a run's exit task waits for an API server
_FAREWELL = 5.0  # seconds for the last calls of a step that is being killed


def run(config: RunConfig, facts: JobContext, result: Path, task: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Do a step's work in pods of a job of this run.

    Args:
        facts: its `environment` may hold secrets, which are left out.
        result: what the work leaves last; where it stands, the work is done.
        task: what was set on the pipeline's task for the pods (the fields of `dsl.TaskConfig`).

    Returns:
        The job's name and image (with its digest, where the pods tell it), as tags; nothing where there was nothing to do.

    Raises:
        UserError: the work failed, or could not begin; the message says why, and what to do.
    """
    if result.is_file():
        print(f"already finished: {result} stands", flush=True)
        return {}
    facts = replace(facts, environment=_without_secrets(facts.environment))
    manifest(config, facts, task)  # what is wrong in it is said before anybody is asked
    client, namespace = connect()
    tags = launch(KubernetesClient(client, namespace, KINDS[config.cluster.backend]), config, facts, task)
    if not result.is_file():
        raise UserError(f"the job has finished, and {result} is not there. Mount the same claim in this step and in its pods")
    return tags


def copy_to_workspace(dataset: Path, run_folder: Path) -> Path:
    """The prepared data where the pods see it: an artifact of the pipeline lies in this step's container alone."""
    copy = run_folder / "train" / "data"
    if not copy.exists():
        with atomic_directory(copy) as partial:
            shutil.copytree(dataset, partial, dirs_exist_ok=True)
    return copy


def launch(
    api: KubernetesClient, config: RunConfig, facts: JobContext, task: Mapping[str, Any] | None = None, clock: Clock = time
) -> dict[str, str]:
    """Make the job of a run, or take it up if it is there, and return its tags when it has succeeded.

    Raises:
        UserError: see `run`. KeyboardInterrupt (also on SIGTERM): the job is deleted if its run is being ended.
    """
    own_pod = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME")
    wanted = manifest(config, replace(facts, owner=_owner(api, own_pod) if own_pod else None), task)
    refuse_missing(api, config, wanted)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _Launcher(api, config, wanted, clock).run()
    finally:
        signal.signal(signal.SIGTERM, before)


def delete_jobs(config: RunConfig, run_id: str, clock: Clock = time) -> None:
    """Delete the jobs that a run has left, once it has ended; finished jobs stay, for their logs. What hinders it is said, and no error."""
    if config.cluster.backend == "local":
        return
    kind = KINDS[config.cluster.backend]
    try:
        api = KubernetesClient(*connect(), kind, clock)
        api.patience = _LAST_CALLS
        for job in api.jobs(f"{RUN_ID}={run_label(run_id)}"):
            if transition_for(job).then not in (Action.TAKE_RESULT, Action.EXPLAIN):
                api.delete(job["metadata"]["name"])
                _say(f"{kind.kind} {job['metadata']['name']} is deleted: its run has ended")
    except UserError as error:
        _say(f"whether a job of this run is left is not known: {error}")


class _Launcher:
    def __init__(self, api: KubernetesClient, config: RunConfig, wanted: Mapping[str, Any], clock: Clock) -> None:
        self._api, self._config, self._wanted, self._clock = api, config, wanted, clock
        self._kind = KINDS[config.cluster.backend]
        self._name, self._labels = wanted["metadata"]["name"], wanted["metadata"]["labels"]
        self._uid, self._row = "", None  # type: str, Transition | None
        self._before, self._has_run, self._attempts = "created", False, 0
        self._since = clock.time()  # of this wait for pods, or of this running
        self._hold: tuple[str, float] = "", 0.0
        self._following = LogStream(api, self._pod_labels(self._kind.first_pod))

    def run(self) -> dict[str, str]:
        try:
            self._create_or_take_up()
            while not self._look():
                self._clock.sleep(_POLL)
        except KeyboardInterrupt:
            self._cancelled()
            raise
        statuses = [status for pod in self._pods() for status in pod["status"].get("containerStatuses") or ()]
        image = next((status["imageID"] for status in statuses if status.get("imageID")), self._config.cluster.image)
        if self._config.cluster.backend == "trainjob" and self._config.cluster.ttl_hours is not None:
            self._api.delete(self._name)  # it has no time to live of its own
        return {"canvastune.job": f"{self._api.namespace}/{self._name}", "canvastune.image": image}

    # --- one job, never two

    def _create_or_take_up(self) -> None:
        for other in self._api.jobs(self._selector()):
            if other["metadata"]["name"] != self._name:
                _say(f"{self._what(other)} belongs to this run with other settings: it is deleted")
                self._delete(other["metadata"]["name"])
        while True:
            try:
                made = self._api.create(self._wanted)
                _say(f"{self._what(made)} is created in namespace {self._api.namespace}")
            except Conflict:
                found = self._api.job(self._name)
                if found is None or not self._may_take_up(found):
                    continue
                made = found
            self._uid, self._row, self._since = made["metadata"]["uid"], None, self._clock.time()
            return

    def _may_take_up(self, found: Object) -> bool:
        """Whether a job of our name is to be gone on with; False: it is gone now, and ours can be made."""
        meta = found["metadata"]
        ours = (self._labels[RUN_ID], self._wanted["metadata"]["annotations"][SPEC_HASH])
        if (meta.get("labels", {}).get(RUN_ID), meta.get("annotations", {}).get(SPEC_HASH)) != ours:
            raise UserError(
                f"{self._what(found)} in namespace {self._api.namespace} is not of this run: it is left alone. Delete it if nobody needs "
                f"it (kubectl delete {self._kind.plural}.{self._kind.group} {self._name}), or run again"
            )
        if meta.get("deletionTimestamp"):
            _say(f"{self._what(found)} is being deleted; waiting for the end of it")
            self._wait_until_gone(self._name)
            return False
        if transition_for(found).then is Action.EXPLAIN:
            _say(f"{self._what(found)} of an earlier attempt has failed: a new one goes on from the newest checkpoint")
            self._delete(self._name)
            return False
        _say(f"{self._what(found)} of this run is there already: it is taken up")
        self._following.begin_at_end()
        return True

    def _delete(self, name: str) -> None:
        self._api.delete(name)
        self._wait_until_gone(name)

    def _wait_until_gone(self, name: str) -> None:
        deadline = self._clock.time() + _GONE
        while self._api.job(name) is not None:
            if self._clock.time() > deadline:
                raise UserError(
                    f"{self._kind.kind} {name} is deleted, and its pods do not end: look at kubectl get pods -l {self._selector()}"
                )
            self._clock.sleep(_POLL)

    # --- one look

    def _look(self) -> bool:
        """Look at the job once, and do what its state asks for; True: it has succeeded."""
        job = self._api.job(self._name)
        row = transition_for(job, self._uid)
        if row is not self._row:
            self._enter(row)
        if row.then is Action.SAY_DELETED or job is None:
            raise UserError(
                f"{self._kind.kind} {self._name} was deleted while it was {self._before}: by hand, or with its namespace. Its checkpoints "
                "are kept; the same run, tried again, goes on from the newest one" + self._following.last_words()
            )
        self._following.pass_on()
        if row.then is Action.EXPLAIN:
            self._replace_evicted(job)
        elif row.then in (Action.WAIT_FOR_PODS, Action.WAIT_FOR_END):
            self._mind_pods()
        if row.then is Action.WAIT_FOR_PODS and self._waited() > self._config.cluster.queue_hours:
            self._give_up(
                f"its pods did not run within {self._config.cluster.queue_hours:g} hours, which is cluster.queue_hours "
                f"({self._hold[0] or row.says}). Raise it, or ask for less"
            )
        if row.then is Action.WAIT_FOR_END and self._waited() > self._config.cluster.deadline_hours:
            self._give_up(f"it ran for {self._config.cluster.deadline_hours:g} hours, which is cluster.deadline_hours. Raise it")
        return row.then is Action.TAKE_RESULT

    def _enter(self, row: Transition) -> None:
        resumed = self._has_run and row.state in (State.QUEUED, State.PENDING, State.CREATED)
        _say(f"{self._kind.kind} {self._name}: {row.says}" + ("; preempted, it will go on from its newest checkpoint" if resumed else ""))
        self._before = self._row.state.lower() if self._row else "created"
        if self._row is None or row.then is not self._row.then:
            self._since = self._clock.time()
        self._has_run = self._has_run or row.state is State.RUNNING
        self._row = row

    def _mind_pods(self) -> None:
        """Say what holds the pods up, once, and end a wait that is in vain."""
        now = self._clock.time()
        holds = [
            pod_diagnostics.find_blocker(pod, self._api.events(pod["metadata"]["name"]), self._config)
            for pod in self._pods()
            if _pending(pod)
        ]
        hold = next((hold for hold in sorted(filter(None, holds), key=lambda hold: hold.can_pass)), None)
        if hold is None:
            self._hold = "", now
        elif hold.words != self._hold[0]:
            began = self._hold[1] if self._hold[0] and not hold.can_pass else now  # ErrImagePull and ImagePullBackOff take turns
            self._hold = hold.words, began
            _say(hold.words)
        if hold is not None and not hold.can_pass and now - self._hold[1] >= _HOLD:
            self._give_up(hold.words)

    def _give_up(self, why: str) -> None:
        self._api.delete(self._name)
        raise UserError(f"{self._kind.kind} {self._name} is withdrawn: {why}")

    def _waited(self) -> float:
        return (self._clock.time() - self._since) / 3600

    def _replace_evicted(self, job: Object) -> None:
        """A job that failed since its pods were taken away gets a successor, which goes on; any other failure is explained."""
        pods = self._pods()
        evicted = pod_diagnostics.was_evicted(pods)
        if evicted is None or self._attempts >= self._config.cluster.restarts:
            raise UserError(self._explanation(job, pods))
        self._attempts += 1
        _say(f"{evicted}: a new job goes on from the newest checkpoint (restart {self._attempts} of {self._config.cluster.restarts})")
        self._delete(self._name)
        self._create_or_take_up()

    def _explanation(self, job: Object, pods: list[Object]) -> str:
        said = last_message(job)
        if "DeadlineExceeded" in said or "active longer than" in said:
            return (
                f"{self._kind.kind} {self._name} ran into its deadline ({said}): raise cluster.deadline_hours"
                + self._following.last_words()
            )
        reason = f"{self._kind.kind} {self._name} has failed ({said})"
        found = pod_diagnostics.failed_first(pods)
        if found is None:
            return pod_diagnostics.was_evicted(pods) or reason + self._following.last_words()
        pod, end = found
        name = pod["metadata"]["name"]
        previous = end not in [status.get("state", {}).get("terminated") for status in pod["status"]["containerStatuses"]]
        log = [line.partition(" ")[2] for line in self._api.log(name, tail=40 * LAST_LINES, previous=previous)]
        events = [f"{event.get('reason')}: {event.get('message')}" for event in self._api.events(name)]
        return "\n".join(
            [pod_diagnostics.describe(pod, end, log, self._config), *(f"event on {name}: {words}" for words in events), reason]
        )

    # --- the end of the run

    def _cancelled(self) -> None:
        """Delete the job if its run was ended; keep it if only this step's pod must go, since the step will be tried again."""
        self._api.patience = _FAREWELL
        with contextlib.suppress(UserError):
            if self._run_goes_on():
                _say(f"{self._kind.kind} {self._name} is left running: this step's pod is taken away, its run goes on and takes the job up")
            else:
                self._api.delete(self._name)
                _say(f"{self._kind.kind} {self._name} is deleted: the run was ended. Its checkpoints are kept")

    def _run_goes_on(self) -> bool:
        owners = self._wanted["metadata"].get("ownerReferences")
        workflow = self._api.workflow(owners[0]["name"]) if owners else None
        if workflow is None:
            return False
        spec, status = workflow.get("spec", {}), workflow.get("status", {})
        ended = spec.get("shutdown") or spec.get("activeDeadlineSeconds") == 0 or workflow["metadata"].get("deletionTimestamp")
        return not ended and status.get("phase", "Running") in ("Pending", "Running", "")

    # --- names

    def _pods(self) -> list[Object]:
        return self._api.pods(self._selector())

    def _selector(self) -> str:
        return self._pod_labels({})

    def _pod_labels(self, more: Mapping[str, str]) -> str:
        return ",".join(f"{key}={value}" for key, value in {**{key: self._labels[key] for key in (RUN_ID, ROLE)}, **more}.items())

    def _what(self, job: Object) -> str:
        return f"{self._kind.kind} {job['metadata']['name']}"


def _pending(pod: Object) -> bool:
    return pod["status"].get("phase") == "Pending"


def _owner(api: KubernetesClient, own_pod: str) -> dict[str, Any] | None:
    """The Argo workflow that made this step's pod, as an owner of the job: an evicted pod must not take a job of days with it."""
    with contextlib.suppress(UserError):
        pod = api.pod(own_pod)
        for reference in (pod or {}).get("metadata", {}).get("ownerReferences") or ():
            if reference["kind"] == "Workflow":
                return {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
    return None


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Without an address that holds a password: manifests are read by many."""
    kept = {name: value for name, value in environment.items() if "@" not in urlsplit(value).netloc}
    for name in set(environment) - set(kept):
        _say(f"{name} holds a password: the training pods get it from cluster.secret_env alone")
    return kept


def _say(line: str) -> None:
    print(line, flush=True)

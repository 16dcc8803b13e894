"""`canvastune submit --wait` shows what the run's jobs wait for, as their launchers log it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes import client as kubernetes

from canvastune.errors import UserError
from pipelines import job_reports
from pipelines import submit as submitting
from pipelines.cli import main
from pipelines.job_reports import JobReports
from tests.cluster.test_submit import RECIPE, _state, _task
from tests.fakes.fake_kubeflow import FakeKubeflow
from tests.fakes.fake_kubernetes import Clock, FakeKubernetes

QUEUED = "TrainJob train-a: queued: the job is suspended until its queue admits it"
WAITING = (
    "queued in LocalQueue team-a since 2026-11-24T12:00:02Z: insufficient unused quota for "
    "nvidia.com/gpu in flavor h100, 8 more needed (reason=WaitingInQueue). Wait."
)


class Steps:
    """The pods of a run's steps, on the fake API server."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.api = FakeKubernetes(self.clock)

    def pod(self, name: str, run: str = "run-1", phase: str = "Running") -> None:
        self.api.put(
            "pods",
            name,
            metadata={"labels": {"pipeline/runid": run}},
            spec={"containers": [{"name": "wait"}, {"name": "main"}]},
            status={"phase": phase},
        )

    def connect(self) -> tuple[kubernetes.ApiClient, str]:
        settings = kubernetes.Configuration(host=self.api.url)
        settings.retries = False
        return kubernetes.ApiClient(settings), "default"

    def reports(self) -> JobReports:
        return JobReports("run-1", "team-a", self.connect, self.clock)


@pytest.fixture
def steps() -> Iterator[Steps]:
    made = Steps()
    yield made
    made.api.close()


def test_each_report_is_shown_once_and_other_lines_of_a_step_are_not(steps: Steps) -> None:
    steps.pod("train")
    steps.pod("another-run", run="run-2")
    steps.api.log("another-run", f"{QUEUED} (reason=JobQueued)")
    for line in ("step 1/800", f"{QUEUED} (reason=JobQueued)", f"WARNING {WAITING}"):
        steps.api.log("train", line)
    reports = steps.reports()
    assert reports.new() == [f"{QUEUED} (reason=JobQueued)", WAITING]
    assert reports.new() == []
    steps.api.log("train", json.dumps({"event": "log", "message": "running (reason=JobRunning)"}))
    steps.api.log("train", '{"no JSON (reason=JobRunning)')
    assert reports.new() == ["running (reason=JobRunning)"]


def test_the_last_report_of_a_step_that_ends_is_shown_and_that_of_an_earlier_one_is_not(
    steps: Steps,
) -> None:
    steps.pod("plan", phase="Succeeded")
    steps.api.log("plan", "old (reason=JobRunning)")
    steps.pod("train")
    reports = steps.reports()
    assert reports.new() == []
    steps.api.log("train", "done (reason=JobSucceeded)")
    steps.api.objects["pods", "train"]["status"]["phase"] = "Succeeded"
    assert reports.new() == ["done (reason=JobSucceeded)"]
    assert "get pods/plan" not in steps.api.calls
    before = len(steps.api.calls)
    assert reports.new() == []
    calls = steps.api.calls[before:]
    assert calls == ["list pods", "list workflows"], "reads logs of pods that have ended"


def test_what_cannot_be_read_is_said_once_with_the_command_that_shows_it(steps: Steps) -> None:
    steps.api.rules = []
    reports = steps.reports()
    (line,) = reports.new()
    assert "namespace team-a" in line
    assert "kubectl logs -n team-a -l pipeline/runid=run-1 -c main" in line
    assert reports.new() == []
    assert steps.api.calls.count("list pods") == 1, "asks again what is forbidden"


def test_without_a_kubeconfig_the_run_is_followed_all_the_same(steps: Steps) -> None:
    def connect() -> Any:
        raise UserError("found neither a service account nor a KUBECONFIG")

    reports = JobReports("run-1", "team-a", connect, steps.clock)
    (line,) = reports.new()
    assert "KUBECONFIG" in line
    assert reports.new() == []


def test_after_an_outage_of_the_api_server_reports_are_shown_again(steps: Steps) -> None:
    steps.pod("train")
    reports = steps.reports()
    assert reports.new() == []
    steps.api.outage = 503
    (line,) = reports.new()
    assert "does not respond" in line
    steps.api.outage = None
    steps.api.log("train", WAITING)
    assert reports.new() == [], "asks at each poll"
    steps.clock.sleep(61)
    assert reports.new() == [WAITING]


def test_a_kubeconfig_of_another_cluster_is_named(steps: Steps) -> None:
    (line,) = steps.reports().new()
    assert re.search(r"\bteam-a\b.*\bno pod\b", line)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]},
            "ImagePullBackOff",
        ),
        (
            {
                "initContainerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}],
                "conditions": [{"reason": "Unschedulable", "message": "0/3 nodes have memory"}],
            },
            "Unschedulable: 0/3 nodes have memory",
        ),
        ({}, 'FailedMount: MountVolume.SetUp failed: secret "minio" not found'),
    ],
)
def test_a_step_that_does_not_start_is_shown_with_its_cause(
    steps: Steps, status: dict[str, Any], words: str
) -> None:
    steps.pod("train", phase="Pending")
    steps.api.objects["pods", "train"]["status"] |= status
    steps.api.warn("train", "FailedMount", 'MountVolume.SetUp failed: secret "minio" not found')
    reports = steps.reports()
    (line,) = reports.new()
    assert line.startswith("pod train ")
    assert f": {words}" in line
    assert reports.new() == []


def test_submit_wait_shows_the_queue_and_since_when(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_reports, "connect_to_cluster", steps.connect)
    quick = SimpleNamespace(strftime=time.strftime, monotonic=time.monotonic, sleep=lambda _: None)
    monkeypatch.setattr(submitting, "time", quick)
    steps.pod("train")
    steps.api.log("train", f"{QUEUED} (reason=JobQueued)")
    steps.api.log("train", WAITING)
    script = [
        _state("RUNNING", _task("train", "RUNNING")),
        _state("SUCCEEDED", _task("train", "SUCCEEDED")),
    ]
    with FakeKubeflow(script=script) as kubeflow:
        assert main(["submit", str(RECIPE), "--host", kubeflow.host, "--wait"]) == 0
    said = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    running = f"{'train':<16}running"
    first = said.index(running)
    assert said[first : first + 3] == [
        running,
        f"{QUEUED} (reason=JobQueued)",
        WAITING,
    ]


# --- steps whose pods the API server refuses: Argo says so in the workflow, Kubeflow's API does not

QUOTA = (  # kubeflow/pipelines#7699
    "task 'flow.root-driver' errored: pods \"flow-system-dag-driver-123\" is forbidden: failed quota: "
    "kf-resource-quota: must specify cpu for: init,wait; memory for: init,wait"
)


def _node(name: str, message: str, phase: str = "Error") -> dict[str, Any]:
    return {"name": name, "type": "Pod", "phase": phase, "message": message}


def _workflow(steps: Steps, *nodes: dict[str, Any]) -> None:
    status = {"nodes": {str(number): node for number, node in enumerate(nodes)}}
    labels = {"pipeline/runid": "run-1"}
    steps.api.put("workflows", "flow", metadata={"labels": labels}, status=status)


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (QUOTA, "LimitRange with defaults"),
        (
            'pods "flow-1" is forbidden: failed quota: q: must specify limits.cpu for: init,main',
            "steps.resources",
        ),
        ('pods "flow-1" is forbidden: failed quota: q: must specify cpu,memory', "steps.resources"),
        (
            'pods "flow-1" is forbidden: exceeded quota: q, requested: limits.cpu=4, used: '
            "limits.cpu=8, limited: limits.cpu=8",
            "Wait",
        ),
        (
            'pods "flow-1" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != '
            'true (pod or container "main" must set securityContext.runAsNonRoot=true)',
            "2.16",
        ),
        (
            'pods "flow-1" is forbidden: error looking up service account team-a/default-editor: '
            'serviceaccount "default-editor" not found',
            "default-editor",
        ),
        (
            'admission webhook "validation.gatekeeper.sh" denied the request: missing label',
            "chart: steps",
        ),
    ],
)
def test_a_step_whose_pod_is_refused_is_shown_once_with_its_setting(
    steps: Steps, message: str, hint: str
) -> None:
    _workflow(steps, _node("flow.root-driver(0)", message), _node("flow.root-driver(1)", message))
    reports = steps.reports()
    (line,) = reports.new(running=False)
    assert line.startswith("step root-driver ")
    assert f": {message}" in line
    assert hint in line
    assert reports.new(running=False) == []


def test_a_step_whose_later_attempt_was_admitted_is_not_the_cause(steps: Steps) -> None:
    _workflow(
        steps,
        _node("flow.root.train.executor(1)", "", "Running"),
        _node("flow.root.train.executor(0)", 'failed calling webhook "a.example.com": timeout'),
    )
    reports = steps.reports()
    steps.pod("train")
    assert reports.new() == []
    assert reports.refusals == {}


def test_without_the_permission_to_list_workflows_that_is_said_once(steps: Steps) -> None:
    readable = {"apiGroups": [""], "resources": ["pods", "pods/log", "events"]}
    steps.api.rules = [{**readable, "verbs": ["get", "list"]}]
    reports = steps.reports()
    (line,) = reports.new(running=False)
    assert "workflows.argoproj.io in namespace team-a" in line
    assert reports.new(running=False) == []


def test_submit_wait_ends_with_why_the_first_step_has_no_pod(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_reports, "connect_to_cluster", steps.connect)
    quick = SimpleNamespace(strftime=time.strftime, monotonic=time.monotonic, sleep=lambda _: None)
    monkeypatch.setattr(submitting, "time", quick)
    _workflow(steps, _node("flow.root-driver", QUOTA))
    script = [_state("RUNNING"), _state("FAILED")]
    with FakeKubeflow(script=script) as kubeflow:
        assert main(["submit", str(RECIPE), "--host", kubeflow.host, "--wait"]) == 1
    said = capsys.readouterr()
    assert "step root-driver " in said.out
    assert "must specify cpu for: init,wait" in said.err
    assert "LimitRange with defaults" in said.err

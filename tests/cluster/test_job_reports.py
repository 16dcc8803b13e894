"""`canvastune submit --wait` shows what the run's jobs wait for, as their launchers log it."""

from __future__ import annotations

import json
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
    assert steps.api.calls[before:] == ["list pods"], "reads logs of pods that have ended"


def test_what_cannot_be_read_is_said_once_with_the_command_that_shows_it(steps: Steps) -> None:
    steps.api.rules = []
    reports = steps.reports()
    (line,) = reports.new()
    assert "may not read pods and their logs in namespace team-a" in line
    assert "kubectl logs -n team-a -l pipeline/runid=run-1 -c main" in line
    assert reports.new() == []
    assert steps.api.calls.count("list pods") == 1, "asks again what is forbidden"


def test_without_a_kubeconfig_the_run_is_followed_all_the_same(steps: Steps) -> None:
    def connect() -> Any:
        raise UserError("found neither a service account nor a KUBECONFIG")

    reports = JobReports("run-1", "team-a", connect, steps.clock)
    (line,) = reports.new()
    assert "not shown: found neither" in line
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
    assert "namespace team-a of the kubeconfig's cluster has no pod of this run" in line


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
    assert line.startswith(f"pod train does not start: {words}")
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

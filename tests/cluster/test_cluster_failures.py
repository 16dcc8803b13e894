"""Pods that do not start, pods that fail, and every end of a job: what the launcher says and does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import parse_config
from components.finish import step as closing
from components.jobs import launcher as launching
from components.jobs.client import KubernetesClient
from components.jobs.launcher import launch
from components.jobs.manifests import JobContext
from components.run_directory import RunRecord, read_record, write_record
from tests.support.cluster_stage import FACTS, HOUR, WORKFLOW, Cluster, config_of

# --- pods that do not start --------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_pulled_ends_the_wait(cluster: Cluster) -> None:
    def stuck(reason: str) -> None:
        waiting = {"reason": reason, "message": 'Back-off pulling image "canvastune/trainer:0.1.0": not found'}
        cluster.operator.pending(containerStatuses=[{"name": "pytorch", "restartCount": 0, "state": {"waiting": waiting}}])

    cluster.at(2, stuck, "ErrImagePull")
    cluster.at(60, stuck, "ImagePullBackOff")
    words = cluster.fails()
    assert "cannot get its image canvastune/trainer:" in words
    assert "not found" in words
    assert "Check cluster.image, and cluster.pull_secrets" in words
    assert cluster.clock.now - cluster.clock.start < 600, "waits for hours for an image that is not there"
    assert not cluster.api.all(cluster.operator._plural), "the job still waits"


def _unschedulable(message: str) -> dict[str, Any]:
    return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]}


def test_an_unschedulable_pod_is_explained_and_waited_for_as_long_as_allowed(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending, **_unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."))
    words = cluster.fails()
    assert "3 Insufficient nvidia.com/gpu" in words
    assert "asks for nvidia.com/gpu 8" in words
    assert "did not run within 0.1 hours, which is cluster.queue_hours" in words
    assert cluster.said.count("no node has room") == 1, "said more than once"
    assert cluster.clock.now - cluster.clock.start == pytest.approx(0.1 * HOUR, abs=30)


def test_a_claim_or_a_secret_that_the_launcher_may_not_see_is_found_in_the_pods(pytorch: Cluster, role: list[Mapping[str, Any]]) -> None:
    pytorch.api.rules = role
    pytorch.at(2, pytorch.operator.pending, **_unschedulable('persistentvolumeclaim "gone" not found'))
    assert "waits for a claim that does not exist" in pytorch.fails(config_of(claim="gone"))
    begun = pytorch.clock.now - pytorch.clock.start
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}
    pytorch.at(begun + 2, pytorch.operator.pending, containerStatuses=[{"restartCount": 0, "state": {"waiting": waiting}}])
    assert 'cannot be set up (secret "hf" not found). Create what is missing' in pytorch.fails(
        config_of(secret_env={"T": {"secret": "hf", "key": "k"}})
    )


def test_events_tell_what_a_pod_waits_for(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.clock.at(
        3, lambda: pytorch.api.warn(pytorch.operator.first_pod, "FailedMount", "MountVolume.SetUp failed: connection timed out")
    )
    pytorch.goes_well(start=60)
    pytorch.launch()
    assert "is not started yet: FailedMount: MountVolume.SetUp failed" in pytorch.said


# --- pods that fail ----------------------------------------------------------------------------------------------------

SUMMARY = """
Root Cause (first observed failure):
[0]:
  rank      : 5 (local_rank: 5)
  exitcode  : 1 (pid: 10958)
"""


def _fail(cluster: Cluster, lines: list[str], **how: Any) -> str:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    for line in lines:
        cluster.clock.at(10, lambda line=line: cluster.api.say(cluster.operator.first_pod, line))  # type: ignore[misc]
    cluster.at(20, cluster.operator.failed, **how)
    return cluster.fails()


def test_a_failed_job_tells_the_last_words_of_the_rank_that_failed_first(cluster: Cluster) -> None:
    lines = ["[rank 0]: closed by peer", *(f"[rank 5]: line {number}" for number in range(100)), "[rank 5]: ValueError: here"]
    words = _fail(cluster, [*lines, *SUMMARY.splitlines()])
    assert "ended with exit code 1" in words
    assert "rank 5 ended with exit code 1; its last lines:" in words
    assert "ValueError: here" in words
    assert "line 51\n" in words
    assert "line 50\n" not in words, "more than the last 50 lines"
    assert "BackoffLimitExceeded" in words


def test_a_failed_job_tells_our_own_error_in_one_line(cluster: Cluster) -> None:
    words = _fail(cluster, ["[rank 0]: canvastune: error: parallel.ep does not divide", *SUMMARY.splitlines()])
    assert words.splitlines()[0].endswith("ended with exit code 1 (Error): parallel.ep does not divide")


def test_oomkilled_is_said_in_plain_words(cluster: Cluster) -> None:
    cluster.clock.at(21, lambda: cluster.api.warn(cluster.operator.first_pod, "Evicted", "by an event"))
    words = _fail(cluster, ["[rank 0]: step 3/800"], code=137, why="OOMKilled")
    assert "used more memory than it may" in words
    assert "Raise cluster.memory" in words


def test_the_pods_events_are_told(pytorch: Cluster) -> None:
    pytorch.clock.at(15, lambda: pytorch.api.warn(pytorch.operator.first_pod, "NodeNotReady", "Node is not ready"))
    assert "event on" in (words := _fail(pytorch, ["[rank 0]: step 3/800"]))
    assert "NodeNotReady: Node is not ready" in words


def test_an_evicted_pod_is_replaced_as_often_as_allowed(cluster: Cluster) -> None:
    def once(start: float) -> None:
        cluster.at(start + 2, cluster.operator.pending)
        cluster.at(start + 5, cluster.operator.running)
        cluster.at(start + 20, cluster.operator.evicted)

    for start in (0, 100):
        once(start)
    cluster.goes_well(start=200)
    cluster.launch(config_of(cluster.backend, restarts=2))
    assert "was taken from its node (Evicted: The node was low on resource" in cluster.said
    assert "(restart 2 of 2)" in cluster.said
    begun = cluster.clock.now - cluster.clock.start
    once(begun + 100)
    if cluster.backend == "pytorchjob":
        cluster.api.remove("pytorchjobs", cluster.operator.job["metadata"]["name"])
    assert "exit code 137" in cluster.fails(config_of(cluster.backend, restarts=0))


# --- ends --------------------------------------------------------------------------------------------------------------


def test_a_job_over_its_deadline_is_ended(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    assert "it ran for 0.2 hours, which is cluster.deadline_hours" in cluster.fails()
    assert not cluster.api.all(cluster.operator._plural), "it still holds its GPUs"
    assert cluster.clock.now - cluster.clock.start == pytest.approx(0.2 * HOUR, abs=30)


def test_a_deadline_that_the_operator_enforced_is_named(cluster: Cluster) -> None:
    words = _fail(cluster, ["[rank 0]: step 3/800"], reason="DeadlineExceeded", message="Job was active longer than specified deadline")
    assert "ran into its deadline" in words
    assert "raise cluster.deadline_hours" in words


def test_a_job_deleted_by_hand_is_not_called_a_success(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.say(6, "step 1/800")
    cluster.clock.at(20, lambda: cluster.api.remove(cluster.operator._plural, cluster.operator.job["metadata"]["name"]))
    words = cluster.fails()
    assert "was deleted while it was running: by hand" in words
    assert "step 1/800" in words


@pytest.mark.parametrize(
    ("workflow", "kept"),
    [
        ({"spec": {}, "status": {"phase": "Running"}}, True),  # the step's pod alone is evicted
        ({"spec": {"activeDeadlineSeconds": 0}, "status": {"phase": "Running"}}, False),  # as Kubeflow ends a run
        ({"spec": {"shutdown": "Terminate"}, "status": {"phase": "Running"}}, False),
        ({"spec": {}, "status": {"phase": "Failed"}}, False),
        (None, False),
    ],
)
def test_a_cancelled_run_deletes_its_job_and_an_evicted_launcher_does_not(
    cluster: Cluster, workflow: dict[str, Any] | None, kept: bool
) -> None:
    if workflow is not None:
        cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [WORKFLOW]})
        cluster.api.put("workflows", "flow", **workflow)
    cluster.at(2, cluster.operator.pending)
    cluster.clock.at(20, lambda: (_ for _ in ()).throw(KeyboardInterrupt))  # what SIGTERM becomes
    with pytest.raises(KeyboardInterrupt):
        cluster.launch()
    assert bool(cluster.api.all(cluster.operator._plural)) == kept
    assert ("is left running" in cluster.said) == kept


def test_the_workflow_owns_the_job_so_that_both_go_together(cluster: Cluster) -> None:
    workflow = cluster.api.put("workflows", "flow", spec={}, status={"phase": "Running"})
    owner = {**WORKFLOW, "uid": workflow["metadata"]["uid"]}
    cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [owner]})
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.clock.at(20, lambda: cluster.api.remove("pods", "launcher-pod"))
    cluster.clock.at(60, lambda: cluster.api.remove("workflows", "flow"))
    assert "was deleted while it was running" in cluster.fails()
    assert cluster.clock.now - cluster.clock.start >= 60, "the job went with the launcher's pod"
    assert not cluster.api.all("pods")


def test_the_exit_task_ends_what_a_run_still_trains(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.clock.at(20, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        cluster.launch()
    monkeypatch.setattr(launching, "connect", lambda: (cluster.client(), "team-a"))
    monkeypatch.setattr(closing.tracking, "finish", lambda *_, **__: None)
    folder = tmp_path / "runs" / "mine"
    for job_id, left in (("another", 1), ("run-1", 0)):
        write_record(folder, RunRecord(job_id, config_of(cluster.backend).model_dump_json(), ""))
        closing.finish(str(tmp_path), "mine", "", job_id, "FAILED")
        assert len(cluster.api.all(cluster.operator._plural)) == left


@pytest.mark.parametrize(
    ("state", "well"), [("COMPLETE", True), ("SUCCEEDED", True), ("FAILED", False), ("CANCELED", False), ("RUNNING", False)]
)
def test_the_exit_task_knows_the_words_of_a_cluster_and_of_the_local_runner(
    state: str, well: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(closing.tracking, "finish", lambda run, failed: told.append(failed))
    folder = tmp_path / "runs" / "mine"
    config = parse_config({"name": "mine", "data": {"source": "rows.jsonl"}})
    write_record(folder, RunRecord("job", config.model_dump_json(), ""))
    closing.finish(str(tmp_path), "mine", "", "job", state)
    record = read_record(folder)
    assert record is not None
    assert (record.finished, told) == (well, [not well])


def test_a_finished_training_asks_for_no_job(pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "connect", lambda: pytest.fail("asked the cluster"))
    (tmp_path / "result.json").write_text(json.dumps({"export": "adapter"}))
    launching.run(config_of(), FACTS, tmp_path / "result.json")


def test_data_is_put_on_the_claim_whole_and_passwords_stay_off_the_manifest(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, data = tmp_path / "runs" / "a" / "train", tmp_path / "artifact"
    output.mkdir(parents=True)
    (data / "train").mkdir(parents=True)
    (data / "train" / "rows.arrow").write_text("rows")
    monkeypatch.setattr(launching, "connect", lambda: (pytorch.client(), "team-a"))
    monkeypatch.setattr(launching, "launch", lambda api, config, facts, task: launch(api, config, facts, task, pytorch.clock))
    pytorch.goes_well()
    pytorch.clock.at(50, lambda: (output / "result.json").write_text("{}"))
    environment = {"MLFLOW_TRACKING_URI": "https://me:hunter2@mlflow", "MLFLOW_RUN_ID": "abc"}
    api = KubernetesClient
    monkeypatch.setattr(launching, "KubernetesClient", lambda client, namespace, kind: api(client, namespace, kind, pytorch.clock))
    assert launching.copy_to_workspace(data, output.parent) == output / "data"
    assert (output / "data" / "train" / "rows.arrow").read_text() == "rows"
    facts = JobContext("run-1", output, ("canvastune.train",), mlflow=("--mlflow-run", "abc"), environment=environment)
    launching.run(config_of(mount_path=str(tmp_path)), facts, output / "result.json")
    assert "hunter2" not in json.dumps(pytorch.operator.job)
    assert [entry.name for entry in output.iterdir() if entry.name.startswith(".")] == []

"""Pods that do not start, pods that fail, and every end of a job: what the launcher reports and
does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from canvastune.config import parse_config
from components.finish import step as closing
from components.jobs.backends import JobContext
from components.jobs.client import KubernetesClient
from components.jobs.launcher import copy_to_workspace, run_job
from components.run_directory import RunRecord, read_record, write_record
from tests.support.cluster_stage import CONTEXT, HOUR, WORKFLOW, Cluster, config_of

# --- pods that do not start --------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_pulled_ends_the_wait(cluster: Cluster) -> None:
    def stuck(reason: str) -> None:
        waiting = {
            "reason": reason,
            "message": 'Back-off pulling image "canvastune/trainer:0.1.0": not found',
        }
        cluster.operator.pending(
            containerStatuses=[
                {"name": "pytorch", "restartCount": 0, "state": {"waiting": waiting}}
            ]
        )

    cluster.at(2, stuck, "ErrImagePull")
    cluster.at(60, stuck, "ImagePullBackOff")
    assert cluster.fails() == snapshot("""\
canvastune: error: KIND JOB: deleted by the launcher: pod POD cannot pull its image canvastune/trainer:0.1.0 (Back-off pulling image "canvastune/trainer:0.1.0": not found)
  hint: Check cluster.image and cluster.pull_secrets.\
""")
    assert "reason=ImagePullFailed" in cluster.output
    assert cluster.clock.now - cluster.clock.start < 600, (
        "waits for hours for an image that is not there"
    )
    assert not cluster.jobs(), "the job still waits"


def _unschedulable(message: str) -> dict[str, Any]:
    return {
        "conditions": [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": message,
            }
        ]
    }


def test_an_unschedulable_pod_is_explained_and_waited_for_as_long_as_allowed(
    cluster: Cluster,
) -> None:
    cluster.at(
        2,
        cluster.operator.pending,
        **_unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
    )
    assert cluster.fails() == snapshot("""\
canvastune: error: KIND JOB: deleted by the launcher: its pods did not run within 0.1 hours (cluster.queue_hours): no node has room for pod POD (0/3 nodes are available: 3 Insufficient nvidia.com/gpu.); it requests nvidia.com/gpu 8 and waits
  hint: Raise cluster.queue_hours, or request less.\
""")
    assert cluster.output.count("reason=PodUnschedulable") == 1, "logged more than once"
    assert cluster.clock.now - cluster.clock.start == pytest.approx(0.1 * HOUR, abs=30)


def test_a_claim_or_a_secret_that_the_launcher_may_not_see_is_found_in_the_pods(
    pytorch: Cluster, role: list[Mapping[str, Any]]
) -> None:
    pytorch.api.rules = role
    pytorch.at(
        2, pytorch.operator.pending, **_unschedulable('persistentvolumeclaim "gone" not found')
    )
    assert pytorch.fails(config_of(claim="gone")) == snapshot("""\
canvastune: error: KIND JOB: deleted by the launcher: pod POD waits for a claim that does not exist (persistentvolumeclaim "gone" not found)
  hint: Create the claim, or correct cluster.claim.\
""")
    elapsed = pytorch.clock.now - pytorch.clock.start
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}
    pytorch.at(
        elapsed + 2,
        pytorch.operator.pending,
        containerStatuses=[{"name": "pytorch", "restartCount": 0, "state": {"waiting": waiting}}],
    )
    assert pytorch.fails(config_of(secret_env={"T": {"secret": "hf", "key": "k"}})) == snapshot("""\
canvastune: error: KIND JOB: deleted by the launcher: pod POD cannot create its container pytorch (secret "hf" not found)
  hint: Create the missing object, or correct cluster.secret_env.\
""")


def test_events_show_what_a_pod_waits_for(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.clock.at(
        3,
        lambda: pytorch.api.warn(
            pytorch.operator.first_pod,
            "FailedMount",
            "MountVolume.SetUp failed: connection timed out",
        ),
    )
    pytorch.goes_well(start=60)
    pytorch.launch()
    (line,) = [line for line in pytorch.output.splitlines() if "reason=PodNotStarted" in line]
    assert "FailedMount: MountVolume.SetUp failed: connection timed out" in line


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
        cluster.clock.at(10, lambda line=line: cluster.api.log(cluster.operator.first_pod, line))  # type: ignore[misc]
    cluster.at(20, cluster.operator.failed, **how)
    return cluster.fails()


def test_a_failed_job_shows_the_last_lines_of_the_rank_that_failed_first(cluster: Cluster) -> None:
    lines = [
        "[rank 0]: closed by peer",
        *(f"[rank 5]: line {number}" for number in range(100)),
        "[rank 5]: ValueError: here",
    ]
    first, *shown, error, reason, hint = _fail(
        cluster, [*lines, *SUMMARY.splitlines()]
    ).splitlines()
    assert first == snapshot(
        "canvastune: error: pod POD exited with code 1 (Error): rank 5 exited with code 1; its last"
        " lines:"
    )
    assert [*shown, error] == [*(f"line {number}" for number in range(51, 100)), "ValueError: here"]
    assert [reason, hint] == snapshot(
        [
            "KIND JOB: failed (BackoffLimitExceeded: too many restarts)",
            "  hint: Fix the cause and start the same run again: it resumes from its checkpoints.",
        ]
    )


def test_a_failed_job_shows_our_own_error_and_its_hint(cluster: Cluster) -> None:
    lines = [
        "[rank 0]: canvastune: error: parallel.ep: 3 does not divide",
        "[rank 0]:   hint: Use 2.",
    ]
    assert _fail(cluster, [*lines, *SUMMARY.splitlines()]) == snapshot("""\
canvastune: error: pod POD exited with code 1 (Error): parallel.ep: 3 does not divide
KIND JOB: failed (BackoffLimitExceeded: too many restarts)
  hint: Use 2.\
""")


def test_an_oomkilled_pod_names_the_limits_to_change(cluster: Cluster) -> None:
    cluster.clock.at(
        21, lambda: cluster.api.warn(cluster.operator.first_pod, "Evicted", "by an event")
    )
    assert _fail(cluster, ["[rank 0]: step 3/800"], code=137, why="OOMKilled") == snapshot("""\
canvastune: error: pod POD exited with code 137 (OOMKilled): it exceeded its memory limit (its node's memory) and was killed. torchrun exited with code 137; its last lines:
step 3/800
KIND JOB: failed (BackoffLimitExceeded: too many restarts)
  hint: Raise cluster.memory, or lower cluster.shm or train.micro_batch_size.\
""")


def test_a_failed_job_shows_the_events_of_its_pod(pytorch: Cluster) -> None:
    pytorch.clock.at(
        15,
        lambda: pytorch.api.warn(pytorch.operator.first_pod, "NodeNotReady", "Node is not ready"),
    )
    assert _fail(pytorch, ["[rank 0]: step 3/800"]) == snapshot("""\
canvastune: error: pod POD exited with code 1 (Error): torchrun exited with code 1; its last lines:
step 3/800
event on POD: NodeNotReady: Node is not ready
KIND JOB: failed (BackoffLimitExceeded: too many restarts)
  hint: Fix the cause and start the same run again: it resumes from its checkpoints.\
""")


def test_an_evicted_pod_is_replaced_as_often_as_allowed(cluster: Cluster) -> None:
    def once(start: float) -> None:
        cluster.at(start + 2, cluster.operator.pending)
        cluster.at(start + 5, cluster.operator.running)
        cluster.at(start + 20, cluster.operator.evicted)

    for start in (0, 100):
        once(start)
    cluster.goes_well(start=200)
    cluster.launch(config_of(cluster.backend, restarts=2))
    restarts = [line for line in cluster.output.splitlines() if "reason=PodEvicted" in line]
    assert [cluster.without_names(line) for line in restarts] == snapshot(
        [
            (
                "WARNING pod POD was evicted from its node (Evicted: The node was low on resource:"
                " ephemeral-storage.): a new job resumes from the newest checkpoint (restart 1 of"
                " 2, reason=PodEvicted)"
            ),
            (
                "WARNING pod POD was evicted from its node (Evicted: The node was low on resource:"
                " ephemeral-storage.): a new job resumes from the newest checkpoint (restart 2 of"
                " 2, reason=PodEvicted)"
            ),
        ]
    )
    elapsed = cluster.clock.now - cluster.clock.start
    once(elapsed + 100)
    if cluster.backend == "pytorchjob":
        cluster.api.remove("pytorchjobs", cluster.operator.job["metadata"]["name"])
    assert re.search(r"\b137\b", cluster.fails(config_of(cluster.backend, restarts=0)))


# --- ends --------------------------------------------------------------------------------------------------------------


def test_a_job_over_its_deadline_is_ended(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    assert cluster.fails() == snapshot("""\
canvastune: error: KIND JOB: deleted by the launcher: it ran for 0.2 hours (cluster.deadline_hours)
  hint: Raise cluster.deadline_hours.\
""")
    assert not cluster.jobs(), "it still holds its GPUs"
    assert cluster.clock.now - cluster.clock.start == pytest.approx(0.2 * HOUR, abs=30)


def test_a_deadline_that_the_operator_enforced_is_named(cluster: Cluster) -> None:
    message = "Job was active longer than specified deadline"
    error = _fail(cluster, ["[rank 0]: step 3/800"], reason="DeadlineExceeded", message=message)
    assert error == snapshot("""\
canvastune: error: KIND JOB: deadline exceeded (DeadlineExceeded: Job was active longer than specified deadline); the last lines of rank 0:
step 3/800
  hint: Raise cluster.deadline_hours.\
""")


def test_a_job_deleted_by_hand_is_not_a_success(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.log(6, "step 1/800")
    cluster.clock.at(
        20,
        lambda: cluster.api.remove(cluster.kind.plural, cluster.operator.job["metadata"]["name"]),
    )
    assert cluster.fails() == snapshot("""\
canvastune: error: KIND JOB: deleted while it was running, by hand or with its namespace; the last lines of rank 0:
step 1/800
  hint: Start the same run again: its checkpoints are kept, and it resumes from the newest one.\
""")


@pytest.mark.parametrize(
    ("workflow", "kept"),
    [
        ({"spec": {}, "status": {"phase": "Running"}}, True),  # only the step's pod is evicted
        (
            {"spec": {"activeDeadlineSeconds": 0}, "status": {"phase": "Running"}},
            False,
        ),  # as Kubeflow ends a run
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
    assert bool(cluster.jobs()) == kept
    assert (": left running" in cluster.output) == kept


def test_the_workflow_owns_the_job_so_that_both_go_together(cluster: Cluster) -> None:
    workflow = cluster.api.put("workflows", "flow", spec={}, status={"phase": "Running"})
    owner = {**WORKFLOW, "uid": workflow["metadata"]["uid"]}
    cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [owner]})
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.clock.at(20, lambda: cluster.api.remove("pods", "launcher-pod"))
    cluster.clock.at(60, lambda: cluster.api.remove("workflows", "flow"))
    cluster.fails()
    assert "reason=JobDeleted" in cluster.output
    assert cluster.clock.now - cluster.clock.start >= 60, "the job went with the launcher's pod"
    assert not cluster.api.all("pods")


def test_the_exit_task_ends_what_a_run_still_trains(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.clock.at(20, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        cluster.launch()
    monkeypatch.setattr(KubernetesClient, "from_environment", lambda _: cluster.client())
    monkeypatch.setattr(closing.tracking, "finish", lambda *_, **__: None)
    folder = tmp_path / "runs" / "mine"
    for job_id, left in (("another", 1), ("run-1", 0)):
        write_record(folder, RunRecord(job_id, config_of(cluster.backend).model_dump_json(), ""))
        closing.finish(str(tmp_path), "mine", "", job_id, "FAILED")
        assert len(cluster.jobs()) == left


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("COMPLETE", "FINISHED"),
        ("SUCCEEDED", "FINISHED"),
        ("FAILED", "FAILED"),
        ("CANCELED", "KILLED"),
        ("RUNNING", "FAILED"),
    ],
)
def test_the_exit_task_knows_the_states_of_a_cluster_and_of_the_local_runner(
    state: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str] = []
    monkeypatch.setattr(closing.tracking, "finish", lambda run, status, *_: states.append(status))
    folder = tmp_path / "runs" / "mine"
    config = parse_config({"name": "mine", "data": {"source": "rows.jsonl"}})
    write_record(folder, RunRecord("job", config.model_dump_json(), ""))
    closing.finish(str(tmp_path), "mine", "", "job", state)
    record = read_record(folder)
    assert record is not None
    assert (record.finished, states) == (expected == "FINISHED", [expected])


def test_a_finished_training_asks_for_no_job(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KubernetesClient, "from_environment", lambda _: pytest.fail("connected"))
    (tmp_path / "result.json").write_text(json.dumps({"export": "adapter"}))
    run_job(config_of(), CONTEXT, tmp_path / "result.json")


def test_data_is_put_on_the_claim_whole_and_passwords_stay_off_the_manifest(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, data = tmp_path / "runs" / "a" / "train", tmp_path / "artifact"
    output.mkdir(parents=True)
    (data / "train").mkdir(parents=True)
    (data / "train" / "rows.arrow").write_text("rows")
    monkeypatch.setattr(KubernetesClient, "from_environment", lambda _: pytorch.client())
    pytorch.goes_well()
    pytorch.clock.at(50, lambda: (output / "result.json").write_text("{}"))
    environment = {"MLFLOW_TRACKING_URI": "https://me:hunter2@mlflow", "MLFLOW_RUN_ID": "abc"}
    assert copy_to_workspace(data, output.parent) == output / "data"
    assert (output / "data" / "train" / "rows.arrow").read_text() == "rows"
    context = JobContext(
        "run-1",
        output,
        ("canvastune.train",),
        mlflow=("--mlflow-run", "abc"),
        environment=environment,
    )
    run_job(config_of(mount_path=str(tmp_path)), context, output / "result.json")
    assert "hunter2" not in json.dumps(pytorch.operator.job)
    assert [entry.name for entry in output.iterdir() if entry.name.startswith(".")] == []

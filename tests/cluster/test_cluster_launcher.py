"""The real launcher and client against a fake API server: the states of a job, one job only, and
outages.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from inline_snapshot import snapshot

from components.jobs.backends import JobContext
from tests.support.cluster_stage import CONTEXT, Cluster, config_of

# --- the states of a job --------------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_returns_and_its_log_is_relayed_once_in_order(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch()
    assert cluster.creations == 1
    assert [line for line in cluster.output.splitlines() if line.startswith("step")] == [
        "step 1/800",
        "step 2/800",
    ]
    assert "reason=JobRunning" in cluster.output


def test_the_job_and_the_digest_of_its_image_are_returned(pytorch: Cluster) -> None:
    pytorch.goes_well()
    end = {
        "name": "pytorch",
        "restartCount": 0,
        "imageID": "registry.example/trainer@sha256:1",
        "state": {"terminated": {"exitCode": 0}},
    }
    pytorch.at(
        60,
        lambda: pytorch.api.objects["pods", pytorch.operator.first_pod]["status"].update(
            containerStatuses=[end]
        ),
    )
    tags = pytorch.launch()
    name = pytorch.operator.job["metadata"]["name"]
    assert tags == {
        "canvastune.job": f"team-a/{name}",
        "canvastune.image": "registry.example/trainer@sha256:1",
    }


def test_a_trainjob_that_succeeded_is_deleted_since_it_has_no_ttl(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch()
    assert len(cluster.jobs()) == (1 if cluster.backend == "pytorchjob" else 0)


def test_a_suspended_job_is_queued_not_stuck(cluster: Cluster) -> None:
    cluster.at(1, cluster.operator.suspended)
    cluster.goes_well(start=300)
    cluster.launch()
    assert "reason=JobQueued" in cluster.output


def test_a_preempted_job_resumes(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.at(45, cluster.operator.suspended)
    cluster.api.clock.plan = [
        item for item in cluster.api.clock.plan if item[0] - cluster.clock.start != 60
    ]
    cluster.goes_well(start=300)
    cluster.launch()
    assert "; preempted," in cluster.output
    assert cluster.creations == 1


def test_a_restarting_job_is_waited_for(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.at(20, cluster.operator.restarting)
    cluster.at(50, cluster.operator.running)
    cluster.at(70, cluster.operator.succeeded)
    cluster.launch()
    assert "reason=JobRestarting" in cluster.output
    assert cluster.output.count("reason=JobRunning") == 2


def test_a_container_that_restarts_loses_no_line(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    pytorch.log(6, "before")
    pytorch.log(21, "the last before the end")
    pytorch.at(22, pytorch.operator.restart_in_place, 137, "OOMKilled")
    pytorch.log(23, "resumed at step 100")
    pytorch.at(70, pytorch.operator.succeeded)
    pytorch.launch()
    lines = ["before", "the last before the end", "resumed at step 100"]
    assert [line for line in pytorch.output.splitlines() if line in lines] == lines
    assert re.search(r"\(OOMKilled, exit code 137\) .*reason=PodRestarted", pytorch.output)


def test_lines_of_one_moment_are_neither_lost_nor_repeated(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    for second in (6, 6, 9.9, 10, 10.1):  # at once, and around a look at the log
        pytorch.log(second, f"line at {second}", f"another at {second}")
    pytorch.clock.at(
        12,
        lambda: pytorch.api.logs[pytorch.operator.first_pod].append(
            ("2026-11-24T12:00:12.5Z", "[rank 0]: half")
        ),
    )
    pytorch.at(30, pytorch.operator.succeeded)
    pytorch.launch()
    relayed = [
        line
        for line in pytorch.output.splitlines()
        if ("at " in line and ("line" in line or "another" in line)) or line == "half"
    ]
    written = [
        line.removeprefix("[rank 0]: ") for _, line in pytorch.api.logs[pytorch.operator.first_pod]
    ]
    assert relayed == written


def test_an_unknown_state_is_waited_out(pytorch: Cluster) -> None:
    pytorch.at(
        2,
        lambda: pytorch.operator.job.update(
            status={"conditions": [{"type": "Dreaming", "status": "True"}]}
        ),
    )
    pytorch.clock.at(30, lambda: pytorch.operator.job.update(status={}))
    pytorch.goes_well(start=40)
    pytorch.launch()
    assert "reason=JobUnknown" in pytorch.output


# --- one job, never two ------------------------------------------------------------------------------------------------


def test_a_launcher_that_was_killed_and_restarted_adopts_its_job(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.clock.at(30, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        cluster.launch()
    assert len(cluster.jobs()) == 1
    cluster.output = ""
    cluster.launch()
    assert "reason=JobAdopted" in cluster.output
    assert cluster.output.count("step 2/800") == 1
    assert cluster.operator.job if cluster.backend == "pytorchjob" else True
    assert len({name for kind, name in cluster.api.objects if kind == cluster.kind.plural}) <= 1


def test_a_lost_response_to_the_creation_makes_no_second_job(cluster: Cluster) -> None:
    cluster.goes_well()
    create = cluster.api.on_create

    def created_without_a_response(*arguments: Any) -> Any:
        cluster.api.lose_response, cluster.api.on_create = 1, create  # type: ignore[method-assign]
        return create(*arguments)

    cluster.api.on_create = created_without_a_response  # type: ignore[method-assign,assignment]
    cluster.launch()
    assert cluster.creations == 2
    assert "reason=JobAdopted" in cluster.output


def test_mlflow_that_was_down_makes_no_other_job(pytorch: Cluster) -> None:
    pytorch.goes_well()
    pytorch.clock.at(30, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        pytorch.launch()
    pytorch.launch(
        context=JobContext(
            CONTEXT.run_id,
            CONTEXT.output,
            CONTEXT.module,
            mlflow=("--mlflow-run", "abc"),
            environment={"MLFLOW_TRACKING_URI": "http://m"},
        )
    )
    assert "reason=JobAdopted" in pytorch.output


def test_a_failed_job_of_an_earlier_attempt_is_replaced_by_one_that_resumes(
    cluster: Cluster,
) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.at(20, cluster.operator.failed)
    cluster.fails()
    cluster.api.linger = 40
    cluster.goes_well(start=100)
    cluster.launch()
    assert re.search(r"^WARNING .* failed\b.*\bcheckpoint$", cluster.output, re.MULTILINE)
    assert len(cluster.jobs()) <= 1


def test_a_job_of_this_run_with_other_settings_is_ended_first(pytorch: Cluster) -> None:
    pytorch.clock.at(30, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        pytorch.launch(config_of(cpu="4"))
    pytorch.goes_well(start=60)
    pytorch.launch(config_of(cpu="8"))
    assert re.search(r": deleting\b.* other settings\b", pytorch.output)
    assert len(pytorch.jobs()) == 1


def test_a_job_of_another_run_under_our_name_is_not_changed(pytorch: Cluster) -> None:
    pytorch.goes_well()
    pytorch.launch()
    pytorch.operator.job["metadata"]["labels"]["canvastune.io/run-id"] = "another"
    assert pytorch.fails() == snapshot("""\
canvastune: error: KIND JOB: exists in namespace team-a, but does not belong to this run; it was not changed
  hint: If it is not needed, delete it (kubectl delete pytorchjobs.kubeflow.org JOB), or start a new run.\
""")
    assert len(pytorch.jobs()) == 1


# --- outages of the API server ---------------------------------------------------------------------------------------


def test_an_api_server_that_is_down_for_two_minutes_is_waited_for(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.clock.at(15, lambda: setattr(cluster.api, "outage", "drop"))
    cluster.clock.at(135, lambda: setattr(cluster.api, "outage", None))
    cluster.launch()
    said = re.findall(r"API server .*\b(not|again)\b", cluster.output)
    assert said == ["not", "again"], "the outage and its end are logged once each"
    assert "step 2/800" in cluster.output, "the lines of the meantime are lost"
    assert cluster.creations == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_blips_do_not_end_a_run(pytorch: Cluster, status: int) -> None:
    pytorch.goes_well()
    for second in (2, 20, 50):
        pytorch.clock.at(second, lambda: setattr(pytorch.api, "outage", status))
        pytorch.clock.at(second + 3, lambda: setattr(pytorch.api, "outage", None))
    pytorch.launch()


def test_an_api_server_that_stays_down_ends_the_step_and_not_the_job(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    pytorch.clock.at(30, pytorch.api.close)
    assert pytorch.fails() == snapshot("""\
canvastune: error: the Kubernetes API server did not respond for 30 minutes (NewConnectionError); the job was not changed
  hint: Retry the step: it adopts the job.\
""")
    assert len(pytorch.jobs()) == 1

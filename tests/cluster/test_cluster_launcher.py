"""The real launcher and client against a stand-in of the API server: the way of a job, one job alone, and an API server with bad days."""

from __future__ import annotations

from typing import Any

import pytest

from components.jobs.client import KubernetesClient
from components.jobs.launcher import launch
from components.jobs.manifests import JobContext
from components.jobs.states import KINDS
from tests.support.cluster_stage import FACTS, Cluster, config_of

# --- the way of a job --------------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_returns_and_its_words_come_once_in_order(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch()
    assert cluster.creations == 1
    assert [line for line in cluster.said.splitlines() if line.startswith("step")] == ["step 1/800", "step 2/800"]
    assert "running" in cluster.said


def test_the_job_and_the_digest_of_its_image_are_told(pytorch: Cluster) -> None:
    pytorch.goes_well()
    end = {
        "name": "pytorch",
        "restartCount": 0,
        "imageID": "registry.example/trainer@sha256:1",
        "state": {"terminated": {"exitCode": 0}},
    }
    pytorch.at(60, lambda: pytorch.api.objects["pods", pytorch.operator.first_pod]["status"].update(containerStatuses=[end]))
    told = launch(KubernetesClient(pytorch.client(), "team-a", KINDS["pytorchjob"], pytorch.clock), config_of(), FACTS, None, pytorch.clock)
    name = pytorch.operator.job["metadata"]["name"]
    assert told == {"canvastune.job": f"team-a/{name}", "canvastune.image": "registry.example/trainer@sha256:1"}


def test_a_trainjob_that_succeeded_is_cleaned_up_since_nobody_else_does(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch()
    assert len(cluster.api.all(cluster.operator._plural)) == (1 if cluster.backend == "pytorchjob" else 0)


def test_a_suspended_job_is_queued_not_stuck(cluster: Cluster) -> None:
    cluster.at(1, cluster.operator.suspended)
    cluster.goes_well(start=300)
    cluster.launch()
    assert "queued: the job is suspended until its queue admits it" in cluster.said


def test_a_preempted_job_resumes(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.at(45, cluster.operator.suspended)
    cluster.api.clock._plan = [item for item in cluster.api.clock._plan if item[0] - cluster.clock.start != 60]
    cluster.goes_well(start=300)
    cluster.launch()
    assert "preempted, it will go on from its newest checkpoint" in cluster.said
    assert cluster.creations == 1


def test_a_restarting_job_is_waited_for(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.at(20, cluster.operator.restarting)
    cluster.at(50, cluster.operator.running)
    cluster.at(70, cluster.operator.succeeded)
    cluster.launch()
    assert "restarting: pods ended and are started again" in cluster.said
    assert cluster.said.count(": running") == 2


def test_a_container_that_starts_again_loses_no_word(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    pytorch.say(6, "before")
    pytorch.say(21, "the last before the end")
    pytorch.at(22, pytorch.operator.restart_in_place, 137, "OOMKilled")
    pytorch.say(23, "resumed at step 100")
    pytorch.at(70, pytorch.operator.succeeded)
    pytorch.launch()
    words = ["before", "the last before the end", "resumed at step 100"]
    assert [line for line in pytorch.said.splitlines() if line in words] == words
    assert "ended (OOMKilled, exit code 137) and is started again" in pytorch.said


def test_lines_of_one_moment_are_neither_lost_nor_repeated(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    for second in (6, 6, 9.9, 10, 10.1):  # at once, and around a look at the log
        pytorch.say(second, f"line at {second}", f"another at {second}")
    pytorch.clock.at(12, lambda: pytorch.api.logs[pytorch.operator.first_pod].append(("2026-11-24T12:00:12.5Z", "[rank 0]: half")))
    pytorch.at(30, pytorch.operator.succeeded)
    pytorch.launch()
    heard = [line for line in pytorch.said.splitlines() if ("at " in line and ("line" in line or "another" in line)) or line == "half"]
    written = [line.removeprefix("[rank 0]: ") for _, line in pytorch.api.logs[pytorch.operator.first_pod]]
    assert heard == written


def test_an_unknown_state_is_waited_out(pytorch: Cluster) -> None:
    pytorch.at(2, lambda: pytorch.operator.job.update(status={"conditions": [{"type": "Dreaming", "status": "True"}]}))
    pytorch.clock.at(30, lambda: pytorch.operator.job.update(status={}))
    pytorch.goes_well(start=40)
    pytorch.launch()
    assert "unknown: the job's status says nothing that the launcher knows" in pytorch.said


# --- one job, never two ------------------------------------------------------------------------------------------------


def test_a_launcher_that_was_killed_and_comes_again_takes_its_job_up(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.clock.at(30, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        cluster.launch()
    assert len(cluster.api.all(cluster.operator._plural)) == 1
    cluster.said = ""
    cluster.launch()
    assert "of this run is there already: it is taken up" in cluster.said
    assert cluster.said.count("step 2/800") == 1
    assert cluster.operator.job if cluster.backend == "pytorchjob" else True
    assert len({name for kind, name in cluster.api.objects if kind == cluster.operator._plural}) <= 1


def test_a_lost_answer_to_the_creation_makes_no_second_job(cluster: Cluster) -> None:
    cluster.goes_well()
    create = cluster.api._create

    def created_but_not_said(*arguments: Any) -> Any:
        cluster.api.lose_answer, cluster.api._create = 1, create  # type: ignore[method-assign]
        return create(*arguments)

    cluster.api._create = created_but_not_said  # type: ignore[method-assign,assignment]
    cluster.launch()
    assert cluster.creations == 2
    assert "it is taken up" in cluster.said


def test_mlflow_that_was_away_makes_no_other_job(pytorch: Cluster) -> None:
    pytorch.goes_well()
    pytorch.clock.at(30, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        pytorch.launch()
    pytorch.launch(
        facts=JobContext(
            FACTS.run_id, FACTS.output, FACTS.module, mlflow=("--mlflow-run", "abc"), environment={"MLFLOW_TRACKING_URI": "http://m"}
        )
    )
    assert "it is taken up" in pytorch.said


def test_a_failed_job_of_an_earlier_attempt_makes_place_for_one_that_resumes(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.pending)
    cluster.at(5, cluster.operator.running)
    cluster.at(20, cluster.operator.failed)
    cluster.fails()
    cluster.api.linger = 40
    cluster.goes_well(start=100)
    cluster.launch()
    assert "a new one goes on from the newest checkpoint" in cluster.said
    assert len(cluster.api.all(cluster.operator._plural)) <= 1


def test_a_job_of_this_run_with_other_settings_is_ended_first(pytorch: Cluster) -> None:
    pytorch.clock.at(30, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        pytorch.launch(config_of(cpu="4"))
    pytorch.goes_well(start=60)
    pytorch.launch(config_of(cpu="8"))
    assert "belongs to this run with other settings: it is deleted" in pytorch.said
    assert len(pytorch.api.all("pytorchjobs")) == 1


def test_anothers_job_under_our_name_is_left_alone(pytorch: Cluster) -> None:
    pytorch.goes_well()
    pytorch.launch()
    pytorch.operator.job["metadata"]["labels"]["canvastune.io/run-id"] = "another"
    assert "is not of this run: it is left alone" in pytorch.fails()
    assert len(pytorch.api.all("pytorchjobs")) == 1


# --- an API server with bad days ---------------------------------------------------------------------------------------


def test_an_api_server_that_is_away_for_two_minutes_is_waited_for(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.clock.at(15, lambda: setattr(cluster.api, "outage", "drop"))
    cluster.clock.at(135, lambda: setattr(cluster.api, "outage", None))
    cluster.launch()
    assert cluster.said.count("does not answer") == 1
    assert "the Kubernetes API server answers again" in cluster.said
    assert "step 2/800" in cluster.said, "what was said meanwhile is lost"
    assert cluster.creations == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_blips_do_not_end_a_run(pytorch: Cluster, status: int) -> None:
    pytorch.goes_well()
    for second in (2, 20, 50):
        pytorch.clock.at(second, lambda: setattr(pytorch.api, "outage", status))
        pytorch.clock.at(second + 3, lambda: setattr(pytorch.api, "outage", None))
    pytorch.launch()


def test_an_api_server_that_stays_away_ends_the_step_and_not_the_job(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    pytorch.clock.at(30, pytorch.api.close)
    assert "did not answer for 30 minutes" in pytorch.fails()
    assert len(pytorch.api.all("pytorchjobs")) == 1

"""The real launcher and the real Kubernetes client against a stand-in of the API server: every state, and every fault it must survive."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from kubernetes import client as kubernetes

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from components.finish import closing
from components.run_folder import RunRecord, write_record
from components.train import cluster as launching
from components.train.api import Api, connect
from components.train.cluster import launch
from components.train.manifests import RunFacts
from components.train.states import KINDS, ROWS, State, Then, row_of
from tests.fake_kubernetes import ACCOUNT, Clock, FakeKubernetes, Operator
from tests.rendered_chart import installed, of_kind

FACTS = RunFacts(
    run_id="run-1", recipe=PurePosixPath("/workspace/runs/a/train/recipe.yaml"), output=PurePosixPath("/workspace/runs/a/train")
)
HOUR = 3600.0


def config_of(backend: str = "pytorchjob", **cluster: Any) -> RunConfig:
    section = {"backend": backend, "claim": "workspace", "queue_hours": 0.1, "deadline_hours": 0.2, **cluster}
    return parse_config({"name": "gsm8k_lora", "data": {"source": "openai/gsm8k"}, "cluster": section})


class Cluster:
    """A namespace with what a run needs, an operator for one kind of job, and launchers that run in it."""

    def __init__(self, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.backend, self.clock, self._capsys, self.said = backend, Clock(), capsys, ""
        self.api = FakeKubernetes(self.clock)
        self.operator = Operator(self.api, KINDS[backend].plural)
        self.api.put("persistentvolumeclaims", "workspace")
        self.api.put("trainingruntimes", "canvastune", spec={"template": {"spec": {"replicatedJobs": []}}})

    def client(self) -> kubernetes.ApiClient:
        settings = kubernetes.Configuration(host=self.api.url)
        settings.retries = False
        return kubernetes.ApiClient(settings)

    def launch(self, config: RunConfig | None = None, facts: RunFacts = FACTS, task: Mapping[str, Any] | None = None) -> None:
        """Run a launcher to its end, as a step of the pipeline does."""
        try:
            launch(
                Api(self.client(), "team-a", KINDS[self.backend], self.clock), config or config_of(self.backend), facts, task, self.clock
            )
        finally:
            self.said += self._capsys.readouterr().out

    def fails(self, config: RunConfig | None = None, facts: RunFacts = FACTS) -> str:
        """Run a launcher that must fail; its words."""
        with pytest.raises(UserError) as caught:
            self.launch(config, facts)
        return str(caught.value)

    def at(self, seconds: float, action: Callable[..., object], *arguments: Any, **named: Any) -> None:
        self.clock.at(seconds, lambda: action(*arguments, **named))

    def say(self, seconds: float, *lines: str) -> None:
        """Rank 0 says lines at a time."""
        for line in lines:
            self.clock.at(seconds, lambda line=line: self.api.say(self.operator.first_pod, f"[rank 0]: {line}"))  # type: ignore[misc]

    def goes_well(self, start: float = 0) -> None:
        """From `start` on the job runs, and succeeds after a minute."""
        self.at(start + 1, self.operator.created)
        self.at(start + 3, self.operator.pending)
        self.at(start + 10, self.operator.running)
        self.say(start + 11, "step 1/800")
        self.say(start + 40, "step 2/800")
        self.at(start + 60, self.operator.succeeded)

    @property
    def creations(self) -> int:
        return self.api.calls.count(f"create {KINDS[self.backend].plural}")


@pytest.fixture(params=["pytorchjob", "trainjob"])
def cluster(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with one kind of job, then with the other."""
    yield from _cluster(request.param, capsys, monkeypatch)


@pytest.fixture
def pytorch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with PyTorchJobs."""
    yield from _cluster("pytorchjob", capsys, monkeypatch)


def _cluster(backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    monkeypatch.setenv("HOSTNAME", "launcher-pod")
    made = Cluster(backend, capsys)
    yield made
    made.api.close()


# --- the table of states: one test per row, for both kinds of job ------------------------------------------------------


def _true(*types: str) -> dict[str, Any]:
    return {"conditions": [{"type": name, "status": "True"} for name in types]}


def _counted(**counts: int) -> dict[str, Any]:
    return {"jobsStatus": [{"name": "node", **counts}]}


_TABLE: dict[State, tuple[dict[str, Any], dict[str, Any]]] = {
    State.CREATED: ({}, {}),
    State.QUEUED: (_true("Created", "Suspended"), _true("Suspended")),
    State.PENDING: (_true("Created"), _counted(active=1)),
    State.RUNNING: (_true("Created", "Running"), _counted(active=1, ready=1)),
    State.RESTARTING: (_true("Created", "Restarting"), _counted(active=1, failed=1)),
    State.SUCCEEDED: (_true("Created", "Succeeded"), _true("Complete")),
    State.FAILED: (_true("Created", "Running", "Failed"), _true("Failed")),
    State.UNKNOWN: (_true("Dreaming"), _true("Dreaming")),
}
_DOES = {
    State.CREATED: Then.WAIT_FOR_PODS,
    State.QUEUED: Then.WAIT_FOR_PODS,
    State.PENDING: Then.WAIT_FOR_PODS,
    State.RESTARTING: Then.WAIT_FOR_PODS,
    State.UNKNOWN: Then.WAIT_FOR_PODS,
    State.RUNNING: Then.WAIT_FOR_END,
    State.SUCCEEDED: Then.TAKE_RESULT,
    State.FAILED: Then.EXPLAIN,
    State.DELETED: Then.SAY_DELETED,
}


@pytest.mark.parametrize("which", [0, 1], ids=["pytorchjob", "trainjob"])
@pytest.mark.parametrize("state", _TABLE)
def test_a_status_is_read_as_its_state(state: State, which: int) -> None:
    row = row_of({"metadata": {"uid": "1"}, "spec": {}, "status": _TABLE[state][which]}, "1")
    assert (row.state, row.then) == (state, _DOES[state])


def test_a_job_that_is_gone_or_replaced_is_deleted() -> None:
    assert row_of(None).state is State.DELETED
    assert row_of({"metadata": {"uid": "2"}, "spec": {}}, "1").then is Then.SAY_DELETED


def test_every_state_has_a_row_and_a_test() -> None:
    assert {row.state for row in ROWS} == set(State) == set(_DOES)


# --- the way of a job --------------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_returns_and_its_words_come_once_in_order(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch()
    assert cluster.creations == 1
    assert [line for line in cluster.said.splitlines() if line.startswith("step")] == ["step 1/800", "step 2/800"]
    assert "running" in cluster.said


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
    pytorch.at(2, lambda: pytorch.operator.job.update(status=_true("Dreaming")))
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
        facts=RunFacts(FACTS.run_id, FACTS.recipe, FACTS.output, mlflow_run="abc", environment={"MLFLOW_TRACKING_URI": "http://m"})
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


# --- permissions, kinds and things that are missing --------------------------------------------------------------------


@pytest.fixture(scope="module")
def role() -> list[Mapping[str, Any]]:
    """The rules that the chart gives to the account that runs pipeline steps."""
    (found,) = [role for role in of_kind(installed("default"), "Role") if role["metadata"]["name"].endswith("launcher")]
    return list(found["rules"])


def test_the_charts_role_is_enough(cluster: Cluster, role: list[Mapping[str, Any]]) -> None:
    cluster.api.rules = role
    cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [_WORKFLOW]})
    cluster.goes_well()
    cluster.launch(config_of(cluster.backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}}))


@pytest.mark.parametrize(
    ("resource", "verb"), [("pytorchjobs", "create"), ("pytorchjobs", "list"), ("pods", "list"), ("pods/log", "get"), ("events", "list")]
)
def test_a_missing_permission_is_named_before_a_job_is_made(
    pytorch: Cluster, role: list[Mapping[str, Any]], resource: str, verb: str
) -> None:
    pytorch.api.rules = [{**rule, "verbs": [v for v in rule["verbs"] if v != verb or resource not in rule["resources"]]} for rule in role]
    words = pytorch.fails()
    full = "pytorchjobs.kubeflow.org" if resource == "pytorchjobs" else resource
    assert f"may not {verb} {full} in namespace team-a" in words
    assert f"--verb={verb} --resource={full}" in words
    assert "permissions.create=true" in words
    assert ACCOUNT in words, "who may not is not said"
    assert not pytorch.api.all("pytorchjobs")


def test_a_missing_operator_is_named(cluster: Cluster) -> None:
    cluster.api.installed -= {"pytorchjobs", "trainjobs", "trainingruntimes"}
    words = cluster.fails()
    assert f"does not know {KINDS[cluster.backend].kind}" in words
    assert f"install {KINDS[cluster.backend].operator}" in words


def test_a_launcher_outside_of_a_cluster_says_so_and_one_with_a_kubeconfig_uses_it(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = tmp_path / "config"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(settings))
    with pytest.raises(UserError, match=r"run the pipeline on a cluster, or set cluster\.backend=local"):
        connect()
    entry = {"contexts": ("context", {"cluster": "c", "namespace": "team-a"}), "clusters": ("cluster", {"server": pytorch.api.url})}
    tree = {key: [{"name": "c", what: value}] for key, (what, value) in entry.items()}
    settings.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [], **tree}))
    client, namespace = connect()
    assert namespace == "team-a"
    assert Api(client, namespace, KINDS["pytorchjob"], pytorch.clock).jobs("") == []


def test_an_unknown_claim_is_refused_before_a_job_is_made(cluster: Cluster) -> None:
    assert "claim elsewhere is not in namespace team-a" in cluster.fails(config_of(cluster.backend, claim="elsewhere"))
    assert not cluster.creations


def test_an_absent_secret_or_key_is_refused_before_a_job_is_made(cluster: Cluster) -> None:
    config = config_of(cluster.backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}})
    assert "secret hf is not in namespace team-a" in cluster.fails(config)
    cluster.api.put("secrets", "hf", data={"other": "c2VjcmV0"})
    words = cluster.fails(config)
    assert "secret hf has no key token: it has other" in words
    assert "c2VjcmV0" not in words + cluster.said
    assert not cluster.creations


def test_an_absent_runtime_is_refused_before_a_job_is_made(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for cluster in _cluster("trainjob", capsys, monkeypatch):
        assert "TrainingRuntime mine is not in namespace team-a" in cluster.fails(config_of("trainjob", runtime="mine"))
        node = {"name": "node", "template": {"spec": {"template": {"spec": {"schedulerName": "default-scheduler"}}}}}
        cluster.api.put("trainingruntimes", "canvastune", spec={"template": {"spec": {"replicatedJobs": [node]}}})
        assert "TrainingRuntime canvastune has default-scheduler" in cluster.fails(config_of("trainjob", scheduler="volcano"))
        assert not cluster.creations


@pytest.mark.skipif(not Path(__file__).parents[2].joinpath("shared/crds").exists(), reason="the operators' CRDs are not at hand")
def test_what_the_api_server_does_not_know_is_refused_in_its_words(pytorch: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    real = launching.manifest
    monkeypatch.setattr(launching, "manifest", lambda *args: {**real(*args), "spec": {**real(*args)["spec"], "nproc": 8}})
    assert "refuses to create pytorchjobs (HTTP 422): spec: Additional properties are not allowed ('nproc'" in pytorch.fails()


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


_WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "flow", "uid": "w-1", "controller": True}


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
        cluster.api.put("pods", "launcher-pod", status={}, metadata={"ownerReferences": [_WORKFLOW]})
        cluster.api.put("workflows", "flow", **workflow)
    cluster.at(2, cluster.operator.pending)
    cluster.clock.at(20, lambda: (_ for _ in ()).throw(KeyboardInterrupt))  # what SIGTERM becomes
    with pytest.raises(KeyboardInterrupt):
        cluster.launch()
    assert bool(cluster.api.all(cluster.operator._plural)) == kept
    assert ("is left running" in cluster.said) == kept


def test_the_workflow_owns_the_job_so_that_both_go_together(cluster: Cluster) -> None:
    workflow = cluster.api.put("workflows", "flow", spec={}, status={"phase": "Running"})
    owner = {**_WORKFLOW, "uid": workflow["metadata"]["uid"]}
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
    monkeypatch.setattr(closing.tracking, "finish_parent", lambda *_, **__: None)
    folder = tmp_path / "runs" / "mine"
    for job_id, left in (("another", 1), ("run-1", 0)):
        write_record(folder, RunRecord(job_id, config_of(cluster.backend).model_dump_json(), ""))
        closing.finish(str(tmp_path), "mine", "", job_id, succeeded=False)
        assert len(cluster.api.all(cluster.operator._plural)) == left


def test_a_finished_training_asks_for_no_job(pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "connect", lambda: pytest.fail("asked the cluster"))
    (tmp_path / "result.json").write_text(json.dumps({"export": "adapter"}))
    launching.run(config_of(), None, tmp_path, None, {}, None)


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
    api = Api
    monkeypatch.setattr(launching, "Api", lambda client, namespace, kind: api(client, namespace, kind, pytorch.clock))
    launching.run(config_of(mount_path=str(tmp_path)), data, output, "abc", environment, None)
    manifest = json.dumps(pytorch.operator.job)
    assert (output / "data" / "train" / "rows.arrow").read_text() == "rows"
    assert f'--data", "{output / "data"}' in manifest
    assert "hunter2" not in manifest
    assert [entry.name for entry in output.iterdir() if entry.name.startswith(".")] == []

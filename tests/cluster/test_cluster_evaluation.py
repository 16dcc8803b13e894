"""Evaluation on a cluster: a job with the accelerators of `evaluate.gpus`, next to the run's training
job.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import parse_config
from canvastune.errors import UserError
from canvastune.evaluation.result import EvaluationResult
from canvastune.tracking import StepRun
from components.evaluate.step import run_evaluation
from components.jobs.client import KubernetesClient
from components.run_directory import RunRecord, write_record
from tests.fakes.fake_kubernetes import Operator
from tests.support.cluster_stage import Cluster, config_of
from tools.report_sample import sample_result

RESULT = sample_result(after=32)


def _answered(
    cluster: Cluster,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float = 50,
    gpus: int | None = None,
    **settings: Any,
) -> EvaluationResult:
    """Evaluate a run of two nodes with eight accelerators each; the fake pod writes its result
    after `seconds`.
    """
    for name in ("artifact/validation", "runs/a/model"):
        (folder / name).mkdir(parents=True)
    write_record(folder / "runs/a", RunRecord("run-1", "", ""))
    monkeypatch.setattr(KubernetesClient, "from_environment", lambda _: cluster.client())
    elapsed = cluster.clock.now - cluster.clock.start

    def write() -> None:
        (folder / "runs/a/evaluation").mkdir()
        RESULT.write(folder / "runs/a/evaluation")

    cluster.at(elapsed + seconds, write)
    tree = config_of(
        cluster.backend, nodes=2, rdma_resource="rdma/ib", mount_path=str(folder), **settings
    ).model_dump(mode="json")
    tree["evaluate"]["gpus"] = gpus
    return run_evaluation(
        parse_config(tree),
        folder / "artifact",
        folder / "runs/a/model",
        folder / "runs/a",
        folder / "out",
        StepRun(),
    )


def test_it_is_a_job_of_one_pod_with_one_accelerator(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster.goes_well()
    made: list[dict[str, Any]] = []
    cluster.at(5, lambda: made.append(json.loads(json.dumps(cluster.operator.job))))
    assert _answered(cluster, tmp_path, monkeypatch) == RESULT
    text = json.dumps(made[0])
    assert made[0]["metadata"]["name"].startswith("evaluate-gsm8k-lora-")
    assert made[0]["metadata"]["labels"]["app.kubernetes.io/component"] == "evaluate"
    assert '"nvidia.com/gpu": "1"' in text
    assert "rdma/ib" not in text
    spec = made[0]["spec"]
    if cluster.backend == "pytorchjob":
        assert (spec["nprocPerNode"], list(spec["pytorchReplicaSpecs"])) == ("1", ["Worker"])
    else:
        assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (1, 1)
    assert f'"-m", "canvastune.evaluate", "-c", "{tmp_path}/runs/a/train/recipe.yaml"' in text
    assert (tmp_path / "out/evaluation.json").is_file()
    assert "step 1/800" in capsys.readouterr().out, "the pod's log is not shown"


@pytest.mark.parametrize(("gpus", "pods", "each"), [(3, 1, 3), (8, 1, 8), (16, 2, 8)])
def test_it_has_the_accelerators_of_the_recipe(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    pods: int,
    each: int,
) -> None:
    cluster.goes_well()
    made: list[dict[str, Any]] = []
    cluster.at(5, lambda: made.append(json.loads(json.dumps(cluster.operator.job))))
    assert _answered(cluster, tmp_path, monkeypatch, gpus=gpus) == RESULT
    text, spec = json.dumps(made[0]), made[0]["spec"]
    assert f'"nvidia.com/gpu": "{each}"' in text
    assert ("rdma/ib" in text) == (pods > 1), "a network that one pod does not need, or no network"
    if cluster.backend == "pytorchjob":
        assert (spec["nprocPerNode"], spec["pytorchReplicaSpecs"]["Worker"]["replicas"]) == (
            str(each),
            pods,
        )
    else:
        assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (pods, each)


def test_the_training_job_of_the_run_is_not_changed(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytorch.goes_well()
    pytorch.launch()
    trained = pytorch.operator.job["metadata"]["name"]
    elapsed = pytorch.clock.now - pytorch.clock.start
    operator = Operator(pytorch.api, "pytorchjobs", role="evaluate")
    pytorch.at(elapsed + 2, operator.running)
    pytorch.at(elapsed + 60, operator.succeeded)
    _answered(pytorch, tmp_path, monkeypatch)
    names = [job["metadata"]["name"] for job in pytorch.jobs()]
    assert trained in names
    assert len(names) == 2


class Queue:
    """A Kueue queue of 16 accelerators: it admits the evaluation's job once enough are free."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.others = cluster, 0  # held by other teams
        self.operator = Operator(cluster.api, cluster.kind.plural, role="evaluate")
        self.most, self._admitted = 0, False

    def held(self) -> int:
        """Return the accelerators of this namespace's pods, as quotas and Kueue count them."""
        return sum(
            int(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
            for pod in self.cluster.api.all("pods")
            if pod["status"]["phase"] not in ("Succeeded", "Failed")
        )

    def look(self) -> None:
        """Admit the evaluation's job, or say why not; end it a minute later."""
        if self._admitted:
            return
        request, free = _gpus(self.operator.job), 16 - self.held() - self.others
        if request > free:
            if not self.cluster.api.all("workloads"):
                self.operator.in_queue(
                    "couldn't assign flavors to pod set node: insufficient unused quota for "
                    f"nvidia.com/gpu in flavor h100, {request - free} more needed"
                )
            return
        self._admitted = True
        for workload in self.cluster.api.all("workloads"):
            self.cluster.api.remove("workloads", workload["metadata"]["name"])
        self.operator.pending()
        self.operator.running()
        self.most = max(self.most, self.held() + self.others)
        clock = self.cluster.clock
        self.cluster.at(clock.now - clock.start + 60, self.operator.succeeded)


def _gpus(job: dict[str, Any]) -> int:
    (found,) = set(re.findall(r'"nvidia.com/gpu": "(\d+)"', json.dumps(job)))
    return int(found)


def test_the_accelerators_are_free_between_training_and_the_answers(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training takes the whole queue and gives it back; another team takes it; the answers wait
    for one accelerator, and say so.
    """
    queue, held = Queue(cluster), list[int]()
    cluster.goes_well()
    cluster.at(30, lambda: held.append(queue.held()))
    cluster.launch(config_of(cluster.backend, nodes=2, queue="team-a"))
    held.append(queue.held())
    assert held == [16, 0], "at half of training, and when the step `train` has ended"
    queue.others = 16
    start = cluster.clock.now - cluster.clock.start
    for second in range(2, 400, 10):
        cluster.at(start + second, queue.look)
    cluster.at(start + 300, lambda: setattr(queue, "others", 0))
    waits: dict[str, Any] = {"queue": "team-a", "queue_hours": 24}
    assert _answered(cluster, tmp_path, monkeypatch, seconds=350, **waits) == RESULT
    assert queue.most == 1, "accelerators of both jobs at the evaluation's start"
    said = capsys.readouterr().out
    assert re.search(r"LocalQueue team-a\b.* 2026-11-24T12:01:", said)
    assert "nvidia.com/gpu in flavor h100, 1 more needed (reason=WaitingInQueue)" in said
    assert said.index("reason=WaitingInQueue") < said.index("reason=JobRunning")
    assert queue.held() == 0


def test_a_failed_evaluation_reports_the_reason(
    pytorch: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(5, pytorch.operator.running)
    pytorch.log(6, "canvastune: error: evaluate.answer_pattern: matches none")
    pytorch.at(20, pytorch.operator.failed)
    with pytest.raises(UserError, match=r"evaluate\.answer_pattern"):
        _answered(pytorch, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()

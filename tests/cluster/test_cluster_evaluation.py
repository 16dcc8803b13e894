"""Evaluation of a large model: a job of one pod with one accelerator, next to the run's training
job.
"""

from __future__ import annotations

import json
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


def _answered(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationResult:
    """Evaluate a run of two nodes with eight accelerators each; the fake pod writes its result
    after 50 seconds.
    """
    for name in ("artifact/validation", "runs/a/model"):
        (folder / name).mkdir(parents=True)
    write_record(folder / "runs/a", RunRecord("run-1", "", ""))
    monkeypatch.setattr(KubernetesClient, "from_environment", lambda _: cluster.client())
    elapsed = cluster.clock.now - cluster.clock.start

    def write() -> None:
        (folder / "runs/a/evaluation").mkdir()
        RESULT.write(folder / "runs/a/evaluation")

    cluster.at(elapsed + 50, write)
    tree = config_of(
        cluster.backend, nodes=2, rdma_resource="rdma/ib", mount_path=str(folder)
    ).model_dump(mode="json")
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

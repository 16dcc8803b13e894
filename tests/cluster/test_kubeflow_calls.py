"""The plain Kubeflow commands and calls that docs/journeys.md gives, tried with the real ones
against a fake of Kubeflow's API.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kfp
import pytest
import yaml

from pipelines.kfp_client import KubeflowClient
from pipelines.submit import compile_pipeline, upload
from tests.fakes.fake_kubeflow import FakeKubeflow

pytestmark = pytest.mark.filterwarnings("ignore:This client only works:FutureWarning")
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"
COMPILED = ROOT / "pipelines" / "finetune.yaml"


@pytest.fixture
def kubeflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubeflow]:
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    with FakeKubeflow() as fake:
        yield fake


ARGUMENTS = {"recipe": RECIPE.read_text(), "overrides": "lora.rank=32", "dataset": "openai/gsm8k"}
SETTINGS = {"backend": "pytorchjob", "claim": "team-a-workspace"}


def _kfp(fake: FakeKubeflow, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "kfp"), "--endpoint", fake.host, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_command_runs_the_uploaded_version(kubeflow: FakeKubeflow) -> None:
    upload(KubeflowClient(kubeflow.host), cluster=json.dumps(SETTINGS))
    (pipeline,) = json.loads(_kfp(kubeflow, "--output", "json", "pipeline", "list"))
    (version,) = json.loads(
        _kfp(kubeflow, "--output", "json", "pipeline", "list-versions", pipeline["pipeline_id"])
    )
    named = [f"{key}={value}" for key, value in ARGUMENTS.items()]
    _kfp(
        kubeflow,
        "run",
        "create",
        "-e",
        "demo",
        "-r",
        "gsm8k",
        "-p",
        pipeline["pipeline_id"],
        "-v",
        version["pipeline_version_id"],
        *named,
    )
    (run,) = kubeflow.runs
    assert run["display_name"] == "gsm8k"
    assert run["pipeline_version_reference"] == {
        "pipeline_id": "pipeline-1",
        "pipeline_version_id": "version-1",
    }
    assert run["runtime_config"]["parameters"] == ARGUMENTS


def test_the_plain_command_runs_the_file(kubeflow: FakeKubeflow) -> None:
    named = [f"{key}={value}" for key, value in ARGUMENTS.items()]
    quoted = (  # a value that reads as JSON arrives as an object unless it is quoted once more
        f"cluster={json.dumps(json.dumps(SETTINGS))}"
    )
    _kfp(
        kubeflow,
        "run",
        "create",
        "-e",
        "demo",
        "-r",
        "gsm8k",
        "-f",
        str(COMPILED),
        *named,
        "volume_claim=team-a-workspace",
        quoted,
    )
    parameters = kubeflow.runs[0]["runtime_config"]["parameters"]
    assert parameters == {
        **ARGUMENTS,
        "volume_claim": "team-a-workspace",
        "cluster": json.dumps(SETTINGS),
    }


def test_the_plain_client_runs_the_uploaded_version(kubeflow: FakeKubeflow) -> None:
    upload(KubeflowClient(kubeflow.host))
    client = kfp.Client(host=kubeflow.host)
    pipeline = client.list_pipelines(filter=json.dumps({"predicates": []})).pipelines[0]
    assert client.get_pipeline_id("canvastune-finetune") == pipeline.pipeline_id
    version = client.list_pipeline_versions(
        pipeline.pipeline_id, sort_by="created_at desc"
    ).pipeline_versions[0]
    experiment = client.create_experiment("demo")
    run = client.run_pipeline(
        experiment.experiment_id,
        "gsm8k",
        params=ARGUMENTS,
        pipeline_id=pipeline.pipeline_id,
        version_id=version.pipeline_version_id,
    )
    client.wait_for_run_completion(run.run_id, timeout=60)
    assert kubeflow.runs[0]["runtime_config"]["parameters"] == ARGUMENTS


def test_the_plain_client_runs_the_file(kubeflow: FakeKubeflow) -> None:
    client = kfp.Client(host=kubeflow.host)
    client.create_run_from_pipeline_package(
        str(COMPILED),
        {**ARGUMENTS, "cluster": json.dumps(SETTINGS)},
        run_name="gsm8k",
        experiment_name="demo",
    )
    (run,) = kubeflow.runs
    assert run["runtime_config"]["parameters"] == {**ARGUMENTS, "cluster": json.dumps(SETTINGS)}
    assert run["pipeline_spec"].get("pipeline_spec", run["pipeline_spec"]) == next(
        iter(yaml.safe_load_all(COMPILED.read_text()))
    )


def test_compile_leaves_every_parameter_but_the_recipe_a_default(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "finetune.yaml")
    spec, *_ = yaml.safe_load_all((tmp_path / "finetune.yaml").read_text())
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    without = [name for name, about in parameters.items() if "defaultValue" not in about]
    assert without == ["recipe"]
    assert all(
        about["parameterType"] in ("STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE", "BOOLEAN")
        for about in parameters.values()
    )

"""Whose folder a run's is, and what its config is made of.

Recipe, overrides and the chart's defaults.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from canvastune.errors import UserError
from canvastune.tracking.client import TrackingClient
from components.resolve import step as resolution
from components.run_directory import read_record, write_record
from components.run_owner import OWNER, own_run

RECIPE = """
name: small
model: {{id: {model}}}
data: {{source: {data}, seq_length: 96, validation_fraction: 0.2, validation_rows: 4}}
"""


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Resolve a recipe as the run `mine` of a pipeline job, without MLflow."""
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    recipe = RECIPE.format(model=tmp_path, data=tmp_path / "rows.jsonl")
    return lambda job="job-1", overrides="", dataset="", cluster="{}": resolution.resolve(
        recipe, overrides, dataset, str(tmp_path), "mine", "job", job, cluster
    )


def test_a_retried_step_finds_its_own_folder(resolve: Any) -> None:
    assert resolve() == resolve()


def test_another_job_goes_on_with_an_unfinished_run_only(resolve: Any) -> None:
    folder = Path(resolve("job-1").run_folder)
    assert resolve("job-2").run_folder == str(folder)
    record = read_record(folder)
    assert record is not None
    assert record.job_id == "job-2"
    assert record.known_as == "job-1", "MLflow would show two runs"
    write_record(folder, replace(record, finished=True))
    with pytest.raises(UserError, match="runs/mine"):
        resolve("job-3")


def test_a_run_folder_is_refused_to_another_recipe_or_other_data(
    resolve: Any, tmp_path: Path
) -> None:
    resolve("job-1")
    with pytest.raises(
        UserError,
        match=r"train\.method.*'lora'.*'full'.*optimizer\.lr.*0\.00015.*0\.01",
    ):
        resolve("job-2", overrides="optimizer.lr=0.01\ntrain.method=full")
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('{"question": "1+2?", "answer": "#### 3"}\n')
    with pytest.raises(UserError, match="runs/mine"):
        resolve("job-3")


def test_a_run_of_this_machine_starts_over_until_something_is_trained(
    resolve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(resolve("job-1").run_folder)
    rows = tmp_path / "rows.jsonl"
    with own_run(folder):
        monkeypatch.setenv(OWNER, str(os.getpid()))
        (folder / "data").mkdir()
        rows.write_text('{"question": "1+2?", "answer": "#### 3"}\n')  # corrected
        resolved = resolve("job-2", overrides="data.validation_fraction=0.3")
        assert json.loads(resolved.config)["data"]["validation_fraction"] == 0.3
        record = read_record(folder)
        assert record is not None
        assert record.known_as == "job-1", "MLflow would show two runs"
        assert not (folder / "data").exists(), "the card of other rows"
        (folder / "train").mkdir()
        for overrides in ("", "data.validation_fraction=0.4"):
            with pytest.raises(UserError, match="runs/mine"):
                resolve("job-3", overrides=overrides)


def test_another_job_may_change_what_affects_no_weight(resolve: Any) -> None:
    resolve("job-1")
    changes = (
        "evaluate.rows=2",
        "tracking.promote=never",
        "train.log_every=1",
        "parallel.nproc_per_node=1",
        "hardware.gpu_memory=9",
    )
    config = json.loads(
        resolve("job-2", overrides="\n".join(changes), cluster='{"backend": "trainjob"}').config
    )
    assert (
        config["evaluate"]["rows"],
        config["tracking"]["promote"],
        config["train"]["log_every"],
    ) == (2, "never", 1)
    assert (config["parallel"]["nproc_per_node"], config["cluster"]["backend"]) == (1, "trainjob")


def test_the_charts_defaults_lie_beneath_the_recipe_and_its_overrides(resolve: Any) -> None:
    chart = {
        "backend": "pytorchjob",
        "nodes": 2,
        "cpu": "32",
        "env": {"NCCL_DEBUG": "WARN", "HTTPS_PROXY": "proxy"},
    }
    config = json.loads(resolve(overrides="cluster.cpu=8", cluster=json.dumps(chart)).config)
    assert (config["cluster"]["cpu"], config["cluster"]["nodes"]) == ("8", 2)


def test_the_charts_mlflow_is_that_of_every_step_unless_the_recipe_names_one(resolve: Any) -> None:
    chart = json.dumps({"env": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}})
    assert (
        json.loads(resolve("job-1", cluster=chart).config)["tracking"]["uri"]
        == "http://mlflow:5000"
    )
    shutil.rmtree(resolve("job-1", cluster=chart).run_folder)
    named = resolve("job-1", overrides="tracking.uri=http://other", cluster=chart)
    assert json.loads(named.config)["tracking"]["uri"] == "http://other"


@pytest.mark.parametrize(
    ("change", "outdated"),
    [
        ("evaluate.rows=2", {"evaluation", "plan", "report"}),
        ("hardware.gpu_memory=9", {"plan", "report"}),
        ("seed=42", set()),  # as before
    ],
)
def test_what_an_earlier_attempt_evaluated_and_reported_with_other_settings_is_made_again(
    resolve: Any, change: str, outdated: set[str]
) -> None:
    folder = Path(resolve("job-1").run_folder)
    for name in ("train", "model", "evaluation", "plan", "report"):
        (folder / name).mkdir()
    resolve("job-2", overrides=change)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "train",
        "model",
        "evaluation",
        "plan",
        "report",
    } - outdated


@pytest.mark.parametrize(
    ("cluster", "words"),
    [("{", "not JSON"), ("[]", "a JSON object"), ('{"nods": 1}', "'cluster.nodes'?")],
)
def test_wrong_defaults_of_the_chart_are_refused(resolve: Any, cluster: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(cluster=cluster)
    assert words in f"{error.value} {error.value.hint}"


def test_prepared_data_depends_on_content_and_on_data_settings_alone(
    resolve: Any, tmp_path: Path
) -> None:
    first = resolve()
    read = lambda resolved: (resolved.data_config, resolved.data_fingerprint)  # noqa: E731
    (tmp_path / "runs/mine/run.json").unlink()
    assert read(resolve(overrides="optimizer.lr=0.01\ntrain.steps=7")) == read(first), (
        "a changed learning rate would prepare the data again"
    )
    (tmp_path / "runs/mine/run.json").unlink()
    assert read(resolve(overrides="data.seq_length=64")) != read(first)
    (tmp_path / "runs/mine/run.json").unlink()
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 3"}\n'
    )  # the same size
    assert read(resolve()) != read(first), (
        "a changed file at the same path would be answered from the cache"
    )


def test_dataset_replaces_the_recipes_source(resolve: Any, tmp_path: Path) -> None:
    other = tmp_path / "on: other #1.jsonl"  # would be something else as plain YAML
    other.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert json.loads(resolve(dataset=str(other)).config)["data"]["source"] == str(other)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", "-x"])
def test_a_run_name_cannot_lead_out_of_the_workspace(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run_name"):
        resolution.run_directory(str(tmp_path), name, "")


def test_mlflow_is_told_where_the_run_is_in_kubeflow(
    resolve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr(resolution.tracking, "start", lambda _, tags, __: told.update(tags) or "")
    recipe = RECIPE.format(model=tmp_path, data=tmp_path / "rows.jsonl")
    image, host = "registry.example/pipeline@sha256:1", "https://kubeflow.example/pipeline/"
    resolution.resolve(
        recipe,
        "",
        "",
        str(tmp_path),
        "mine",
        "gsm8k",
        "job-1",
        pipeline_image=image,
        kubeflow_url=host,
    )
    assert told == {
        "canvastune.pipeline_job": "gsm8k",
        "canvastune.pipeline_url": "https://kubeflow.example/pipeline/#/runs/details/job-1",
        "canvastune.pipeline_image": image,
    }


@pytest.mark.parametrize(("version", "warns"), [("2.22.1", True), ("3.5.0", False), ("", False)])
def test_an_old_mlflow_server_is_named_at_the_start_and_does_not_end_the_run(
    resolve: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    warns: bool,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.com")
    monkeypatch.setattr(TrackingClient, "server_version", lambda _: version)
    folder = resolve().run_folder
    said = capsys.readouterr().out
    words = "MLflow at http://mlflow.example.com: found version 2.22.1, expected 3.5 or newer"
    assert (words in said) == (f"canvastune sync {folder}" in said) == warns

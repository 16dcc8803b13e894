"""What MLflow shows of a pipeline run: runs, figures, data, models.

Attempts at a run: test_tracking_attempts. Outages: test_tracking_outages. Texts and traces:
test_tracking_texts.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from canvastune import tracking
from canvastune.errors import UserError, parse_error
from canvastune.tracking import client as server
from canvastune.tracking.client import connect
from canvastune.tracking.descriptions import describe_report
from canvastune.tracking.live_metrics import points_of
from components.run_directory import RunRecord, write_record
from pipelines.cli import main
from tests.fakes.tracking_server import prepared, train_record
from tests.support.pipeline_runs import client_of, config, nested_runs, pipeline_run
from tools.report_sample import sample_result

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.usefixtures("own_mlflow")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One embedded store for the module: making its tables takes two seconds."""
    return tmp_path_factory.mktemp("workspace")


def test_metrics_have_mlflows_names() -> None:
    validation = {
        "kind": "validation",
        "step": 5,
        "time": 2.0,
        "loss": 1.5,
        "levels": {"0.5": 1.25},
        "autoregressive_loss": None,
    }
    event = {"kind": "event", "step": 5, "time": 2.0, "event": "checkpoint", "detail": ""}
    system = {"kind": "system", "step": 0, "time": 2.0, "cpu_utilization_percentage": 97.0}
    points = points_of(
        [train_record(1, **{"a(b)": 2.0, "bad": math.inf}), validation, event, system]
    )
    assert {point.key: point.value for point in points} == {
        "train/loss": 1.0,
        "train/lr": 1e-3,
        "train/a_b_": 2.0,
        "val/loss": 1.5,
        "val/loss_t0.5": 1.25,
        "system/cpu_utilization_percentage": 97.0,
    }
    assert {point.step for point in points if point.key.startswith("val/")} == {5}, (
        "the step axis is the training step"
    )


def test_figures_are_rounded_to_what_means_something_and_whole_numbers_are_kept() -> None:
    sent = {
        "loss": 0.12345678901234567,
        "lr": 1.2345678901234e-05,
        "bytes": 83_886_080_123,
        "rate": 12_345_678.912,
        "worse": -1 / 3,
        "none": 0,
    }
    points = points_of([{"kind": "train", "step": 3, "time": 2.0, **sent}])
    assert {point.key.removeprefix("train/"): point.value for point in points} == {
        "loss": 0.1234568,
        "lr": 1.234568e-05,
        "bytes": 83_886_080_123,
        "rate": 12_345_679,
        "worse": -0.3333333,
        "none": 0,
    }


# Where MLflow is


def test_the_tracking_server_comes_from_environment_then_recipe_then_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.tracking_uri(config(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    strange = tmp_path / "is it 100%20?"
    strange.mkdir()
    store = tracking.tracking_uri(config(), strange)
    number = connect(store).experiment("one")
    assert (strange / "mlflow.db").is_file(), "MLflow reads the workspace's path as another one"
    client = server.load_mlflow().MlflowClient(store)
    client.log_text(client.create_run(number).info.run_id, "here", "note.txt")
    assert list((strange / "mlartifacts").rglob("note.txt"))
    assert (
        tracking.tracking_uri(config(tracking={"uri": "sqlite:///own/m.db"}), tmp_path)
        == f"sqlite:///{tmp_path}/own/m.db"
    )
    assert (
        tracking.tracking_uri(config(tracking={"uri": "http://mlflow:5000"}), tmp_path)
        == "http://mlflow:5000"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert (
        tracking.tracking_uri(config(tracking={"uri": "http://mlflow:5000"}), tmp_path)
        == "http://other:5000"
    )


def test_importing_the_room_does_not_import_mlflow() -> None:
    check = "import sys, canvastune.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0, (
        "every rank would pay MLflow's two seconds"
    )


# Runs


def test_every_step_of_a_pipeline_run_finds_the_same_parent(workspace: Path) -> None:
    run = pipeline_run(workspace, "demo", model={"id": "some/model", "revision": "abc"})
    tags = {"canvastune.pipeline_url": "https://kubeflow.example/#/runs/details/1"}
    parent = tracking.start(run, tags)
    assert parent
    about = client_of(workspace).get_experiment("1").tags
    assert about["mlflow.experimentKind"] == "custom_model_development"
    assert "*Model training*" in about["mlflow.note.content"], "the switch that shows the runs"
    assert tracking.start(run) == parent
    assert tracking.start(replace(run, job="another")) != parent
    found = client_of(workspace).get_run(parent)
    assert found.info.run_name == "demo"
    assert found.data.params["lora.rank"] == "16"
    assert found.data.tags["canvastune.model"] == "some/model"
    assert found.data.tags["canvastune.model_revision"] == "abc"
    assert found.data.tags["canvastune.method"] == "lora"
    assert found.data.tags["canvastune.data"] == "openai/gsm8k"
    assert found.data.tags.items() >= tags.items()
    assert [file.path for file in client_of(workspace).list_artifacts(parent)] == ["config.yaml"]
    assert (workspace / "mlartifacts" / parent / "artifacts" / "config.yaml").is_file(), (
        "artifacts are in the current directory, not in the workspace"
    )


def test_parameters_are_the_settings_that_say_something(workspace: Path) -> None:
    client = client_of(workspace)
    lora = tracking.start(pipeline_run(workspace, "spare", evaluate={"gpus": 2}))
    full = pipeline_run(
        workspace, "full", train={"method": "full"}, cluster={"backend": "pytorchjob", "shm": "9Gi"}
    )
    params = {run: client.get_run(run).data.params for run in (lora, tracking.start(full))}
    first, second = params.values()
    for found in (first, second):
        assert not {"None", "[]", "{}", ""} & set(found.values()), found
    cluster = {name: text for name, text in first.items() if name.startswith("cluster.")}
    assert cluster == {"cluster.backend": "local", "cluster.nodes": "1"}
    assert second["cluster.shm"] == "9Gi"
    assert "lora.rank" in first, "a default that is used"
    assert "lora.rank" not in second, "MLflow's comparison shows a rank of full fine-tuning"
    for query, runs in (("`evaluate.gpus` = '2'", [lora]), ("`cluster.shm` = '9Gi'", [full])):
        names = {"spare" if run == lora else "full" for run in runs}
        found = client.search_runs(["1"], f"params.{query} and attributes.run_name != ''")
        assert {run.info.run_name for run in found} == names, query


def test_a_run_is_described_from_its_start(workspace: Path) -> None:
    run = pipeline_run(
        workspace, "described", data={"source": "rows|of `mine`.jsonl"}, lora={"rank": 32}
    )
    note = client_of(workspace).get_run(tracking.start(run)).data.tags["mlflow.note.content"]
    for part in (
        "32",
        "`google/diffusiongemma-26B-A4B-it`",
        "'rows\\|of `mine`.jsonl'",
        "800",
        "8",
    ):
        assert re.search(rf"(^|\s){re.escape(part)}[\s,]", note.splitlines()[0]), part
    assert f"| run folder | `{run.folder}` |" in note
    assert "config.yaml" in note


def test_the_description_ends_with_verdict_figures_and_places(workspace: Path) -> None:
    run = pipeline_run(workspace, "reported")
    figures = {
        "val/loss_first": 3.0,
        "val/loss_last": 1.5,
        "train/loss_first": 5.3,
        "train/loss_last": 0.8,
    }
    found = sample_result(64, before=8, after=40, lost=1)
    note = describe_report(run.config, run.folder, figures, found)
    assert re.match(r"\*\*Better\*\*: \D+12\.5%\D+62\.5%\D+33\D+1\D+64\D", note)
    (row,) = re.findall(r"^\| exact match .*", note, re.MULTILINE)
    assert re.findall(r"[\d.]+%", row.partition(" | ")[2]) == [
        *("12.5%", "6.5%", "22.8%"),
        *("62.5%", "50.3%", "73.3%"),
    ]
    assert "| validation loss | 3.000 | 1.500 |" in note
    own = {"eval/validation_loss_before": 2.9, "eval/validation_loss_after": 1.4}
    assert "| validation loss | 2.900 | 1.400 |" in describe_report(
        run.config, run.folder, figures | own, found
    )
    for place in ("report/report.html", "train/adapter", "model", "train/checkpoints"):
        assert f"`{run.folder / place}`" in note
    unscored = sample_result(0, 0, 0, 0)
    told = describe_report(run.config, run.folder, figures, unscored)
    assert str(unscored.unscored_reason) in told
    assert not re.search(r"exact match\b[^:\n]*\d", told)


def test_canvastune_sync_sends_what_waits_or_says_why_it_cannot(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = pipeline_run(workspace, "late")
    write_record(run.folder, RunRecord("job", run.config.model_dump_json(), ""))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: no server
    assert tracking.start(run) == ""
    assert main(["sync", str(run.folder)]) == 1
    refused = os.strerror(errno.ECONNREFUSED)
    assert re.search(rf"http://127\.0\.0\.1:9\b.*\({refused}\)", capsys.readouterr().err)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["sync", str(run.folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{run.folder}: MLflow at sqlite:///")
    (found,) = client_of(workspace).search_runs(["1"], "attributes.run_name = 'late'")
    assert found.data.params["lora.rank"] == "16"
    assert main(["sync", str(tmp_path)]) == 1
    error = parse_error(capsys.readouterr().err)
    assert error is not None
    assert str(error).startswith(f"{tmp_path}: ")
    assert "run.json" in str(error)


def test_a_step_is_a_nested_run_that_a_second_attempt_goes_on_with(
    workspace: Path, tmp_path: Path
) -> None:
    started = pipeline_run(workspace, "steps")
    parent = tracking.start(started)
    client = client_of(workspace)

    def attempt(broken: bool) -> str:
        with tracking.step_run(started, "merge_lora") as run:
            assert run.run_id is not None
            run.parameters({"rank": 16, "long": "x" * 7000})
            run.model(_weights(tmp_path), "adapter")
            run.table([{"id": "a", "after": "<b>4</b>"}, {"id": "b", "after": "5"}])
            run.metrics(
                {
                    "eval/exact_match_after": 0.75,
                    "ratio (t/s)": 2 / 3,
                    "endless": math.inf,
                    "passed": True,
                    "word": "better",
                }
            )
            if broken:
                raise UserError("base: found b")
            return run.run_id

    with pytest.raises(UserError, match="base: found b"):
        attempt(broken=True)
    (failed,) = nested_runs(client, parent)
    assert failed.info.status == "FAILED"
    assert "base: found b" in failed.data.tags["canvastune.error"]

    run_id = attempt(broken=False)
    assert run_id == failed.info.run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.metrics == {"eval/exact_match_after": 0.75, "ratio _t/s_": 0.6666667}
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "answers.json", "type": "table"}
    ], "the page shows no table"
    table = json.loads(
        (workspace / "mlartifacts" / run_id / "artifacts" / "answers.json").read_text()
    )
    assert table == {
        "columns": ["id", "after"],
        "data": [["a", "<b>4</b>"], ["b", "5"]],
    }, "a second attempt replaces the table"
    assert [
        model.name for model in client.search_logged_models(["1"], f"source_run_id = '{run_id}'")
    ] == ["steps-adapter"]
    assert tracking.pending(started) == [], "something was not sent although MLflow was there"


def test_curves_arrive_while_another_process_trains_and_resumes(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run, path = pipeline_run(workspace, "live"), tmp_path / "metrics.jsonl"
    tracking.start(run)
    client = client_of(workspace)

    def sent(record: tracking.StepRun, metric: str) -> list[int]:
        return sorted(m.step for m in client.get_metric_history(record.run_id, metric))

    def wait_for(record: tracking.StepRun, steps: list[int]) -> None:
        deadline = time.monotonic() + 60
        while (found := sent(record, "train/loss")) != steps:
            assert time.monotonic() < deadline, f"{found} arrived of {steps}"
            time.sleep(0.1)

    with tracking.step_run(run, "train") as record, record.live_curves(path):
        first = tracking.MetricsWriter(path)
        for step in (1, 2, 3, 4):
            first.write(train_record(step))
        wait_for(record, [1, 2, 3, 4])
        first.close()
        second = tracking.MetricsWriter(path)
        assert len(second.resume(2)) == 2
        for step in (3, 4, 5):
            second.write(train_record(step))
        wait_for(record, [1, 2, 3, 4, 5])
        second.close()
    assert sent(record, "train/loss") == [1, 2, 3, 4, 5], "a step was sent twice"
    assert sent(record, "system/cpu_utilization_percentage"), "nothing of the machine was measured"


def test_models_have_the_figures_of_their_run_and_the_data_set_that_they_are_of(
    workspace: Path, tmp_path: Path
) -> None:
    run = pipeline_run(workspace, "figures")
    parent = tracking.start(run)
    with tracking.step_run(run, "train") as record:
        record.model(_weights(tmp_path / "adapter"), "adapter")
    with tracking.step_run(run, "merge_lora") as record:
        record.model(_weights(tmp_path / "merged"), "merged")
    data = prepared(tmp_path)
    with tracking.step_run(run, "evaluate") as record:
        record.dataset(data, "evaluation", of="run/")
        record.dataset(data, "evaluation")
        record.evaluated_model()
    with tracking.step_run(run, "report") as record:
        for _ in range(2):  # the step was repeated
            record.summary({"eval/exact_match_after": 0.75, "val/loss_last": 1.5}, data)
    client = client_of(workspace)
    assert client.get_run(parent).data.metrics == {
        "eval/exact_match_after": 0.75,
        "val/loss_last": 1.5,
    }
    found = [
        client.search_logged_models(["1"], f"source_run_id = '{nested.info.run_id}'")
        for nested in nested_runs(client, parent)
    ]
    logged = {model.model_type: model for each in found for model in each}
    assert sorted(logged) == ["adapter", "merged"]
    linked = [entry.model_id for entry in client.get_run(parent).inputs.model_inputs]
    assert linked == [logged["merged"].model_id], "the run does not name what was evaluated"
    for model in logged.values():
        assert {(metric.key, metric.value) for metric in model.metrics} == {
            ("eval/exact_match_after", 0.75),
            ("val/loss_last", 1.5),
        }
        assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {
            ("openai/gsm8k", "cd" * 8)
        }
        assert model.tags["canvastune.recipe"] == "tiny_lora"
    (run_id,) = (
        nested.info.run_id
        for nested in nested_runs(client, parent)
        if nested.info.run_name == "figures: evaluate"
    )
    evaluated = client.get_run(run_id)  # a search does not load models
    assert [entry.model_id for entry in evaluated.inputs.model_inputs] == [
        logged["merged"].model_id
    ], "what was evaluated is not linked"
    assert [entry.tags[0].value for entry in evaluated.inputs.dataset_inputs] == ["evaluation"]
    listed = _listed_evaluations(client)
    assert {parent, run_id} <= listed, "MLflow's list of evaluations is empty"
    assert not {model.source_run_id for model in logged.values()} & listed


def _listed_evaluations(client: MlflowClient) -> set[str]:
    """Return the runs that MLflow's page of evaluations lists: those without a model as output that
    are not below a run with one.
    """
    runs = [client.get_run(run.info.run_id) for run in client.search_runs(["1"])]
    shown = {
        run.info.run_id: run.data.tags.get("mlflow.parentRunId")
        for run in runs
        if not (run.outputs and run.outputs.model_outputs)
    }
    return {run_id for run_id, above in shown.items() if above is None or above in shown}


def test_the_address_of_a_run_opens_the_run_itself(workspace: Path) -> None:
    run = pipeline_run(workspace, "addressed")
    assert tracking.run_page(run) is None
    parent = tracking.start(run)
    assert tracking.run_page(run) == f"/#/experiments/1/runs/{parent}?workflowType=machine_learning"


def test_a_model_of_tens_of_gigabytes_is_a_pointer(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as weights:
        weights.truncate(250 * 10**6)  # sparse: no disk is used
    with tracking.step_run(pipeline_run(workspace, "pointer"), "merge_lora") as run:
        run.model(tmp_path, "merged")
    (model,) = client_of(workspace).search_logged_models(["1"], f"source_run_id = '{run.run_id}'")
    assert (model.tags["canvastune.path"], model.tags["canvastune.size_bytes"]) == (
        str(tmp_path),
        "250000002",
    )
    uploaded = Path(model.artifact_location.removeprefix("file://"))
    assert (uploaded / "config.json").is_file()
    assert (uploaded / "MLmodel").is_file()
    assert not list(uploaded.rglob("*.safetensors"))


def test_a_cached_preparation_is_logged_once_by_the_next_step(
    workspace: Path, tmp_path: Path
) -> None:
    data = prepared(tmp_path)
    client = client_of(workspace)
    run = pipeline_run(workspace, "cached")
    parent = tracking.start(run)
    for _ in range(2):
        tracking.log_data(run, data)
    (logged,) = nested_runs(client, parent)
    assert (logged.info.run_name, logged.info.status) == ("cached: prepare_data", "FINISHED")
    creator = client.get_run(parent).data.tags
    for tag in ("mlflow.user", "mlflow.source.name", "mlflow.source.type"):
        assert logged.data.tags[tag] == creator[tag], f"a nested run lacks {tag}"
    assert logged.data.metrics["data/dropped/duplicate"] == 7
    assert re.findall(r"\d+", logged.data.tags["mlflow.note.content"]) == ["90", "100", "80", "10"]
    assert [file.path for file in client.list_artifacts(logged.info.run_id)] == [
        "card.html",
        "card.json",
    ]
    for each in (logged, client.get_run(parent)):
        (dataset,) = (entry.dataset for entry in each.inputs.dataset_inputs)
        assert (dataset.name, dataset.digest) == ("openai/gsm8k", "cd" * 8)


def test_the_run_that_kubeflow_gives_is_used(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(workspace)
    experiment = connect(tracking.tracking_uri(config(), workspace)).experiment("canvastune")
    above = client.create_run(experiment, run_name="pipeline").info.run_id
    given = client.create_run(
        experiment, run_name="train", tags={"mlflow.parentRunId": above}
    ).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    run = pipeline_run(workspace, "ignored")
    parent = tracking.start(run)
    assert parent == above
    with tracking.step_run(replace(run, parent=parent), "train") as record:
        assert record.run_id == given
    assert client.get_run(above).data.params["train.method"] == "lora"


def test_without_a_pipeline_run_nothing_is_recorded_and_nothing_breaks(tmp_path: Path) -> None:
    record = tracking.StepRun()
    record.metrics({"a": 1.0})
    record.outputs(tmp_path)
    record.dataset(tmp_path, "training")
    assert (record.run_id, record.pipeline_run, record.environment()) == (None, None, {})


def test_a_password_in_the_address_is_not_shown(workspace: Path) -> None:
    assert str(connect("http://me:hunter2@127.0.0.1:9")) == "http://127.0.0.1:9"
    assert "hunter2" not in server._short(
        OSError("API request to http://me:hunter2@mlflow/health failed")
    )


def _weights(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder

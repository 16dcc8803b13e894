"""metrics.jsonl keeps every step once; MLflow gets what it can, and its absence costs nothing but a line."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from canvastune import tracking
from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.tracking import contents, sending
from canvastune.tracking import server as server_room
from canvastune.tracking.server import connect, load_mlflow
from tests.tracking_server import TrackingServer, train_record


def config(**branches: Any) -> RunConfig:
    return parse_config({"name": "tiny_lora", "data": {"source": "openai/gsm8k"}, **branches})


@pytest.fixture(autouse=True)
def _no_outer_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One embedded store for the module: making its tables takes two seconds."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits, waits less."""
    monkeypatch.setattr(server_room, "_AWAY_SECONDS", 0.2)
    monkeypatch.setattr(server_room, "_PROBE_SECONDS", 0.5)
    monkeypatch.setattr(sending, "_PERIOD", 0.05)
    monkeypatch.setattr(sending, "_LONGEST_PAUSE", 0.2)


def client_of(workspace: Path) -> Any:
    return load_mlflow().MlflowClient(tracking.tracking_uri(config(), workspace))


def steps_in(client: Any, run_id: str, metric: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, metric))


def test_metrics_have_mlflows_names() -> None:
    validation = {"kind": "validation", "step": 5, "time": 2.0, "loss": 1.5, "levels": {"0.5": 1.25}, "autoregressive_loss": None}
    event = {"kind": "event", "step": 5, "time": 2.0, "event": "checkpoint", "detail": ""}
    points = sending.points_of([train_record(1, **{"a(b)": 2.0, "bad": math.inf}), validation, event])
    assert {point.key: point.value for point in points} == {
        "train/loss": 1.0,
        "train/lr": 1e-3,
        "train/a_b_": 2.0,
        "val/loss": 1.5,
        "val/loss_t0.5": 1.25,
    }
    assert {point.step for point in points if point.key.startswith("val/")} == {5}, "the step axis is the training step"


# Where MLflow is


def test_the_tracking_server_comes_from_environment_then_recipe_then_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri(config(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.tracking_uri(config(tracking={"uri": "sqlite:///own/m.db"}), tmp_path) == f"sqlite:///{tmp_path}/own/m.db"
    assert tracking.tracking_uri(config(tracking={"uri": "http://mlflow:5000"}), tmp_path) == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert tracking.tracking_uri(config(tracking={"uri": "http://mlflow:5000"}), tmp_path) == "http://other:5000"


def test_importing_the_room_does_not_import_mlflow() -> None:
    check = "import sys, canvastune.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0, "every rank would pay MLflow's two seconds"


# Runs


def test_every_step_of_a_pipeline_run_finds_the_same_parent(workspace: Path) -> None:
    recipe = config(model={"id": "some/model", "revision": "abc"})
    tags = {"canvastune.pipeline_url": "https://kubeflow.example/#/runs/details/1"}
    parent = tracking.start_parent(recipe, run_name="demo", pipeline_run="same", workspace=workspace, tags=tags)
    assert parent is not None
    assert tracking.start_parent(recipe, run_name="demo", pipeline_run="same", workspace=workspace) == parent
    assert tracking.start_parent(recipe, run_name="demo", pipeline_run="other", workspace=workspace) != parent
    run = client_of(workspace).get_run(parent)
    assert run.info.run_name == "demo"
    assert run.data.params["lora.rank"] == "16"
    assert run.data.tags["canvastune.model"] == "some/model"
    assert run.data.tags["canvastune.model_revision"] == "abc"
    assert run.data.tags["canvastune.method"] == "lora"
    assert run.data.tags.items() >= tags.items()
    assert [file.path for file in client_of(workspace).list_artifacts(parent)] == ["config.yaml"]
    assert (workspace / "mlartifacts" / parent / "artifacts" / "config.yaml").is_file(), (
        "artifacts lie in the workspace, not in the current folder"
    )


def test_a_step_is_a_nested_run_that_a_second_attempt_goes_on_with(workspace: Path, tmp_path: Path) -> None:
    recipe = config(tracking={"registered_model": "tiny"})
    parent = tracking.start_parent(recipe, run_name="demo", pipeline_run="steps", workspace=workspace)
    client = client_of(workspace)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")

    def attempt(broken: bool) -> str:
        with tracking.step_run(recipe, parent, "merge_lora", workspace=workspace) as run:
            assert run.run_id is not None
            run.parameters({"rank": 16, "long": "x" * 7000})
            run.model(adapter, "adapter")
            run.model(adapter, "merged")
            run.table([{"id": "a", "after": "<b>4</b>"}, {"id": "b", "after": "5"}])
            run.summary({"exact_match_after": 0.75, "ratio (t/s)": 2.0, "endless": math.inf})
            if broken:
                raise UserError("the adapter belongs to another base")
            return run.run_id

    with pytest.raises(UserError, match="another base"):
        attempt(broken=True)
    (failed,) = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert failed.info.status == "FAILED"
    assert "another base" in failed.data.tags["canvastune.error"]

    run_id = attempt(broken=False)
    assert run_id == failed.info.run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.metrics == {"exact_match_after": 0.75, "ratio _t/s_": 2.0}
    assert client.get_run(parent).data.metrics["exact_match_after"] == 0.75, "pipeline runs are compared by their parents"
    table = json.loads((workspace / "mlartifacts" / run_id / "artifacts" / "answers.json").read_text())
    assert table == {"columns": ["id", "after"], "data": [["a", "<b>4</b>"], ["b", "5"]]}, "a second attempt replaces the table"
    models = client.search_logged_models(["1"], f"source_run_id = '{run_id}'")
    assert sorted(model.name for model in models) == ["tiny_lora-adapter", "tiny_lora-merged"]
    version = client.get_model_version_by_alias("tiny", "candidate")
    assert (int(version.version), version.run_id) == (1, run_id)


def test_a_model_of_tens_of_gigabytes_is_a_pointer(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_LARGEST_MODEL", 100)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(bytes(101))
    parent = tracking.start_parent(config(), run_name="demo", pipeline_run="pointer", workspace=workspace)
    with tracking.step_run(config(), parent, "merge_lora", workspace=workspace) as run:
        run.model(tmp_path, "merged")
    (model,) = client_of(workspace).search_logged_models(["1"], f"source_run_id = '{run.run_id}'")
    assert (model.tags["canvastune.path"], model.tags["canvastune.size_bytes"]) == (str(tmp_path), "103")
    uploaded = Path(model.artifact_location.removeprefix("file://"))
    assert [file.name for file in uploaded.iterdir()] == ["config.json"]


def test_a_cached_preparation_is_logged_once_by_the_next_step(workspace: Path, tmp_path: Path) -> None:
    card = {"source": "openai/gsm8k", "format": "gsm8k", "fingerprint": "ab" * 32, "content_hash": "cd" * 32, "rows_read": 100, "kept": 90}
    card |= {"train": 80, "validation": 10, "cut": 1, "dropped": {"empty answer": 3, "duplicate": 7}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "card.html").write_text("<p>")
    client = client_of(workspace)
    parent = tracking.start_parent(config(), run_name="demo", pipeline_run="cached", workspace=workspace)
    for _ in range(2):
        tracking.log_data(config(), parent, tmp_path, workspace=workspace)
    (run,) = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert (run.info.run_name, run.info.status) == ("prepare_data", "FINISHED")
    assert run.data.metrics["data/dropped/duplicate"] == 7
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["card.html", "card.json"]
    for logged in (run, client.get_run(parent)):
        (dataset,) = (entry.dataset for entry in logged.inputs.dataset_inputs)
        assert (dataset.name, dataset.digest) == ("openai/gsm8k", "cd" * 8)


def test_the_run_that_kubeflow_gives_is_used(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(workspace)
    experiment = connect(tracking.tracking_uri(config(), workspace)).experiment("canvastune")
    above = client.create_run(experiment, run_name="pipeline").info.run_id
    given = client.create_run(experiment, run_name="train", tags={"mlflow.parentRunId": above}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    parent = tracking.start_parent(config(), run_name="ignored", pipeline_run="kubeflow", workspace=workspace)
    assert parent == above
    with tracking.step_run(config(), parent, "train", workspace=workspace) as run:
        assert run.run_id == given
    assert client.get_run(above).data.params["train.method"] == "lora"


def test_the_end_of_a_pipeline_ends_the_steps_that_were_killed(workspace: Path) -> None:
    parent = tracking.start_parent(config(), run_name="demo", pipeline_run="killed", workspace=workspace)
    with pytest.raises(KeyboardInterrupt), tracking.step_run(config(), parent, "train", workspace=workspace):
        raise KeyboardInterrupt
    client = client_of(workspace)
    lost = client.create_run("1", tags={"mlflow.parentRunId": parent}).info.run_id
    tracking.finish_parent(config(), parent, workspace=workspace, failed=True)
    statuses = [run.info.status for run in client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")]
    assert statuses == ["KILLED", "KILLED"], f"{lost} would count as running for ever"
    assert client.get_run(parent).info.status == "FAILED"


# A server that is away


def test_without_a_server_steps_go_on_and_say_so_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = config(tracking={"uri": "http://127.0.0.1:9"})  # the discard port: nobody listens
    load_mlflow()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        parent = tracking.start_parent(recipe, run_name="demo", pipeline_run="away", workspace=tmp_path)
        tracking.log_data(recipe, parent, tmp_path, workspace=tmp_path)
        with tracking.step_run(recipe, parent, "train", workspace=tmp_path) as run:
            run.parameters({"a": 1})
            run.summary({"b": 1.0})
            run.outputs(tmp_path)
        with tracking.step_run(recipe, "0123456789abcdef", "evaluate", workspace=tmp_path) as run:
            run.metrics({"c": 1.0})
        tracking.finish_parent(recipe, parent, workspace=tmp_path, failed=False)
    assert parent is None
    assert run.environment() == {}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "http://127.0.0.1:9 cannot be reached (Connection refused)" in line
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("impatient")
def test_metrics_of_an_outage_arrive_when_the_server_is_back(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    client = load_mlflow().MlflowClient(server.uri)
    parent = tracking.start_parent(config(), run_name="demo", pipeline_run="outage", workspace=tmp_path)
    with tracking.step_run(config(), parent, "train", workspace=tmp_path) as run:
        assert run.run_id is not None
        writer = tracking.MetricsWriter(tmp_path / "metrics.jsonl", run_id=run.run_id)
        for step in range(1, 11):
            writer.write(train_record(step))
        _until(lambda: steps_in(client, run.run_id, "train/loss") == list(range(1, 11)), "metrics are not sent while training")
        _until(lambda: any(key.startswith("system/cpu") for key in client.get_run(run.run_id).data.metrics), "no system metrics")
        server.kill()
        for step in range(11, 211):
            writer.write(train_record(step))
        _until(lambda: "cannot be reached" in caplog.text, "nobody is told that the server is away")
        server.start()
        writer.write(train_record(211))
        _until(lambda: steps_in(client, run.run_id, "train/loss") == list(range(1, 212)), "the outage's metrics are lost")
        writer.close()
    assert caplog.text.count("cannot be reached") == 1
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.usefixtures("impatient")
def test_a_frozen_server_delays_nothing_and_a_later_step_sends_what_is_missing(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = load_mlflow().MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    path = tmp_path / "metrics.jsonl"
    writer = tracking.MetricsWriter(path, run_id=run_id, uri=server.uri)
    writer.write(train_record(1))
    _until(lambda: steps_in(client, run_id, "train/loss") == [1], "metrics are not sent while training")
    server.freeze()
    try:
        started = time.perf_counter()
        for step in range(2, 102):
            writer.write(train_record(step))
        writing = time.perf_counter() - started
        closing = _seconds(lambda: writer.close(timeout=0.5))
    finally:
        server.thaw()
    assert writing < 5, f"a frozen server held 100 steps up for {writing:.1f} s"
    assert closing < 5, f"a frozen server held the end of training up for {closing:.1f} s"
    assert "not every metric reached MLflow in time" in caplog.text

    def synced() -> bool:
        tracking.sync_metrics(run_id, path, uri=server.uri)
        return steps_in(client, run_id, "train/loss") == list(range(1, 102))

    _until(synced, "what the frozen server missed is never sent")
    assert tracking.sync_metrics(run_id, path, uri=server.uri) == 0, "what has arrived is not sent twice"


def test_a_resumed_training_has_each_step_once_in_mlflow_too(server: TrackingServer, tmp_path: Path) -> None:
    client = load_mlflow().MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    path = tmp_path / "metrics.jsonl"
    for resume_at, last in ((-1, 6), (3, 8)):
        writer = tracking.MetricsWriter(path, run_id=run_id, uri=server.uri)
        writer.resume(resume_at)
        for step in range(max(resume_at, 0) + 1, last + 1):
            writer.write({**train_record(step), "time": time.time()})
        writer.close()
    assert steps_in(client, run_id, "train/loss") == list(range(1, 9))


def test_a_refusal_is_a_warning_and_nothing_more(workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = tracking.tracking_uri(config(), workspace)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_record(1)) + "\n")
    assert tracking.sync_metrics("0123456789abcdef", tmp_path / "metrics.jsonl", uri=uri) == 0
    assert "refuses" in caplog.text
    assert "0123456789abcdef" in caplog.text, "the reason is MLflow's own"
    assert connect(uri).call("probe", lambda client: client.get_experiment("0").name) == "Default", "and the next call is tried"


def _seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _until(condition: Any, message: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)

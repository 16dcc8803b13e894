"""MLflow down, broken, closed, silent, or back later: training continues, and nothing is lost."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DatabaseError

from canvastune import tracking
from canvastune.tracking import FindRun
from canvastune.tracking.client import TrackingError, _short, connect, load_mlflow
from canvastune.tracking.live_metrics import MetricsSender
from canvastune.tracking.steps import tracking_directory
from tests.fakes.tracking_server import (
    TrackingServer,
    no_outer_mlflow,
    refusing,
    silent,
    train_record,
)
from tests.support.tracked_run import STEPS, go_through, pipeline_run, quick, seen


@pytest.fixture(autouse=True)
def _fresh(own_mlflow: None) -> None:
    """No MLflow but the test's own, and no warning that an earlier test has seen."""
    load_mlflow()
    connect.cache_clear()  # a problem is logged once in a process


def open_metrics(path: Path, run: FindRun, uri: str) -> tracking.MetricsWriter:
    quick(uri)
    return tracking.open_metrics(path, run=run, uri=uri, period=0.05, longest_pause=0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_server_says_its_version_and_one_that_is_down_says_none(server: TrackingServer) -> None:
    assert connect(server.uri).server_version() == metadata.version("mlflow")
    quick("http://127.0.0.1:9")
    assert connect("http://127.0.0.1:9").server_version() == ""
    assert connect("sqlite:///a.db").server_version() == ""


@pytest.fixture(scope="module")
def healthy(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What MLflow holds of a run during which it was there."""
    folder = tmp_path_factory.mktemp("healthy")
    with no_outer_mlflow():
        run = pipeline_run(folder, server.uri, "healthy")
        go_through(run, folder)
        tracking.finish(run, "FINISHED")
    found = seen(server.uri, "healthy")
    assert found["parent"]["status"] == "FINISHED"
    assert set(found) == {
        "parent",
        "report",
        "evaluate",
        "evaluate_base",
        "merge_lora",
        "train",
        "prepare_data",
        "aliases",
    }
    assert found["aliases"] == {"candidate": "1", "champion": "1"}
    assert found["parent"]["metrics"]["train/loss"] == [
        (step, float(f"{1 / step:.7g}")) for step in range(1, 21)
    ], "runs are compared by their parents"
    assert found["train"]["metrics"]["system/cpu"] == [(0, 50.0)]
    assert found["parent"]["metrics"]["system/cpu"] == [(0, 50.0)]
    assert found["evaluate"]["traces"] == [
        ("2+2?", "4", [("correct", True), ("expected_response", "4"), ("score", 1.0)], "gained")
    ]
    assert found["evaluate_base"]["traces"] == [
        ("2+2?", "5", [("correct", False), ("expected_response", "4"), ("score", 0.0)], "gained")
    ]
    return found


@pytest.mark.parametrize(
    ("lost", "back"), [("evaluate", "report"), ("resolve", "finish"), ("merge_lora", "sync")]
)
def test_what_an_outage_kept_back_arrives_as_if_there_had_been_none(
    server: TrackingServer,
    tmp_path: Path,
    healthy: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    lost: str,
    back: str,
) -> None:
    run = pipeline_run(tmp_path, server.uri, f"lost-{lost}")

    def before(step: str) -> None:
        if step == lost:
            server.kill()
        if step == back:
            server.start()
            time.sleep(0.2)  # the pause after a failure

    seconds = go_through(run, tmp_path, before)
    before("finish")
    tracking.finish(run, "FINISHED")
    if back == "sync":
        assert tracking.pending(run)
        assert tracking.sync(run), "sync is silent about a server that is still down"
        before("sync")
        assert tracking.sync(run) == []
    assert seen(server.uri, run.folder.name) == healthy
    assert tracking.pending(run) == []
    assert max(seconds) < 10, (
        f"a server that is down delayed a step: {dict(zip(STEPS, seconds, strict=True))}"
    )
    warned = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert sum("canvastune sync" in each.getMessage() for each in warned) == 1, caplog.text


@pytest.mark.parametrize("broken", [lambda: refusing(500), silent], ids=["500", "silent"])
def test_a_server_in_no_state_to_answer_costs_seconds_and_one_line_and_nothing_is_lost(
    server: TrackingServer,
    tmp_path: Path,
    healthy: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    broken: Callable[[], AbstractContextManager[str]],
) -> None:
    name = f"broken-{request.node.callspec.id}"
    with broken() as uri, caplog.at_level(logging.WARNING):
        run = pipeline_run(tmp_path, uri, name)
        seconds = go_through(run, tmp_path)
        tracking.finish(run, "FINISHED")
    assert max(seconds) < 8, f"a step waited: {dict(zip(STEPS, seconds, strict=True))}"
    assert_one_warning(caplog, uri, run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert tracking.sync(run) == []
    assert seen(server.uri, name) == healthy


@pytest.mark.parametrize(
    ("status", "body", "healthy", "said"),
    [
        (503, "", False, r"/health\b.* 503\b"),
        (403, "Invalid Host header", True, r"\b403\b"),
        (
            401,
            '{"error_code": "UNAUTHENTICATED", "message": "who are you"}',
            True,
            r"\(UNAUTHENTICATED: who are you\)",
        ),
    ],
)
def test_the_one_warning_has_the_reason_that_the_server_gives(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: str,
    healthy: bool,
    said: str,
) -> None:
    with refusing(status, body, healthy=healthy) as uri, caplog.at_level(logging.WARNING):
        run = pipeline_run(tmp_path, uri, "refusing")
        tracking.start(run)
        with tracking.step_run(run, "train") as record:
            record.metrics({"a": 1.0})
    line = assert_one_warning(caplog, uri, run)
    assert re.search(said, line), line
    assert tracking.pending(run)


def assert_one_warning(
    caplog: pytest.LogCaptureFixture, uri: str, run: tracking.PipelineRun
) -> str:
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == "canvastune.tracking"
    ]
    assert line.startswith(f"MLflow at {uri} ")
    assert f"canvastune sync {run.folder}" in line, "the warning names no way to send the rest"
    return line


def test_a_server_whose_store_hangs_is_given_up_after_two_timeouts(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = pipeline_run(tmp_path, server.uri, "hangs")
    quick(server.uri, retry=10)
    tracking.start(run)  # a server that answered just now is not probed
    server.freeze()
    try:
        started = time.monotonic()
        with tracking.step_run(run, "train") as record:
            for number in range(50):
                record.metrics({"a": number})
        assert time.monotonic() - started < 6
    finally:
        server.thaw()
    monkeypatch.undo()
    connect.cache_clear()
    assert tracking.sync(run) == []


def test_what_is_refused_holds_nothing_else_up_and_stays(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = pipeline_run(tmp_path, server.uri, "refused")
    with tracking.step_run(run, "train") as record:
        record.parameters({"rank": 16})
        record.parameters({"rank": 32})  # they are immutable
        record.metrics({"a": 1.0})
    client = load_mlflow().MlflowClient(server.uri)
    found = client.get_run(record.run_id)
    assert (found.data.metrics, found.info.status) == ({"a": 1.0}, "FINISHED")
    assert caplog.text.count("INVALID_PARAMETER_VALUE") == 1
    (reason,) = tracking.sync(run)
    assert re.match(
        rf"parameters\b.* train\b.* {re.escape(server.uri)} .*\bINVALID_PARAMETER_VALUE: ", reason
    )


def test_what_was_published_may_be_forgotten_and_is_sent_again_with_the_same_result(
    server: TrackingServer, tmp_path: Path, healthy: dict[str, Any]
) -> None:
    run = pipeline_run(tmp_path, server.uri, "forgotten")
    go_through(run, tmp_path)
    tracking.finish(run, "FINISHED")
    state = run.folder / ".tracking" / "published.json"
    for damage in (Path.unlink, lambda path: path.write_text('{"job": "jo')):
        damage(state)
        assert tracking.pending(run)
        assert tracking.sync(run) == []
        assert seen(server.uri, run.folder.name) == healthy


def test_nothing_is_sent_twice_and_only_what_changed_is_sent_again(
    server: TrackingServer, tmp_path: Path
) -> None:
    run = pipeline_run(tmp_path, server.uri, "twice")
    go_through(run, tmp_path)
    tracking.finish(run, "FINISHED")
    quiet = server.requests("POST", "PUT")
    assert tracking.sync(run) == []
    assert server.requests("POST", "PUT") == quiet
    (run.folder / "evaluation/evaluation.json").write_text('{"scored": 1}')
    assert tracking.sync(run) == []
    assert [
        line.rpartition("/")[2]
        for line in server.requests("PUT")[len([x for x in quiet if x.startswith("PUT")]) :]
    ] == ["evaluation.json"]


def test_a_server_without_the_run_gets_all_of_it(
    server: TrackingServer, tmp_path: Path, healthy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pipeline_run(tmp_path, server.uri, "moved")
    go_through(run, tmp_path)
    tracking.finish(run, "FINISHED")
    assert tracking.pending(run) == []
    with TrackingServer(tmp_path / "other") as other:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other.uri)
        # As run.json has it, from the first server.
        published = tracking_directory(run.folder) / "published.json"
        known = replace(run, parent=json.loads(published.read_text())["run"])
        assert tracking.sync(known) == []
        assert seen(other.uri, "moved") == healthy


def test_a_reason_leaves_out_the_statement_that_a_database_refused() -> None:
    cause = sqlite3.DatabaseError("file is not a database")
    reason = _short(DatabaseError("SELECT name", {}, cause))
    assert str(cause) in reason
    assert "SELECT" not in reason
    assert "http" not in reason


def test_processes_that_publish_at_the_same_time_show_everything_once(
    server: TrackingServer, tmp_path: Path, healthy: dict[str, Any]
) -> None:
    run = pipeline_run(tmp_path, server.uri, "at-once")
    server.kill()
    go_through(run, tmp_path)
    server.start()
    time.sleep(0.2)
    with ThreadPoolExecutor(4) as pool:
        for reasons in pool.map(tracking.sync, [run] * 4):
            assert reasons == []
    tracking.finish(run, "FINISHED")
    assert tracking.sync(run) == []
    assert seen(server.uri, "at-once") == healthy


def test_a_disk_that_takes_nothing_and_no_server_are_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = pipeline_run(tmp_path, "http://127.0.0.1:9", "full")
    (run.folder / "steps.json").mkdir()  # no file can be written here
    with tracking.step_run(run, "train") as record:
        record.metrics({"a": 1.0})
    assert record.run_id is None
    assert record.environment() == {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    assert re.search(r"\bMLflow\b.* train\b", caplog.text)


# Metrics during training


def steps_in(client: Any, run_id: str, metric: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, metric))


def test_metrics_of_an_outage_arrive_when_the_server_is_back(
    server: TrackingServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    client = load_mlflow().MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    cpu = "system/cpu_utilization_percentage"
    writer = open_metrics(tmp_path / "metrics.jsonl", lambda client: run_id, server.uri)
    for step in range(1, 11):
        writer.write(train_record(step))
    _until(
        lambda: steps_in(client, run_id, "train/loss") == list(range(1, 11)),
        "metrics are not sent while training",
    )
    _until(lambda: len(steps_in(client, run_id, cpu)) > 1, "no system metrics")
    server.kill()
    for step in range(11, 211):
        writer.write(train_record(step))
    _until(lambda: server.uri in caplog.text, "there is no warning that the server is down")
    server.start()
    writer.write(train_record(211))
    _until(
        lambda: steps_in(client, run_id, "train/loss") == list(range(1, 212)),
        "the outage's metrics are lost",
    )
    writer.close()
    measured = steps_in(client, run_id, cpu)
    assert measured == list(range(len(measured))), "what the machine did during the outage is lost"
    assert caplog.text.count(server.uri) == 2  # that it is unreachable, and that it is back


def test_curves_of_a_training_that_began_without_mlflow_are_there_before_it_ends(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = pipeline_run(tmp_path, server.uri, "late")
    server.kill()
    with tracking.step_run(run, "train") as record:
        assert record.arguments() == ("--mlflow-job", run.job)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", record.environment()["MLFLOW_TRACKING_URI"])
        writer = open_metrics(tmp_path / "metrics.jsonl", tracking.training_run(run), server.uri)
        writer.write(train_record(1))
        server.start()
        client = load_mlflow().MlflowClient(server.uri)

        def there() -> list[Any]:
            experiment = [one.experiment_id for one in client.search_experiments()]
            (parent,) = client.search_runs(experiment, "attributes.run_name = 'late'") or [None]
            return (
                list(
                    client.search_runs(
                        experiment, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
                    )
                )
                if parent
                else []
            )

        _until(
            lambda: [run.data.metrics.get("train/loss") for run in there()] == [1.0],
            "no curve before the end of training",
        )
        _until(
            lambda: "system/cpu_utilization_percentage" in there()[0].data.metrics,
            "no system metrics",
        )
        writer.close()
    (found,) = there()
    assert (found.info.status, record.run_id) == ("FINISHED", found.info.run_id)


def test_a_frozen_server_delays_nothing_and_a_later_step_sends_what_is_missing(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = load_mlflow().MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    path = tmp_path / "metrics.jsonl"
    writer = open_metrics(path, lambda client: run_id, server.uri)
    writer.write(train_record(1))
    _until(
        lambda: steps_in(client, run_id, "train/loss") == [1], "metrics are not sent while training"
    )
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
    assert re.search(rf"\bMLflow\b.* {re.escape(str(path))}", caplog.text)

    def synced() -> bool:
        try:
            MetricsSender(server.uri, lambda client: run_id, path).send()
        except TrackingError:
            return False
        return steps_in(client, run_id, "train/loss") == list(range(1, 102))

    _until(synced, "what the frozen server missed is never sent")
    assert MetricsSender(server.uri, lambda client: run_id, path).send() == 0, (
        "what has arrived is not sent twice"
    )


def test_a_resumed_training_has_each_step_once_in_mlflow_too(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    client = load_mlflow().MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    path, system = tmp_path / "metrics.jsonl", tmp_path / "system.jsonl"
    for resume_at, last in ((-1, 6), (3, 8)):
        writer = open_metrics(path, lambda client: run_id, server.uri)
        writer.resume(resume_at)
        for step in range(max(resume_at, 0) + 1, last + 1):
            writer.write({**train_record(step), "time": time.time()})
        had = system.read_bytes().count(b"\n") if system.exists() else 0
        _until(
            lambda had=had: system.exists() and system.read_bytes().count(b"\n") > had,
            "nothing of the machine is measured",
        )
        writer.close()
        with system.open("a") as stream:
            stream.write('{"kind": "sys')  # killed in the middle of a line
    assert steps_in(client, run_id, "train/loss") == list(range(1, 9))
    measured = steps_in(client, run_id, "system/cpu_utilization_percentage")
    assert measured == list(range(len(measured)))


def _seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _until(condition: Any, message: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)

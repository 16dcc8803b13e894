"""How MLflow shows the attempts at a run: resumed, failed, interrupted, killed."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from canvastune import tracking
from canvastune.errors import UserError
from canvastune.tracking.steps import Attempt
from components.run_directory import RunRecord, read_record, write_record
from components.run_owner import own_run
from pipelines.cli import main
from tests.support.pipeline_runs import client_of, nested_runs, pipeline_run

pytestmark = pytest.mark.usefixtures("own_mlflow")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One embedded store for the module: making its tables takes two seconds."""
    return tmp_path_factory.mktemp("workspace")


def test_the_end_of_a_pipeline_ends_the_steps_that_were_killed(workspace: Path) -> None:
    run = pipeline_run(workspace, "killed")
    parent = tracking.start(run)
    with pytest.raises(KeyboardInterrupt), tracking.step_run(run, "train"):
        raise KeyboardInterrupt
    client = client_of(workspace)
    lost = client.create_run("1", tags={"mlflow.parentRunId": parent}).info.run_id
    tracking.finish(run, "KILLED", reason="interrupted (Ctrl-C, or SIGTERM)")
    statuses = [nested.info.status for nested in nested_runs(client, parent)]
    assert statuses == ["KILLED", "KILLED"], f"{lost} would count as running for ever"
    found = client.get_run(parent)
    assert found.info.status == "KILLED"
    assert found.data.tags["canvastune.state"] == "interrupted"
    assert "canvastune.failed_step" not in found.data.tags
    assert found.data.tags["mlflow.note.content"].startswith("**Interrupted in `train`**")


def test_a_failed_run_says_in_which_step_and_why_and_how_to_resume_it(workspace: Path) -> None:
    run = pipeline_run(workspace, "broken")
    attempt = Attempt(
        "job", 1.7e9, "host-a", 77, "canvastune run my.yaml --run-name broken", "/home/ann/work"
    )
    parent = tracking.start(run, attempt=attempt)
    with pytest.raises(UserError), tracking.step_run(run, "evaluate"):
        raise UserError("evaluate.judge: no answer", hint="Start the judge.")
    for _ in range(2):  # the exit task, and the process that owns the run
        tracking.finish(run, "FAILED", reason="Task exit-handler-1 failed.")
    found = client_of(workspace).get_run(parent)
    tags = found.data.tags
    assert found.info.status == "FAILED"
    assert tags["canvastune.state"] == "failed"
    assert tags["canvastune.failed_step"] == "evaluate"
    assert tags["canvastune.error"] == "evaluate.judge: no answer\nStart the judge."
    note = tags["mlflow.note.content"]
    assert re.match(r"\*\*.*`evaluate`", note), "not at the top"
    assert "\n```text\nevaluate.judge: no answer\nStart the judge.\n```" in note
    assert "cd /home/ann/work\ncanvastune run my.yaml --run-name broken\n" in note
    assert "rank 16 " in note
    assert re.match(
        r"2023-11-14 22:13:20 UTC\b.* 77 on host-a\b.* failed\b.* evaluate\b",
        tags["canvastune.attempt_1"],
    )


def test_a_step_without_a_record_fails_the_run_with_the_reason_that_its_owner_knows(
    workspace: Path,
) -> None:
    """As prepare_data, which may be answered from the cache."""
    run = pipeline_run(workspace, "unprepared")
    parent = tracking.start(run)
    tracking.finish(run, "FAILED")
    client = client_of(workspace)
    assert client.get_run(parent).data.tags["canvastune.failed_step"] == "unknown"
    tracking.finish(run, "FAILED", "prepare_data", "my.jsonl:7: not JSON")
    tags = client.get_run(parent).data.tags
    assert tags["canvastune.failed_step"] == "prepare_data"
    assert tags["canvastune.error"] == "my.jsonl:7: not JSON"
    assert tags["mlflow.note.content"].startswith("**Failed in `prepare_data`**")


def test_an_interrupted_and_resumed_run_is_one_run_with_its_attempts(workspace: Path) -> None:
    client, run = client_of(workspace), pipeline_run(workspace, "resumed")
    parent = tracking.start(run, attempt=Attempt("1", time.time()))
    with tracking.step_run(run, "plan"):
        pass
    with pytest.raises(UserError), tracking.step_run(run, "train"):
        raise UserError("a rank died")
    tracking.finish(run, "FAILED")
    assert client.get_run(parent).info.status == "FAILED"

    assert tracking.start(run, attempt=Attempt("2", time.time())) == parent
    found = client.get_run(parent)
    assert found.info.status == "RUNNING"
    assert not {"canvastune.failed_step", "canvastune.error"} & set(found.data.tags)
    assert found.data.tags["mlflow.note.content"].startswith("LoRA ")
    record = tracking.StepRun("train", run)
    record.set_status("RUNNING")  # and killed: neither the step nor the attempt has an end
    record.publish()
    assert sorted(nested.info.status for nested in nested_runs(client, parent)) == [
        "FINISHED",
        "RUNNING",
    ]

    changed = pipeline_run(workspace, "resumed", evaluate={"rows": 8})
    for _ in range(2):  # a retried step is no other attempt
        assert tracking.start(changed, attempt=Attempt("3", time.time())) == parent
    statuses = {
        each.data.tags["canvastune.step"]: each.info.status for each in nested_runs(client, parent)
    }
    assert statuses == {"train": "KILLED", "plan": "FINISHED"}
    assert client.get_run(parent).info.status == "RUNNING"
    for step in ("train", "report"):
        with tracking.step_run(changed, step) as record:
            if step == "report":
                record.promotion(None, None, "**Better**")
    tracking.finish(changed, "FINISHED")
    found = client.get_run(parent)
    tags = found.data.tags
    assert found.info.status == "FINISHED"
    assert tags["canvastune.state"] == "finished"
    assert tags["canvastune.attempts"] == "3"
    assert re.search(r"\bfailed\b.* train\b.*: a rank died$", tags["canvastune.attempt_1"])
    assert re.search(r"\binterrupted\b.* train\b", tags["canvastune.attempt_2"])
    assert re.search(r"\bfinished\b.* 0:00:\d\d$", tags["canvastune.attempt_3"])
    assert tags["canvastune.changed_settings"] == "evaluate.rows: 64 -> 8"
    assert tags["mlflow.note.content"] == "**Better**"
    assert tracking.pending(changed) == []
    key = "tags.`canvastune.pipeline_run` = 'resumed/job'"
    assert len(client.search_runs(["1"], key)) == 1
    assert len(nested_runs(client, parent)) == 3


def test_a_setting_that_a_later_attempt_sets_is_a_parameter_then_and_a_change(
    workspace: Path,
) -> None:
    client = client_of(workspace)
    changed = "canvastune.changed_settings"
    attempts: tuple[tuple[dict[str, Any], str | None, str | None], ...] = (
        ({}, None, None),
        ({"evaluate": {"gpus": 2}}, "2", "evaluate.gpus: not set -> 2"),
        ({"evaluate": {"gpus": 4}}, "2", "evaluate.gpus: not set -> 4"),
        ({"tracking": {"registered_model": "m"}}, "2", "tracking.registered_model: not set -> m"),
        ({}, "2", None),
    )
    for number, (settings, parameter, change) in enumerate(attempts):
        run = pipeline_run(workspace, "set-later", **settings)
        parent = tracking.start(run, attempt=Attempt(str(number), time.time()))
        for _ in range(2):
            data = client.get_run(parent).data
            assert data.params.get("evaluate.gpus") == parameter
            found = data.tags.get(changed, "").split("; ")
            assert (change or "") in found, f"attempt {number}"
            # As after the loss of what was sent: sending everything again changes nothing.
            (run.folder / ".tracking/published.json").unlink()
            assert tracking.sync(run) == []
    unset = pipeline_run(workspace, "unset-later", evaluate={"gpus": 2})
    parent = tracking.start(unset, attempt=Attempt("0", time.time()))
    tracking.start(pipeline_run(workspace, "unset-later"), attempt=Attempt("1", time.time()))
    assert client.get_run(parent).data.tags[changed] == "evaluate.gpus: 2 -> not set"


def test_a_report_of_an_earlier_attempt_does_not_describe_a_run_that_goes_on(
    workspace: Path,
) -> None:
    client, run = client_of(workspace), pipeline_run(workspace, "twice-reported")
    parent = tracking.start(run, attempt=Attempt("1", time.time()))
    note = lambda: client.get_run(parent).data.tags["mlflow.note.content"]  # noqa: E731
    for attempt in ("2", "3"):
        with tracking.step_run(run, "report") as record:
            record.promotion(None, None, "**Better**")
        assert note() == "**Better**"
        tracking.start(run, attempt=Attempt(attempt, time.time()))
        assert note().startswith("LoRA ")


def test_a_clock_that_is_set_back_or_forward_changes_no_figure_and_no_order(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run = client_of(workspace), pipeline_run(workspace, "clock")
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    parent = tracking.start(run, attempt=Attempt("1", time.time()))
    file = run.folder / "train" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    for attempt, score in (("2", 0.5), ("3", 0.25)):
        with tracking.step_run(run, "train") as record:
            with file.open("a") as lines:
                for _ in range(2):
                    step = sum(1 for _ in file.open()) + 1
                    line = {"kind": "train", "step": step, "time": time.time(), "loss": 1 / step}
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()
                    now[0] += 1
            record.curves(file)
        with tracking.step_run(run, "evaluate") as record:
            record.metrics({"eval/exact_match_after": score})
        now[0] -= 3600
        if attempt == "2":
            tracking.start(run, attempt=Attempt(attempt, time.time()))
    now[0] += 7200
    tracking.finish(run, "FINISHED")
    found = client.get_run(parent)
    history = client.get_metric_history(parent, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    assert found.data.metrics["train/loss"] == pytest.approx(1 / 4), "the latest is not the last"
    steps = {each.data.tags["canvastune.step"]: each for each in nested_runs(client, parent)}
    assert steps["evaluate"].data.metrics["eval/exact_match_after"] == 0.25, "an earlier attempt's"
    for each in (found, *steps.values()):
        assert each.info.end_time >= each.info.start_time, f"{each.info.run_name} ended before"


def test_sync_ends_a_local_run_whose_process_was_killed(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pipeline_run(workspace, "orphaned")
    write_record(run.folder, RunRecord("job", run.config.model_dump_json(), ""))
    here = Attempt("job", time.time(), socket.gethostname(), 1)
    parent = tracking.start(run, attempt=here)
    client = client_of(workspace)
    with own_run(run.folder):
        assert main(["sync", str(run.folder)]) == 0
        assert client.get_run(parent).info.status == "RUNNING", "it has an owner: it continues"
    assert main(["sync", str(run.folder)]) == 0
    found = client.get_run(parent)
    assert found.info.status == "KILLED"
    assert "was killed" in found.data.tags["canvastune.attempt_1"]
    record = read_record(run.folder)
    assert record is not None
    assert not record.finished, "it could not be resumed"

"""Log lines go where people and collectors look for them, as text or as JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from canvastune.errors import parse_error
from canvastune.logging import TrainingProgress, format_event, read_event
from pipelines.local_output import LocalOutput

ROOT = Path(__file__).parents[2]
_PROGRAM = """
import logging, subprocess, sys, warnings
from canvastune.errors import UserError
from canvastune.logging import configure_logging, event, log_error
configure_logging({log_format!r})
logging.getLogger("canvastune.merge").info("shard 1 of 2")
logging.getLogger("pipelines.submit").info("run x: http://host", extra=event("run", state="submitted", share=float("nan")))
logging.getLogger("canvastune.tracking").warning("no answer")
logging.getLogger("a_library").info("details")
logging.getLogger("a_library").warning("deprecated")
logging.getLogger("pipelines.cli").info("", extra=event("prepared", rows_read=7))
warnings.warn("old", UserWarning)
log_error(UserError("data.source: file not found: x.jsonl", hint="Check the path."))
{end}
"""


def _run(log_format: str, end: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    # -S: without installed packages, as `canvastune doctor` runs
    command = [sys.executable, "-S", "-c", _PROGRAM.format(log_format=log_format, end=end)]
    return subprocess.run(
        command, env=everything, capture_output=True, text=True, timeout=60, check=False
    )


def _events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_text_of_the_pipeline_is_output_and_all_else_is_diagnostics() -> None:
    done = _run("text")
    assert done.stdout == "run x: http://host\n"
    lines = done.stderr.splitlines()
    assert lines[:3] == ["shard 1 of 2", "WARNING no answer", "WARNING deprecated"]
    assert "UserWarning: old" in lines[3]
    assert lines[-2:] == [
        "canvastune: error: data.source: file not found: x.jsonl",
        "  hint: Check the path.",
    ]


def test_json_is_one_object_per_event_with_its_level_and_fields() -> None:
    done = _run("json")
    assert not done.stderr
    events = _events(done)
    assert all({"time", "level", "event"} <= event.keys() for event in events)
    levels = ["info", "info", "warning", "warning", "info", "warning", "error"]
    assert [event["level"] for event in events] == levels
    assert [event["event"] for event in events] == [
        "log",
        "run",
        "log",
        "log",
        "prepared",
        "log",
        "error",
    ]
    assert (events[1]["message"], events[1]["state"], events[1]["share"]) == (
        "run x: http://host",
        "submitted",
        None,
    )
    assert (events[4]["rows_read"], "message" in events[4]) == (7, False)
    assert events[-1]["message"] == "data.source: file not found: x.jsonl"
    assert events[-1]["hint"] == "Check the path."


def test_a_process_that_was_started_by_one_with_json_logs_json() -> None:
    inner = (
        "subprocess.run([sys.executable, '-S', '-c', 'from canvastune.logging import *;"
        " configure_logging(); logger.info(1)'])"
    )
    events = _events(_run("json", inner))
    assert (events[-1]["event"], events[-1]["message"]) == ("log", "1")


def test_other_ranks_log_what_goes_wrong_only() -> None:
    events = _events(_run("json", RANK="3"))
    assert [event["level"] for event in events] == ["warning", "warning", "warning", "error"]
    assert {event["rank"] for event in events} == {3}


def test_an_uncaught_exception_is_one_event_with_its_traceback() -> None:
    done = _run("json", "raise KeyError('x')")
    assert done.returncode == 1
    last = _events(done)[-1]
    assert (last["level"], last["event"], last["message"]) == (
        "error",
        "exception",
        "KeyError: 'x'",
    )
    assert last["traceback"].startswith("Traceback (most recent call last):")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_error_of_a_command_is_found_in_its_output(log_format: str) -> None:
    done = _run(log_format)
    error = parse_error(done.stdout + done.stderr)
    assert error is not None
    assert (str(error), error.hint) == ("data.source: file not found: x.jsonl", "Check the path.")


def test_a_line_that_is_no_event_of_ours_is_none() -> None:
    assert read_event('{"time": 1, "other": 2}') is None
    assert read_event("step 1") is None
    assert read_event(format_event("train", step=1)) is not None


def test_the_time_left_does_not_count_the_first_step_which_takes_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr("canvastune.logging.time.monotonic", lambda: now)
    numbers = dict.fromkeys(("diffusion_loss", "autoregressive_loss", "grad_norm", "lr"), 1.0)
    progress = TrainingProgress(steps=11, log_every=1)
    with caplog.at_level("INFO", "canvastune.logging"):
        for step, seconds in ((6, 60.0), (7, 2.0), (8, 2.0)):  # a resumed run
            now += seconds
            record = {"kind": "train", "step": step, "loss": 1.0, "tokens_per_second": 9.0}
            progress.show({**record, **numbers, "seconds": seconds})
    left = [message.partition("tokens/s")[2] for message in caplog.messages]
    assert left == ["", "  0:08 left", "  0:06 left"]


def test_events_are_shown_without_underscores(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "canvastune.logging"):
        TrainingProgress(steps=9, log_every=1).show(
            {"kind": "event", "step": 5, "event": "damaged_checkpoint", "detail": "shard 1"}
        )
    assert caplog.messages == ["step 5: damaged checkpoint shard 1"]


def test_a_failed_step_names_its_error_once_and_its_event_keeps_its_time() -> None:
    out = io.StringIO()
    output = LocalOutput(out, json=True)
    with output.listening():
        import logging

        logging.info("Executing task 'train'")
        print(format_event("train", step=7, time="2026-01-01T00:00:00.000+00:00"))
        print(
            format_event(
                "error", level="error", message="train.steps: found none", hint="Use a number."
            )
        )
        logging.error("Task 'train' finished with status FAILURE")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["task_started", "train", "task_failed"]
    assert events[1]["time"].startswith("2026-01-01")
    assert output.failure is not None
    step, error = output.failure
    assert (step, str(error), error.hint) == ("train", "train.steps: found none", "Use a number.")

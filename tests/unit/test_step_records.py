"""steps.json: how long a step took, whatever the clock does."""

from __future__ import annotations

from pathlib import Path

import pytest

from canvastune.tracking import PipelineRun, StepRun
from canvastune.tracking import lifecycle as tracked
from canvastune.tracking.steps import FINISHED, KILLED, RUNNING, end_attempt, read_records
from tests.fakes.tracking_server import prepared
from tools.report_sample import sample_config


@pytest.fixture
def run(tmp_path: Path) -> PipelineRun:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    return PipelineRun(sample_config(), folder, "job")


def test_no_step_ends_before_it_starts_when_the_clock_goes_back(
    run: PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [5000.0]
    monkeypatch.setattr(tracked.time, "time", lambda: now[0])
    StepRun("plan", run).set_status(RUNNING)
    step = StepRun("train", run)
    step.set_status(RUNNING)
    now[0] -= 3600
    step.set_status(FINISHED)
    end_attempt(run.folder, run.job, KILLED)
    found = read_records(run.folder, run.job).steps
    assert (found["train"].started, found["train"].ended) == (5000, 5000)
    assert found["plan"].status == KILLED
    assert found["plan"].ended == 5000


def test_a_figure_of_a_later_attempt_is_the_later_one_when_the_clock_goes_back(
    run: PipelineRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow shows the value with the latest time."""
    now = [5000.0]
    monkeypatch.setattr(tracked.time, "time", lambda: now[0])
    data = prepared(tmp_path)
    shown: list[tuple[list[float], list[float]]] = []
    for score in (0.5, 0.25):
        step = StepRun("evaluate", run)
        step.metrics({"eval/score": score})
        step.summary({"eval/score": score}, data)
        shows = read_records(run.folder, run.job).steps["evaluate"].shows
        shown.append((shows["metrics"]["eval/score"], shows["run/summary"]["values"]["eval/score"]))
        now[0] -= 3600
    for (first, early), (second, late) in zip(*shown, strict=True):
        assert (first, second) == (0.5, 0.25)
        assert round(late * 1000) > round(early * 1000), (
            "of one millisecond, the higher value counts"
        )


def test_the_time_of_a_step_is_that_of_all_its_attempts(
    run: PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(tracked.time, "monotonic", lambda: now[0])
    for seconds in (30, 12):
        step = StepRun("train", run)
        step.set_status(RUNNING)
        now[0] += seconds
        step.set_status(FINISHED)
        now[0] += 1000  # until the next attempt
    assert read_records(run.folder, run.job).steps["train"].seconds == 42

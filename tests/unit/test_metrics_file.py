"""metrics.jsonl keeps every step once, whatever became of the attempts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from canvastune import tracking
from canvastune.errors import UserError
from tests.fakes.tracking_server import train_record


def test_each_step_appears_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = tracking.MetricsWriter(path)
    for step in range(1, 8):
        first.write(train_record(step))
    first.write({"kind": "event", "step": 7, "time": 0.0, "event": "checkpoint", "detail": ""})
    first.close()
    path.write_text(
        path.read_text() + '{"kind": "train", "step": 8, "lo'
    )  # killed in the middle of a line

    second = tracking.MetricsWriter(path)
    assert len(second.resume(4)) == 4, "three steps and an event came after the checkpoint"
    for step in range(5, 9):
        second.write(train_record(step, loss=9.0))
    second.close()

    records = tracking.read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record["loss"] for record in records[4:]] == [9.0] * 4, (
        "the resumed attempt's numbers stand"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_earlier_restart_is_not_hidden_by_a_later_one(tmp_path: Path) -> None:
    writer = tracking.MetricsWriter(tmp_path / "metrics.jsonl")
    writer.resume(10)
    writer.write(
        {
            "kind": "event",
            "step": 10,
            "time": 0.0,
            "event": "resumed",
            "detail": "from the checkpoint of step 10",
        }
    )
    writer.close()
    again = tracking.MetricsWriter(tmp_path / "metrics.jsonl")
    again.resume(5)
    again.close()
    assert [record["event"] for record in tracking.read_metrics(tmp_path / "metrics.jsonl")] == [
        "resumed"
    ]


def test_a_run_begun_again_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        writer = tracking.MetricsWriter(path)
        writer.write(train_record(1))
        writer.write(train_record(2))
        writer.close()
    records = tracking.read_metrics(path)
    assert [record["kind"] for record in records] == ["event", "train", "train"]
    assert records[0]["event"] == "restarted"
    assert "2 records" in records[0]["detail"]


def test_a_resume_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train_record(1)) + "\n" + json.dumps(train_record(2)) + "\n")
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        tracking.MetricsWriter(path).resume(1)
    assert path.read_text() == before


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path: Path) -> None:
    writer = tracking.MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({**train_record(1), "grad_norm": math.inf, "levels": {"0.1": math.nan}})
    writer.close()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON: other tools cannot read the file")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["grad_norm"] is None
    assert record["levels"] == {"0.1": None}


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"kind": "train"}', '{"kind": "train", "step": "1"}']
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train_record(1)) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        tracking.read_metrics(path)

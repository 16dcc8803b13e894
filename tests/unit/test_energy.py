"""The energy of a training: NVML's counters, summed over ranks, records and attempts.

NVML's interface is simulated. Ranks and resumed attempts: test_trainer.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from canvastune import tracking
from canvastune.config import load_config
from canvastune.evaluation.result import EvaluationResult
from canvastune.report import build
from canvastune.report.summary import Energy, RunSummary, TrainingStats
from canvastune.training import energy
from canvastune.training.energy import EnergyMeter
from components.report.step import _mlflow_metrics
from tools.report_sample import sample_run

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
GPU = {"ranks": 2, "device": "cuda", "device_name": "NVIDIA H200"}
Measure = Callable[..., EnergyMeter]


class NVMLError(Exception):
    """As in nvidia-ml-py, whose errors are of this class."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library of one GPU, whose counter `millijoules` a test sets; an exception is raised."""
    module: Any = ModuleType("pynvml")

    def total_energy(handle: str) -> int:
        assert handle == "GPU-12ab-34", "the counter of another GPU"
        if isinstance(module.millijoules, Exception):
            raise module.millijoules
        return int(module.millijoules)

    module.NVMLError, module.nvmlInit = NVMLError, lambda: None
    module.nvmlDeviceGetHandleByUUID = str
    module.nvmlDeviceGetTotalEnergyConsumption = total_energy
    module.millijoules = 5_000_000
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Make the meter of rank 0, whose GPU torch numbers 0; `others`: why other ranks cannot."""

    def make(*others: str, device: str = "cuda") -> EnergyMeter:
        properties = SimpleNamespace(uuid="12ab-34")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(energy, "gather_results", lambda own: [own(), *others])
        monkeypatch.setattr(energy.dist, "get_rank", lambda: 0)
        return EnergyMeter(torch.device(device))

    return make


def test_a_meter_reads_joules_since_it_was_read_last(nvml: Any, measure: Measure) -> None:
    meter = measure("")
    nvml.millijoules += 1_500
    assert meter.joules() == 1.5
    nvml.millijoules += 250
    assert meter.field(meter.joules()) == {"energy_joules": 0.25}
    assert meter.place == {}
    nvml.millijoules = 10  # the driver was loaded again
    assert math.isnan(meter.joules())
    nvml.millijoules = 1_010
    assert meter.joules() == 1.0


@pytest.mark.parametrize("who", ["this rank", "another rank", "no package"])
def test_a_gpu_without_a_counter_is_told_and_no_rank_measures(
    nvml: Any,
    measure: Measure,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    who: str,
) -> None:
    if who == "this rank":
        nvml.millijoules = NVMLError("Not Supported")
    if who == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.WARNING):
        meter = measure("NVML: Not Supported" if who == "another rank" else "")
    said = r"nvidia-ml-py" if who == "no package" else r"NVML: Not Supported"
    assert re.search(said, meter.place["energy_unmeasured"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(meter.place["energy_unmeasured"])
    assert math.isnan(meter.joules())
    assert meter.field(1.0) == {}, "a sum over some of the ranks"


def test_a_counter_that_fails_later_is_told_once_and_training_goes_on(
    nvml: Any, measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    meter = measure("")
    nvml.millijoules = NVMLError("GPU is lost")
    with caplog.at_level(logging.WARNING):
        found = [meter.joules(), meter.joules()]
    assert all(map(math.isnan, found))
    assert [re.findall("GPU is lost", record.getMessage()) for record in caplog.records] == [
        ["GPU is lost"]
    ]
    assert set(meter.field(found[0])) == {"energy_joules"}, (
        "the record does not say that it lacks it"
    )


def test_a_cpu_is_not_asked(measure: Measure) -> None:
    meter = measure(device="cpu")
    assert meter.field(meter.joules()) == {}
    assert meter.place == {}


def work(step: int, joules: float | None, kind: str = "train") -> dict[str, Any]:
    return {"kind": kind, "step": step, "time": 1.0, "loss": 1.0, "energy_joules": joules}


def event(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "event", "step": 0, "time": 1.0, "event": name, "detail": "", **more}


def test_the_energy_of_a_run_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    """What a resumed attempt repeats was taken, too."""
    path = tmp_path / "metrics.jsonl"
    writer = tracking.MetricsWriter(path)
    for record in (event("started", **GPU), work(1, 1e6), work(2, 1e6), work(2, 5e5, "validation")):
        writer.write(record)
    writer.close()
    again = tracking.MetricsWriter(path)
    lost = tracking.lost_energy(again.resume(1))
    assert lost == {"energy_joules": 1.5e6}
    for record in (event("resumed", **GPU, **lost), work(2, 1e6), work(3, math.nan)):
        again.write(record)
    again.close()
    found = tracking.read_metrics(path)
    assert Energy.from_records(found).kwh is None, "a step that was not measured counts as nothing"
    assert Energy.from_records(found[:-1]).kwh == pytest.approx(3.5 / 3.6)
    third = tracking.MetricsWriter(path)  # no checkpoint is left
    third.write(event("started", **GPU))
    third.close()
    restarted = next(r for r in tracking.read_metrics(path) if r.get("event") == "restarted")
    assert restarted["energy_joules"] is None
    assert tracking.lost_energy([event("checkpoint")]) == {}


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([event("started", ranks=1, device="cpu", threads=2), {**work(1, 0), "x": 1}], "CPU"),
        ([event("started", **GPU, energy_unmeasured="NVML: Not Supported")], "Not Supported"),
        ([event("started", **GPU), work(1, 2.0)], "not every step"),
    ],
)
def test_what_was_not_measured_is_said_with_the_reason(
    records: list[dict[str, Any]], why: str
) -> None:
    unmeasured = {key: value for key, value in work(2, 0).items() if key != "energy_joules"}
    found = Energy.from_records([*records, unmeasured])
    assert found.kwh is None
    assert why in found.unmeasured
    assert "train_energy_kwh" not in RunSummary.from_records([*records, unmeasured], None).figures()


def test_the_report_and_mlflow_show_it_next_to_gpu_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_charts", lambda _: [])  # they take two seconds
    config = load_config(RECIPES / "tiny_lora.yaml")
    run = sample_run(tmp_path, config)
    path = tmp_path / "train" / "metrics.jsonl"

    def tile(folder: str) -> str:
        page = build.build_report(run, tmp_path / folder, []).read_text(encoding="utf-8")
        (text,) = re.findall(r'<dd class="under" id="energy">(.*?)</dd>', page)
        return str(text)

    assert re.match(r"Energy not measured: \w", tile("unmeasured"))
    records = tracking.read_metrics(path)
    counted = [record for record in records if record["kind"] in ("train", "validation")]
    for record in counted:
        record["energy_joules"] = 7.2e6 / len(counted)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert tile("measured").startswith("2 kWh")
    result = EvaluationResult.read(tmp_path / "evaluation")
    summary = RunSummary.from_records(records, result)
    shown = _mlflow_metrics(summary, result, TrainingStats.from_records(records, config))
    assert shown["train/energy_kwh"] == pytest.approx(2)
    assert summary.figures()["train_energy_kwh"] == pytest.approx(2)

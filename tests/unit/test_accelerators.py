"""The peak rate behind a utilization is that of the exact device, or None."""

from __future__ import annotations

from typing import Any

import pytest

from canvastune.perf_model.hardware import ACCELERATORS, accelerator_of
from canvastune.report.charts import build_charts


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),  # three quarters as fast
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_a_device_is_known_by_its_drivers_name(name: str, row: str | None) -> None:
    assert accelerator_of(name) is (ACCELERATORS[row] if row else None)


def test_utilisation_is_a_share_of_the_peak_where_every_runs_is_known() -> None:
    known: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "tflops": 400.0, "mfu": 0.4} for step in (1, 2)
    ]
    unknown = [{name: value for name, value in record.items() if name != "mfu"} for record in known]
    slow = [{**record, "tflops": 0.02} for record in unknown]
    for runs, unit, value in (
        ([known], "% of the accelerator's peak", 40.0),
        ([known, unknown], "TFLOP/s per process", 400.0),
        ([slow, slow], "GFLOP/s per process", 20.0),
    ):
        (chart,) = [
            chart
            for chart in build_charts([(str(at), run) for at, run in enumerate(runs)])
            if chart.name == "utilisation"
        ]
        assert (chart.unit, chart.lines[0].values[0]) == (unit, pytest.approx(value))

"""The peak that a utilisation is a share of is that of the very device, or there is none."""

from __future__ import annotations

import pytest

from canvastune.plan.accelerators import ACCELERATORS, accelerator_of


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

"""The floors of versions: one table, in the code and in the docs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import yaml

from components.jobs.states import PYTORCHJOB, TRAINJOB
from components.versions import FLOORS, KUBERNETES, MLFLOW_CLIENT, PIPELINES, Floor
from tools.chart_table import CHART

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
_START = "<!-- versions: generated from components/versions.py, compared by tests/unit/test_versions.py -->"
_END = "<!-- end of versions -->"


def _table() -> str:
    rows = [
        f"| {floor.program} | {floor.version} | {floor.reason} | {floor.compared} |"
        for floor in FLOORS
    ]
    return "\n".join(
        ["| program | oldest version | reason | checked by |", "|---|---|---|---|", *rows]
    )


def test_the_page_has_the_table_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(_START)[2].partition(_END)[0].strip() == _table()


def test_the_chart_and_the_operators_have_the_same_floors() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["kubeVersion"] == f">={KUBERNETES.version}.0-0".replace(".0.0", ".0")
    assert PYTORCHJOB.operator.endswith(" 1.9")
    assert TRAINJOB.operator.endswith(" 2.3")


def test_the_floor_of_mlflow_s_client_is_the_version_that_the_package_pins() -> None:
    requires = metadata.requires("canvastune") or []
    (pinned,) = [one.removeprefix("mlflow==") for one in requires if one.startswith("mlflow==")]
    assert not MLFLOW_CLIENT.is_below(pinned)
    assert pinned.startswith(f"{MLFLOW_CLIENT.version}.")


@pytest.mark.parametrize(
    ("found", "below"),
    [
        ("2.14.0", True),
        ("2.9", True),
        ("1.8.22", True),
        ("2.15.0", False),
        ("2.15.0-rc.1", False),
        ("v2.17.0", False),
        ("2.100.0", False),
        ("3.0.0", False),
        ("", False),
        ("master", False),
        ("a1b2c3d", False),
    ],
)
def test_versions_are_compared_as_numbers_and_unknown_ones_are_taken(
    found: str, below: bool
) -> None:
    assert PIPELINES.is_below(found) is below


def test_versions_of_clouds_are_read() -> None:
    floor = Floor("Kubernetes", "1.25", "", "")
    assert floor.is_below("v1.24.17-eks-abc")
    assert not floor.is_below("v1.29.3-gke.1")

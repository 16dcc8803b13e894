"""`make test-newest`: which versions it asks for, and what it says of the tests that fail."""

from __future__ import annotations

from pathlib import Path

from tools.newest import describe_failures, describe_versions, failures, loosen


def test_pins_and_upper_bounds_are_dropped_and_lower_ones_kept() -> None:
    wanted = ["torch==2.13.0", "kfp[kubernetes]==2.17.0", "kubernetes>=30.1,<31", "numpy>=2"]
    assert loosen(wanted, keep=["Torch"]) == [
        *("torch==2.13.0", "kfp[kubernetes]", "kubernetes>=30.1", "numpy>=2")
    ]


def test_a_version_that_differs_is_named_with_both() -> None:
    here, newest = {"torch": "2.13.0", "peft": "0.21.2"}, {"torch": "2.14.1", "peft": "0.21.2"}
    (line,) = describe_versions(["torch==2.13.0", "peft==0.21.2"], here, newest)
    assert line.startswith("torch: 2.13.0 here")
    assert line.endswith("2.14.1")


def test_failures_are_told_apart_from_those_of_the_pinned_versions(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.unit.test_a" file="tests/unit/test_a.py" name="test_x[1]">
          <failure message="AssertionError: no cache&#10;more">...</failure></testcase>
        <testcase classname="tests.unit.test_a" file="tests/unit/test_a.py" name="test_y">
          <error message="lost">...</error></testcase>
        <testcase classname="tests.unit.test_a" file="tests/unit/test_a.py" name="test_z"/>
        </testsuite></testsuites>"""
    )
    failed = failures(report)
    assert failed == {
        "tests/unit/test_a.py::test_x[1]": "AssertionError: no cache",
        "tests/unit/test_a.py::test_y": "lost",
    }
    lines = describe_failures(failed, {"tests/unit/test_a.py::test_y": "lost"})
    only, both = lines[1:2], lines[3:]
    assert only == ["  tests/unit/test_a.py::test_x[1]: AssertionError: no cache"]
    assert both == ["  tests/unit/test_a.py::test_y"]

"""The public Python API: the examples of docs/api.md run as shown, and importing it is cheap."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

import canvastune
from tests.support.documents import ROOT, blocks

PAGE = ROOT / "docs" / "api.md"
FUNCTIONS = {
    "canvastune.preparation": "prepare_data",
    "canvastune.planner": "make_plan",
    "canvastune.training": "train",
    "canvastune.merge": "merge_lora",
    "canvastune.evaluation": "evaluate",
    "canvastune.report": "build_report",
}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's examples leave behind, run in the order of the page."""
    names: dict[str, Any] = {"__name__": "__example__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        for block in blocks(PAGE, "python"):
            exec(compile(block.text, str(block), "exec"), names)
    return names


@pytest.mark.parametrize(("package", "name"), FUNCTIONS.items(), ids=FUNCTIONS.values())
def test_each_public_function_has_an_example_that_runs(
    package: str, name: str, example: dict[str, Any]
) -> None:
    shown = f"from {package} import"
    (block,) = [
        block.text
        for block in blocks(PAGE, "python")
        if any(shown in line and name in line for line in block.text.splitlines())
    ]
    assert f"{name}(" in block
    assert example[name] is getattr(importlib.import_module(package), name)


def test_the_examples_produce_a_report(example: dict[str, Any]) -> None:
    assert example["result"]["export"] == "adapter"
    assert example["proof"]["passed"]
    assert example["scores"].rows == 2


def test_the_package_exports_what_its_page_names() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {name for name in canvastune.__all__ if f"`canvastune.{name}`" in text} == {
        "RunConfig",
        "UserError",
        "load_config",
    }
    assert all(getattr(canvastune, name) for name in canvastune.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = canvastune.no_such_name


def test_importing_the_package_loads_no_library() -> None:
    packages = ", ".join(
        ["canvastune", *(package for package in FUNCTIONS if package != "canvastune.merge")]
    )
    heavy = ("torch", "transformers", "datasets", "pydantic", "mlflow", "matplotlib")
    program = f"import sys, {packages}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_only_starts_the_work_of_others_loads_no_pytorch() -> None:
    launchers = "components.evaluate.step, components.train.step, pipelines.local_runner"
    program = f"import sys, {launchers}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"

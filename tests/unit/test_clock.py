"""The machine's clock may be set during a run: nothing that is measured depends on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from canvastune.logging import TrainingProgress
from pipelines import runs

ROOT = Path(__file__).parents[2]
AGES = {  # of files, whose times are those of the clock too
    "canvastune/checkpoint/fetch.py: _remove_interrupted",
    "components/run_list.py: _state",
}


def _is_clock(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time"


def _differences(tree: ast.AST) -> Iterator[str]:
    """Yield the names of functions that subtract from a time of the clock, or it from another."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        times = {
            ast.unparse(target)
            for node in nodes
            if isinstance(node, ast.Assign) and _is_clock(node.value)
            for target in node.targets
        }
        for node in nodes:
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                sides = (node.left, node.right)
                if any(_is_clock(side) or ast.unparse(side) in times for side in sides):
                    yield function.name


def test_no_duration_is_a_difference_of_clock_times() -> None:
    found = set()
    for package in ("canvastune", "components", "pipelines"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            names = _differences(ast.parse(text)) if "time.time(" in text else ()
            found |= {f"{file.relative_to(ROOT)}: {name}" for name in names}
    assert found == AGES, "use time.monotonic()"


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_the_time_left_is_not_the_clocks(
    jump: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, clock = 100.0, 1.8e9
    monkeypatch.setattr("canvastune.logging.time.monotonic", lambda: now)
    monkeypatch.setattr("canvastune.logging.time.time", lambda: clock)
    numbers = dict.fromkeys(
        ("loss", "diffusion_loss", "autoregressive_loss", "grad_norm", "lr", "tokens_per_second"),
        1.0,
    )
    progress = TrainingProgress(steps=11, log_every=1)
    with caplog.at_level("INFO", "canvastune.logging"):
        for step in (6, 7):
            progress.show({"kind": "train", "step": step, **numbers})
            now, clock = now + 2, clock + jump
    assert caplog.messages[-1].endswith("  0:08 left")


@pytest.mark.parametrize(("seconds", "age"), [(-3600.0, "0 s"), (59.0, "59 s"), (3660.0, "1 h")])
def test_no_age_is_negative(seconds: float, age: str) -> None:
    assert runs._age(seconds) == age

"""Every line that only a GPU runs is listed in docs/verification.md with what verifies it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "verification.md"
ROOMS = ("canvastune", "components", "pipelines")
# Numbers about GPUs, which are computed everywhere.
ELSEWHERE = ("canvastune/perf_model", "canvastune/planner", "canvastune/report")
# What a line that depends on the device has: of torch, or of the functions that ask it for others.
NAMES = {
    *("is_cuda", "pin_memory", "enable_cudnn_sdp", "set_device"),
    *("few_launches", "takes_gate_kernel", "leaves_empty_groups"),
}
OWNERS = {("torch", "cuda"), ("backends", "cuda"), ("version", "cuda"), ("kernels", "available")}
KERNELS = {"canvastune/model/kernels.py", "canvastune/model/triton_kernels.py"}  # nothing else
WHOLE = "all of it"  # in the place of functions
SECTION = "### Where this code is"


def depends_on_the_device(node: ast.AST) -> bool:
    """Return whether a syntax node asks for a GPU, or makes what only a GPU has."""
    if isinstance(node, ast.Attribute):
        owner = node.value
        name = getattr(owner, "attr", getattr(owner, "id", ""))
        return node.attr in NAMES or (name, node.attr) in OWNERS
    if isinstance(node, ast.Name):
        return node.id in NAMES
    if isinstance(node, ast.keyword):
        return node.arg in NAMES
    if isinstance(node, ast.Import | ast.ImportFrom):
        named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return any(name.split(".")[0] == "triton" for name in named)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        kinds = {side.value for side in sides if isinstance(side, ast.Constant)}
        return bool(kinds & {"cuda", "cpu"})
    return isinstance(node, ast.Constant) and str(node.value).endswith(("nccl", "cuda:0"))


def functions(tree: ast.AST, within: str = "") -> Iterator[str]:
    """Yield the qualified name of the function of each such node; "" for the module."""
    for node in ast.iter_child_nodes(tree):
        inside = within
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{within}.{node.name}" if within else node.name
        elif depends_on_the_device(node):
            yield within
        yield from functions(node, inside)


def in_the_code() -> set[tuple[str, str]]:
    """Return files and their functions with such lines."""
    found = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(ELSEWHERE):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {(name, WHOLE if name in KERNELS else each) for each in functions(tree)}
    return found


def on_the_page() -> dict[tuple[str, str], str]:
    """Return what verifies each file and function of the table."""
    section = PAGE.read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    found = {}
    for line in re.findall(r"^\| `.*$", section, re.MULTILINE):
        file, names, how = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names) or [names]:
            found[file.strip("`"), name] = how
    return found


def test_every_line_that_depends_on_a_gpu_is_listed_with_what_verifies_it() -> None:
    code, page = in_the_code(), on_the_page()
    assert not code - page.keys(), f"add a row to {PAGE.name}: {SECTION}"
    assert not page.keys() - code, f"not there any more: remove from {PAGE.name}"


def test_what_verifies_a_line_exists() -> None:
    for place, how in on_the_page().items():
        tests = re.findall(r"`(tests/[^`]+\.py)`", how)
        assert all((ROOT / test).is_file() for test in tests), place
        assert tests or "dry run" in how or "a GPU is needed" in how, place


@pytest.mark.parametrize(
    "line",
    [
        "x.is_cuda",
        "torch.cuda.synchronize()",
        "torch.backends.cuda.enable_cudnn_sdp(False)",
        "device.type != 'cpu'",
        "import triton.language as tl",
        "dist.init_process_group('cpu:gloo,cuda:nccl')",
        "tensor.pin_memory()",
        "torch.empty(1, pin_memory=True)",
        "kernels.available(x)",
    ],
)
def test_such_lines_are_found(line: str) -> None:
    assert list(functions(ast.parse(f"def f():\n    {line}"))) != []
    assert list(functions(ast.parse("def f():\n    x.to(device).cpu()"))) == []

"""The commands say what is wrong in one line, and Ctrl-C leaves nothing running."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from canvastune.config import load_config
from pipelines.cli import _parser, main

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "pipelines" / "recipes"


def _commands() -> list[str]:
    (choices,) = [list(action.choices) for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return choices


def _help(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 140, "wider than a wide terminal"
    return text


def _examples(text: str) -> list[list[str]]:
    """The commands of ours in a help text, as a shell would split them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"  (canvastune [a-z]|torchrun )", line)]


@pytest.mark.parametrize("command", [[], *([name] for name in _commands())])
def test_help_teaches_by_examples_that_the_command_line_takes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(command, capsys)
    examples = _examples(text.partition("examples:")[2])
    assert examples, f"canvastune {' '.join(command)} --help has no example"
    assert not command or examples[0][1] == command[0], "the first example is of another command"
    for example in examples:
        if example[0] == "torchrun":
            assert (ROOT / example[example.index("-c") + 1]).is_file(), example
            continue
        options = _parser().parse_args(example[1:])
        recipe = getattr(options, "recipe", None)
        if recipe is not None and recipe != "my.yaml":
            assert (ROOT / recipe).is_file(), f"sends people to a recipe that is not there: {example}"
            load_config(ROOT / recipe, options.set)


def test_exit_codes_are_the_same_in_help_and_readme(capsys: pytest.CaptureFixture[str]) -> None:
    codes = set(re.findall(r"^  (\d+)  +\w", _help([], capsys).partition("exit codes:")[2], re.MULTILINE))
    assert codes == {"0", "1", "2", "130"}
    readme = " ".join((ROOT / "README.md").read_text().split()).partition("Exit codes: ")[2].partition(". `canvastune.train`")[0]
    assert set(re.findall(r"\d+", readme)) == codes


def test_command_that_is_mistyped_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["runn", "my.yaml"])
    assert ended.value.code == 2
    assert "runn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora.rnak=32", "lora.rank"),
        ("train.epochs=3", "train.steps"),
        ("zzzz=1", "known keys begin with"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("train.steps=many", "train.steps"),
    ],
)
def test_mistyped_key_is_one_line_and_nothing_runs(key: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = tmp_path / "workspace"
    code = main(["run", str(RECIPES / "gsm8k_lora.yaml"), "--set", key, "--workspace", str(workspace)])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("canvastune: error: ")
    assert error.count("\n") == 1, f"more than one line: {error}"
    assert hint in error
    assert not workspace.exists(), "a refused recipe left a workspace behind"


def test_missing_recipe_is_an_error_with_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such.yaml"]) == 1
    assert "no-such.yaml: no such recipe file" in capsys.readouterr().err


def test_compile_refuses_a_name_that_kubeflow_would_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "-o", str(tmp_path / "pipeline.txt")]) == 1
    assert ".yaml" in capsys.readouterr().err


def test_make_tiny_model_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("mine")
    assert main(["make-tiny-model", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(("text", "gigabytes"), [("80", 80.0), ("80GB", 80.0), ("80gib", 85.899)])
def test_gpu_memory_is_read_with_its_unit(text: str, gigabytes: float) -> None:
    from pipelines.cli import _gigabytes

    assert _gigabytes(text) == pytest.approx(gigabytes, rel=1e-4)

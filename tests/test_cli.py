"""The commands say what is wrong in one line, and Ctrl-C leaves nothing running."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.cli import main

RECIPES = Path(__file__).parents[1] / "pipelines" / "recipes"


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "canvastune run pipelines/recipes/tiny_lora.yaml" in text
    assert "canvastune submit my.yaml --host http://localhost:8080 --wait" in text
    assert "torchrun --standalone" in text


@pytest.mark.parametrize("command", ["submit", "upload"])
def test_help_of_what_talks_to_a_cluster_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"  canvastune {command} " in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 140, "wider than a wide terminal"


@pytest.mark.parametrize("command", [[], ["submit"]])
def test_recipes_that_help_names_exist(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    named = set(re.findall(r"pipelines/recipes/\S+\.yaml", capsys.readouterr().out))
    assert named
    missing = [name for name in named if not (RECIPES.parents[1] / name).is_file()]
    assert not missing, f"--help sends people to recipes that are not there: {missing}"


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

"""The commands say what is wrong in one line, and Ctrl-C leaves nothing running."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from canvastune import train as trainer
from canvastune.config import load_config
from canvastune.logging import format_event
from canvastune.tiny_model import write_problems
from pipelines.cli import main
from pipelines.local_output import LocalOutput
from pipelines.parser import build_parser, parse_gigabytes, subcommands
from tests.support.training import make_ground
from tools.loss_compare.side import Side

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipelines" / "recipes"


def _commands() -> list[str]:
    return list(subcommands(build_parser()))


def _help(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120, "wider than a wide terminal"
    return text


def _examples(text: str) -> list[list[str]]:
    """The commands of ours in a help text, as a shell would split them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.partition(" > ")[0], comments=True)
        for line in lines
        if re.match(r"  (canvastune [a-z]|torchrun )", line)
    ]


@pytest.mark.parametrize("command", [[], *([name] for name in _commands())])
def test_help_teaches_by_examples_that_the_command_line_takes(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = _help(command, capsys)
    examples = _examples(text.partition("examples:")[2])
    assert examples, f"canvastune {' '.join(command)} --help has no example"
    assert not command or examples[0][1] == command[0], "the first example is of another command"
    for example in examples:
        if example[0] == "torchrun":
            assert (
                ROOT
                / trainer._parser()
                .parse_args(example[example.index("canvastune.train") + 1 :])
                .config
            ).is_file(), example
            continue
        options = build_parser().parse_args(example[1:])
        recipe = getattr(options, "recipe", None)
        if recipe is not None and recipe != "my.yaml":
            assert (ROOT / recipe).is_file(), (
                f"sends people to a recipe that is not there: {example}"
            )
            load_config(ROOT / recipe, options.set)


def test_help_of_the_trainer_teaches_by_examples_that_it_takes() -> None:
    examples = [
        shlex.split(line)[: -2 if " > " in line else None]
        for line in trainer._EPILOG.replace("\\\n", " ").splitlines()
        if line.startswith("  ")
    ]
    assert len(examples) == 3
    for example in examples:
        options = trainer._parser().parse_args(example[example.index("canvastune.train") + 1 :])
        load_config(ROOT / options.config, options.set)


def test_exit_codes_are_the_same_in_help_and_readme(capsys: pytest.CaptureFixture[str]) -> None:
    codes = set(
        re.findall(r"^  (\d+)  +\w", _help([], capsys).partition("exit codes:")[2], re.MULTILINE)
    )
    assert codes == {"0", "1", "2", "130"}
    readme = (
        " ".join((ROOT / "README.md").read_text().split())
        .partition("Exit codes: ")[2]
        .partition(". `canvastune.train`")[0]
    )
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
        ("zzzz=1", " name, seed, model, "),
        ("optimiser.lr=1", "optimizer.lr"),
        ("train.steps=many", "train.steps"),
    ],
)
def test_mistyped_key_is_one_message_and_nothing_runs(
    key: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    code = main(
        ["run", str(RECIPES / "gsm8k_lora.yaml"), "--set", key, "--workspace", str(workspace)]
    )
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("canvastune: error: ")
    assert error.count("\n") == 2, f"more than a message and a hint: {error}"
    assert hint in error
    assert not workspace.exists(), "a refused recipe left a workspace behind"


def test_missing_recipe_is_an_error_with_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such.yaml"]) == 1
    assert capsys.readouterr().err.startswith("canvastune: error: no-such.yaml: ")


def test_compile_refuses_a_name_that_kubeflow_would_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "-o", str(tmp_path / "pipeline.txt")]) == 1
    assert ".yaml" in capsys.readouterr().err


def test_make_tiny_model_does_not_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("mine")
    assert main(["make-tiny-model", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(("text", "gigabytes"), [("80", 80.0), ("80GB", 80.0), ("80gib", 85.899)])
def test_gpu_memory_is_read_with_its_unit(text: str, gigabytes: float) -> None:
    assert parse_gigabytes(text) == pytest.approx(gigabytes, rel=1e-4)


_ASK_BASH = """
source completion.bash
ask() {{ COMP_WORDS=(canvastune "$@"); COMP_CWORD=$#; _shtab_canvastune canvastune "${{@: -1}}" "${{@: -2:1}}"; echo "${{COMPREPLY[@]}}"; }}
{question}
"""


@pytest.mark.parametrize(
    ("question", "answer"),
    [("ask su", "submit"), ("ask run --work", "--workspace"), ("ask run my", "my.yaml")],
)
def test_bash_completes_commands_options_and_files(
    question: str, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    (tmp_path / "my.yaml").touch()
    done = subprocess.run(
        ["bash", "-c", _ASK_BASH.format(question=question)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [answer]


def test_zsh_completion_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef canvastune\n")
    missing = [name for name in _commands() if f"    {name}:'" not in script]
    assert not missing


# --- --log-format json


def _events(
    commands: Side, folder: Path, module: str, *arguments: str
) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and the objects of a process that prints nothing else."""
    code, said = commands.run(
        module, *arguments, "--log-format", "json", expect=None, folder=folder
    )
    events = [json.loads(line) for line in said.splitlines()]
    assert all({"time", "level", "event"} <= event.keys() for event in events)
    return code, events


def test_training_in_json_says_each_step_with_its_numbers(commands: Side, tmp_path: Path) -> None:
    make_ground(tmp_path)
    command = ["canvastune.train", "-c", "recipe.yaml", "--data", "data"]
    settings = ("train.steps=2", "train.log_every=1", "parallel.ep=1", "parallel.nproc_per_node=1")
    changed = [part for setting in settings for part in ("--set", setting)]
    code, events = _events(commands, tmp_path, *command, "--output", "out", *changed)
    assert code == 0, events[-1].get("traceback", events)
    steps = [event for event in events if event["event"] == "train"]
    assert [(event["step"], event["steps"]) for event in steps] == [(1, 2), (2, 2)]
    assert {"loss", "grad_norm", "tokens_per_second", "seconds_left"} <= steps[0].keys()
    assert [event["step"] for event in events if event["event"] == "validation"] == [0, 2]
    code, events = _events(
        commands, tmp_path, *command, "--output", "refused", "--set", "train.steps=none"
    )
    assert code == 1
    assert events[0]["event"] == "error"
    assert "train.steps" in events[0]["message"]


def test_preparing_and_evaluating_in_json_say_nothing_but_objects(
    commands: Side, tmp_path: Path, tiny_model: Path
) -> None:
    write_problems(tmp_path / "rows.jsonl", "change", 200, seed=0)
    asked = "evaluate: {rows: 2, batch_size: 2, max_new_tokens: 8, sampler: {steps: 1}}"
    data = "data: {source: rows.jsonl, validation_fraction: 0.1}\ntrain: {precision: float32}"
    (tmp_path / "recipe.yaml").write_text(
        f"name: x\nmodel: {{id: {tiny_model}}}\n{data}\n{asked}\n"
    )
    prepare = ("pipelines.cli", "prepare", "recipe.yaml", "--output", "prepared")
    code, events = _events(commands, tmp_path, *prepare)
    assert code == 0, events
    assert (events[-1]["event"], events[-1]["rows_read"]) == ("prepared", 200)

    places = ("--data", "prepared", "--tuned", str(tiny_model), "--output", "out")
    evaluate = ("canvastune.evaluate", "-c", "recipe.yaml", *places)
    code, events = _events(commands, tmp_path, *evaluate)
    assert code == 0, events
    assert events[-1]["message"].startswith("evaluate: exact match")

    for again in (prepare, evaluate):  # into a folder that holds something
        code, events = _events(commands, tmp_path, *again)
        assert code == 1
        assert (events[-1]["event"], events[-1]["level"]) == ("error", "error")


def test_pipeline_in_json_names_the_task_of_each_event() -> None:
    out = io.StringIO()
    with LocalOutput(out, json=True).listening():
        logging.info("Executing task 'train-2'")
        print("    a plain line\n    " + format_event("train", step=7, loss=float("nan")))
        logging.info("Task 'train-2' finished with status SUCCESS")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["task_started", "log", "train", "task_finished"]
    assert {event["task"] for event in events} == {"train"}
    assert (events[1]["message"], events[2]["step"], events[2]["loss"]) == ("a plain line", 7, None)
    assert "seconds" in events[3]

"""`canvastune ask`: questions to the tuned model of a run, and to its base."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import pytest

from canvastune.config import RunConfig, parse_config, write_config
from canvastune.evaluation.chat_model import ChatModel
from canvastune.tiny_model import make_tiny_model
from canvastune.tracking import steps
from canvastune.tracking.steps import FINISHED, KILLED, Attempt
from components.run_directory import RunRecord, write_record
from pipelines.cli import main

SYSTEM = "Answer in Latin."
QUESTIONS = ["Tom has 3 apples. How many?", "Who are you?", "Tom has 3 apples. How many?"]


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> RunConfig:
    return parse_config(
        {
            "name": "tiny_lora",
            "model": {"id": str(tiny_model)},
            "data": {"source": "rows.jsonl"},
            "evaluate": {"max_new_tokens": 8, "batch_size": 2, "sampler": {"steps": 2}},
        }
    )


@pytest.fixture(scope="module")
def workspace(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the run `rank16`, whose model is another one than its base, and an unfinished one."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, status in (("rank16", FINISHED), ("stopped", KILLED)):
        run = folder / "runs" / name
        record = RunRecord("1", config.model_dump_json(), "f", finished=status == FINISHED)
        write_record(run, record)
        resume = f"canvastune run tiny.yaml --run-name {name}"
        steps.begin_attempt(run, "1", Attempt("1", 0.0, socket.gethostname(), 7, resume))
        steps.end_attempt(run, "1", status, "" if status == FINISHED else "train")
        (run / "train").mkdir()
        (run / "train" / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 1}\n')
    make_tiny_model(folder / "runs" / "rank16" / "model", seed=7)
    return folder


@pytest.fixture(scope="module")
def expected(workspace: Path, config: RunConfig) -> dict[str, list[str]]:
    """Return what each model answers to the questions, and the tuned one with a system message."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    folders = {"base": Path(config.model.id), "tuned": workspace / "runs" / "rank16" / "model"}
    models = {side: ChatModel(folder, config.evaluate) for side, folder in folders.items()}
    found = {
        side: model.answer(chats, seed=config.seed, max_new_tokens=8)
        for side, model in models.items()
    }
    system = [[{"role": "system", "content": SYSTEM}, *chat] for chat in chats]
    short = models["tuned"].answer(system, seed=config.seed, max_new_tokens=4)
    return found | {"system": short}


def test_one_answer_is_all_of_the_output(
    workspace: Path, expected: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace / "runs" / "rank16"
    assert main(["ask", str(folder), QUESTIONS[0]]) == 0
    assert capsys.readouterr().out == f"{expected['tuned'][0]}\n"
    more = ["--set", "evaluate.max_new_tokens=4", "--system", SYSTEM]
    assert main(["ask", "rank16", QUESTIONS[1], *more, "--workspace", str(workspace)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{expected['system'][1]}\n"
    assert "1 of 1 answers" in captured.err, "a cut answer without a word"
    assert "--set evaluate.max_new_tokens=8" in captured.err


def test_the_lines_of_standard_input_are_asked_of_both_models(
    workspace: Path,
    expected: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = workspace / "runs" / "rank16"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*QUESTIONS, "", ""])))
    assert main(["ask", str(folder), "--base"]) == 0
    sides = (expected["base"], expected["tuned"])
    assert sides[0] != sides[1], "two models that answer alike prove nothing"
    blocks = [
        f"> {question}\nbase:\n    {before}\ntuned:\n    {after}\n"
        for question, before, after in zip(QUESTIONS, *sides, strict=True)
    ]
    assert capsys.readouterr().out == "\n".join(blocks)
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["ask", str(folder)]) == 1
    assert "no question" in capsys.readouterr().err


def test_a_question_beyond_the_models_positions_is_warned_of(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "rank16"
    shutil.copytree(workspace / "runs" / "rank16", run)
    file = run / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["max_position_embeddings"] = 64
    file.write_text(json.dumps(config))
    assert main(["ask", str(run), "Who?"]) == 0
    assert "positions" not in capsys.readouterr().err
    assert main(["ask", str(run), "Who? " * 64]) == 0
    assert "exceed the model's 64 positions" in capsys.readouterr().err


def test_what_cannot_be_asked_is_refused_with_what_to_do(
    workspace: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        assert main(["ask", *words, "Who?", "--workspace", str(workspace)]) == 1
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err

    assert "Did you mean 'rank16'?" in refusal("rank61")
    assert "Did you mean 'rank16'?" in refusal("RANK16")
    unfinished = refusal("stopped")
    assert "interrupted in train, step 3 of " in unfinished
    assert "canvastune run tiny.yaml --run-name stopped" in unfinished
    assert "run.json" in refusal(str(tmp_path))
    assert "evaluate" in refusal("rank16", "--set", "train.steps=9")
    trained = tmp_path / "trained"
    shutil.copytree(workspace / "runs" / "rank16" / "train", trained)
    write_config(config, trained / "config.yaml")
    assert "of only a training" in refusal(str(trained))
    copied = tmp_path / "runs" / "rank16"
    shutil.copytree(workspace / "runs" / "rank16", copied)
    (copied / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "no tokenizer.json" in refusal(str(copied))
    (copied / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "'bert'" in refusal(str(copied))
    shutil.rmtree(copied / "model")
    assert "no tuned model" in refusal(str(copied))

"""MLflow loads what a run logs, in a fresh process somewhere else, and it answers as the evaluation
does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvastune import tracking
from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.evaluation.chat_model import ChatModel
from canvastune.tracking import model_registry
from canvastune.tracking.client import load_mlflow

pytestmark = pytest.mark.usefixtures("own_mlflow")
QUESTIONS = ["Tom has 3 apples. How many?", "Who are you?"]
# Everything that the process says is a line of JSON; what canvastune imports is counted there.
_ASK = """
import ast, importlib.metadata, json, sys
import mlflow

model = mlflow.pyfunc.load_model(sys.argv[1])
questions = json.loads(sys.argv[2])
answers = model.predict(questions)
import canvastune

ours = [m.__file__ for name, m in list(sys.modules.items()) if name.partition(".")[0] == "canvastune"]
trees = [ast.parse(open(file, encoding="utf-8").read()) for file in ours if file]
found = set()
for node in (node for tree in trees for node in tree.body):
    if isinstance(node, ast.Import):
        found |= {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
        found.add(node.module.partition(".")[0])
owners = importlib.metadata.packages_distributions()
packages = {name for each in found - set(sys.stdlib_module_names) for name in owners.get(each, [])}
print(json.dumps({
    "answers": answers,
    "one": model.predict(questions[1:], params={"seed": 7, "max_new_tokens": 4}),
    "code": canvastune.__file__,
    "packages": sorted(packages - {"canvastune"}),
}))
"""


def _config(base: Path) -> RunConfig:
    return parse_config(
        {
            "name": "tiny_lora",
            "seed": 3,
            "model": {"id": str(base)},
            "data": {"source": "openai/gsm8k"},
            "evaluate": {"max_new_tokens": 8, "sampler": {"steps": 2}},
            "tracking": {"registered_model": "tiny-words"},
        }
    )


def _log(workspace: Path, name: str, folder: Path, base: Path, kind: str = "merged") -> Any:
    """Return the logged model of a run's step."""
    run = tracking.PipelineRun(_config(base), workspace / "runs" / name, "job")
    with tracking.step_run(run, "merge_lora") as record:
        record.model(folder, kind)
    assert tracking.pending(run) == []
    client = load_mlflow().MlflowClient(run.uri)
    (model,) = client.search_logged_models(["1"], f"source_run_id = '{record.run_id}'")
    return model


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def uri(workspace: Path) -> str:
    """The embedded store of the module, which is MLflow's default in this test."""
    found = f"sqlite:///{workspace}/mlflow.db"
    load_mlflow().set_tracking_uri(found)
    return found


def test_mlflow_loads_the_registered_model_elsewhere_and_it_answers_as_the_sampler_does(
    workspace: Path, uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    _log(workspace, "asked", tiny_model, tiny_model)
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ASK, "models:/tiny-words/1", json.dumps(QUESTIONS)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    direct = ChatModel(tiny_model, _config(tiny_model).evaluate)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert said["answers"] == direct.answer(chats, seed=3, max_new_tokens=8)
    assert said["one"] == direct.answer(chats[1:], seed=7, max_new_tokens=4)
    assert any(said["answers"]), "two empty answers prove nothing"
    assert "/code/canvastune/" in said["code"], "the model's own copy of the code was not used"
    needed = {name.lower().replace("_", "-") for name in said["packages"]}
    known = {name.lower().replace("_", "-") for name in mlmodel_requirements()}
    assert needed <= known, "the model's requirements lack what answering imports"


def mlmodel_requirements() -> list[str]:
    from canvastune.tracking.mlmodel import REQUIREMENTS

    return list(REQUIREMENTS)


def test_the_model_says_what_it_takes_and_gives_and_holds_no_pickle(
    workspace: Path, uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    mlflow = load_mlflow()
    model = _log(workspace, "described", tiny_model, tiny_model)
    folder = Path(
        mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(tmp_path))
    )
    described = yaml.safe_load((folder / "MLmodel").read_text())
    signature = described["signature"]
    assert json.loads(signature["inputs"]) == [{"type": "string", "required": True}]
    assert json.loads(signature["outputs"]) == [
        {"type": "string", "name": "answer", "required": True}
    ]
    assert [(each["name"], each["default"]) for each in json.loads(signature["params"])] == [
        ("system", ""),
        ("seed", 3),
        ("max_new_tokens", 8),
    ]
    assert described["model_id"] == model.model_id
    assert json.loads((folder / "input_example.json").read_text())
    pinned = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("transformers==") for line in pinned)
    assert all(line.count("==") == 1 and "+" not in line for line in pinned), pinned
    files = [file.name for file in folder.rglob("*") if file.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pyc"))]
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    assert weights == sorted(file.name for file in tiny_model.glob("*.safetensors"))


def test_weights_that_are_not_uploaded_are_found_where_they_are_or_where_they_went(
    workspace: Path,
    uri: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_registry, "_LARGEST_MODEL", 0)
    mlflow = load_mlflow()
    made = tmp_path / "model"
    shutil.copytree(tiny_model, made)
    model = _log(workspace, "pointer", made, tiny_model)
    address = f"models:/{model.model_id}"
    answers = mlflow.pyfunc.load_model(address).predict(QUESTIONS)
    made.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=re.escape(str(made))):
        mlflow.pyfunc.load_model(address)
    elsewhere = {"folder": str(tmp_path / "moved")}
    assert mlflow.pyfunc.load_model(address, model_config=elsewhere).predict(QUESTIONS) == answers
    uploaded = Path(model.artifact_location.removeprefix("file://"))
    assert not list(uploaded.rglob("*.safetensors"))


def test_a_system_message_is_part_of_the_chat(tiny_model: Path) -> None:
    model = ChatModel(tiny_model, _config(tiny_model).evaluate)
    plain = [{"role": "user", "content": QUESTIONS[0]}]
    answers = model.answer(
        [plain, [{"role": "system", "content": "Answer in Latin."}, *plain], plain],
        seed=0,
        max_new_tokens=8,
    )
    assert answers[0] == answers[2], "a question asked twice is answered twice"
    assert answers[0] != answers[1]

"""The graph is what it says, and the same graph runs here from end to end, fails with the reason,
and never overwrites.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from canvastune.evaluation.result import EvaluationResult
from canvastune.io.hashing import hash_path
from canvastune.tiny_model import write_problems
from canvastune.tracking import read_metrics
from components.run_directory import read_record
from tests.fakes.fake_cluster import addresses_outside
from tests.support import warm
from tests.support.golden import golden
from tools.loss_compare import snapshot

pytestmark = pytest.mark.timeout(900)  # on a busy machine
ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "pipelines" / "finetune.yaml"
STEPS = ("resolve", "prepare_data", "plan", "train", "merge_lora", "evaluate", "report", "finish")
RECIPE = """
name: small
model: {{id: {model}}}
data: {{source: {data}, seq_length: 96, validation_fraction: 0.2, validation_rows: 4}}
train:
  steps: 30
  global_batch_size: 2
  precision: float32
  activation_checkpointing: false
  log_every: 10
  validate_every: 1000
  validation_levels: [0.5]
  checkpoint_every: 1000
lora: {{rank: 8}}
parallel: {{nproc_per_node: 2, ep: 2}}
evaluate: {{rows: 2, batch_size: 2, max_new_tokens: 16, sampler: {{steps: 2}}}}
"""


# --- the graph ---------------------------------------------------------------------------------------------------------


def test_committed_pipeline_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    compiled = []
    for seed in ("1", "2"):  # sets in another order must not matter
        out = tmp_path / f"{seed}.yaml"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "compile", "-o", str(out)],
            cwd=ROOT,
            env=environment,
            check=True,
        )
        compiled.append(out.read_bytes())
    assert compiled[0] == compiled[1], "compiling twice gives two different files"
    assert COMPILED.read_bytes() == compiled[0], (
        "pipelines/finetune.yaml is out of date: run `canvastune compile -o pipelines/finetune.yaml`"
    )


def _compiled() -> dict[str, Any]:
    """The pipeline, without what it asks of Kubernetes."""
    return next(yaml.safe_load_all(COMPILED.read_text()))


def _tasks(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    dags = [tree["root"], *tree["components"].values()]
    return {
        name: task for dag in dags for name, task in dag.get("dag", {}).get("tasks", {}).items()
    }


def test_preparation_alone_is_answered_from_the_cache() -> None:
    tree = _compiled()
    steps = {
        name: task
        for name, task in _tasks(tree).items()
        if "executorLabel" in tree["components"][task["componentRef"]["name"]]
    }
    assert {name.removesuffix("-2").replace("-", "_") for name in steps} == set(STEPS)
    cached = [name for name, task in steps.items() if task["cachingOptions"].get("enableCache")]
    assert cached == ["prepare-data"]


def test_nothing_is_installed_at_run_time() -> None:
    assert "pip install" not in COMPILED.read_text()


def test_exit_task_runs_however_the_run_ended() -> None:
    task = _tasks(_compiled())["finish"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_the_evaluation_shows_its_own_figures_in_kubeflow() -> None:
    evaluate, _ = [
        component
        for name, component in _compiled()["components"].items()
        if name.startswith("comp-evaluate")
    ]
    assert (
        evaluate["outputDefinitions"]["artifacts"]["figures"]["artifactType"]["schemaTitle"]
        == "system.Metrics"
    )


def test_every_step_mounts_the_workspace() -> None:
    tree, platforms = yaml.safe_load_all(COMPILED.read_text())
    executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == set(tree["deploymentSpec"]["executors"])
    for name, executor in executors.items():
        (mount,) = executor["pvcMount"]
        assert mount["mountPath"] == "/workspace", name
        assert mount["pvcNameParameter"]["componentInputParameter"].endswith("volume_claim"), name


def test_what_is_set_on_the_train_task_goes_to_the_training_pods() -> None:
    (train,) = [c for c in _compiled()["components"].values() if "taskConfigPassthroughs" in c]
    both = {
        given["field"]: given.get("applyToTask", False) for given in train["taskConfigPassthroughs"]
    }
    assert both == {
        "RESOURCES": False,  # the launcher's own pod asks for no GPU
        "KUBERNETES_TOLERATIONS": False,
        "KUBERNETES_NODE_SELECTOR": False,
        "KUBERNETES_AFFINITY": False,
        "ENV": True,
        "KUBERNETES_VOLUMES": True,
    }


@pytest.mark.parametrize("step", STEPS)
def test_a_step_has_its_folder_and_a_short_body(step: str) -> None:
    folder = ROOT / "components" / step
    assert (folder / "README.md").read_text().startswith(f"# {step}\n")
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert metadata["name"] == step
    assert metadata["cached"] == (step == "prepare_data")
    (function,) = [
        node
        for node in ast.parse((folder / "component.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert function.name == step
    body = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert len(body) - 2 < 10, (  # less def, docstring
        f"{step}: {len(body) - 2} statements: this is work for the engine, not for a component"
    )


def test_the_engine_knows_nothing_of_the_rooms_above_it() -> None:
    above = {"kfp", "kubernetes", "components", "pipelines"}
    for file in (ROOT / "canvastune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not above & {name.split(".")[0] for name in names}, (
                f"{file} imports upward: {names}"
            )


# --- the pipeline, here ------------------------------------------------------------------------------------------------


class Run:
    """Run `canvastune run` in a separate process and read its output."""

    def __init__(
        self,
        popen: type[subprocess.Popen[str]],
        recipe: Path,
        workspace: Path,
        scratch: Path,
        *arguments: str,
    ) -> None:
        scratch.mkdir()
        self.workspace, self.scratch, self.said, self.code = workspace, scratch, "", -1
        (recipe.parent / "datasets.py").write_text(
            "raise RuntimeError('this is not the library')\n"
        )  # in the current folder
        command = [
            sys.executable,
            "-P",
            "-m",
            "pipelines.cli",
            "run",
            str(recipe),
            "--workspace",
            str(workspace),
            *arguments,
        ]
        self.command = command[4:]
        environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
        self._process = popen(
            command,
            cwd=recipe.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, words: str) -> None:
        """Listen until it says the words."""
        for line in self._process.stdout or ():
            self.said += line
            if words in line:
                return
        pytest.fail(f"the run ended without saying {words!r}:\n{self.said}")

    def interrupt(self) -> None:
        """Send Ctrl-C to that process only: a terminal would send it to the children as well."""
        self._process.send_signal(signal.SIGINT)

    def join(self) -> None:
        """Listen to the end."""
        self.said += self._process.communicate()[0]
        self.code = self._process.returncode

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:  # a claim failed before its end
            self._process.terminate()
            self._process.communicate()


def _processes_of(workspace: Path) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(str(workspace) in part for part in p.info["cmdline"] or ())
    ]


@dataclass
class Runs:
    """What the tests below look at.

    They run side by side: most of a step is one process that loads libraries.
    """

    workspace: Path
    prepared: list[Path]  # prepared data sets when the LoRA run had one
    print_then: str  # of that data set, and
    print_now: str  # when all was done
    lora: Run
    interrupted: Run  # full fine-tuning, ended by Ctrl-C in the middle of training
    left_by_interrupted: list[psutil.Process]
    full: Run  # the same command again
    broken: Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Runs:
    folder = tmp_path_factory.mktemp(
        "python3-projects"
    )  # Kubeflow's local runner replaces `python3` in paths
    write_problems(folder / "problems.jsonl", "change", rows=40, seed=1)
    lines = (folder / "problems.jsonl").read_text().splitlines()
    lines[6] = '{"question": "How many?", "answer":'
    (folder / "broken.jsonl").write_text("\n".join(lines) + "\n")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.format(model=tiny_model, data=folder / "problems.jsonl"))
    workspace, elsewhere = folder / "workspace", folder / "elsewhere"

    full = (
        "--run-name",
        "full",
        "--set",
        "train.method=full",
        "--set",
        "tracking.uri=sqlite:///full.db",
    )
    with contextlib.ExitStack() as stack:
        # As in a terminal: whatever runs in a script's background ignores Ctrl-C, and so would its
        # children.
        stack.callback(
            signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)
        )

        def start(name: str, where: Path, *arguments: str) -> Run:
            # One run as it is on a user's machine; the others spare the imports of each process.
            popen = subprocess.Popen if name == "lora" else warm.Popen
            return stack.enter_context(
                Run(popen, recipe, where, folder / f"scratch-{name}", *arguments)
            )

        broken = start(
            "broken",
            elsewhere,
            "--run-name",
            "broken",
            "--set",
            f"data.source={folder / 'broken.jsonl'}",
        )
        lora = start("lora", workspace)
        lora.wait_for("train\n")
        prepared = list(workspace.glob("kfp/*/prepare-data/dataset"))
        print_then = hash_path(prepared[0])
        interrupted = start("interrupted", workspace, *full)
        interrupted.wait_for("step  1/30")  # the others take seconds, and the signal less than one
        interrupted.interrupt()
        interrupted.join()
        left = _processes_of(workspace / "runs" / "full")
        later = ("evaluate.judge=[]", "evaluate.rows=3", "tracking.promote=never")
        again = start("again", workspace, *full, *(f"--set={setting}" for setting in later))
        for run in (lora, again, broken):
            run.join()
    return Runs(
        workspace,
        prepared,
        print_then,
        hash_path(prepared[0]),
        lora,
        interrupted,
        left,
        again,
        broken,
    )


def _folder(run: Run) -> Path:
    return run.workspace / "runs" / run.said.split(maxsplit=2)[1].rstrip(":")


def test_a_run_leaves_a_model_a_report_and_its_figures(runs: Runs) -> None:
    assert runs.lora.code == 0, runs.lora.said
    folder = _folder(runs.lora)
    assert (folder / "model" / "config.json").is_file()
    assert json.loads((folder / "model" / "merge_proof.json").read_text())["passed"] is True
    report = folder / "report" / "report.html"
    assert report.stat().st_size > 10_000
    assert '<th scope="row">train</th>' in report.read_text(), "what made the weights is not shown"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_loss_last"] < summary["validation_loss_first"]
    assert f" {report.relative_to(runs.workspace.parent)}\n" in runs.lora.said, (
        "the end does not say where the report is"
    )
    assert (
        f"mlflow ui --backend-store-uri sqlite:///{runs.workspace / 'mlflow.db'}" in runs.lora.said
    )
    assert "Traceback" not in runs.lora.said


def test_files_of_a_run_their_keys_and_its_names_in_mlflow_stay(runs: Runs) -> None:
    folder = _folder(runs.lora)
    names = snapshot.mlflow_names(runs.workspace / "mlflow.db")
    del names["runs"]  # one of them contains the time
    found = {
        "files": snapshot.file_names(folder),
        "keys": snapshot.artifact_keys(folder),
        "mlflow": names,
    }
    assert found == golden("run", found), "see tests/golden/README.md for when this may change"


def test_model_and_adapter_say_what_they_were_trained_on_and_how_they_did(runs: Runs) -> None:
    folder = _folder(runs.lora)
    card = json.loads((folder / "data" / "card.json").read_text())
    result = EvaluationResult.read(folder / "evaluation")
    for made in (folder / "model", folder / "train" / "adapter"):
        text = (made / "README.md").read_text(encoding="utf-8")
        assert f"| trained on | {card['train']:,} |" in text
        assert f"{result.after.exact_match or 0:.1%}" in text.partition("## Evaluation")[2]
        assert "Not evaluated" not in text


def test_no_artifact_has_an_address_that_kubeflow_would_refuse(runs: Runs) -> None:
    assert addresses_outside(runs.workspace / "kfp") == []


def test_every_step_of_a_run_is_in_mlflow(runs: Runs) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs.workspace / 'mlflow.db'}")
    record = read_record(_folder(runs.lora))
    assert record is not None
    parent = client.get_run(record.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    steps = ("prepare_data", "plan", "train", "merge_lora", "evaluate", "evaluate_base", "report")
    own = _folder(runs.lora).name
    assert {run.info.run_name: run.info.status for run in children} == dict.fromkeys(
        (f"{own}: {step}" for step in steps), "FINISHED"
    )
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"config.yaml", "report.html", "answers.json"}
    table = json.loads((_folder(runs.lora) / ".tracking/evaluate/answers.json").read_text())
    assert table["columns"][:4] == ["prompt", "reference", "before", "after"], "not read first"
    assert parent.inputs is not None
    data = {entry.tags[0].value: entry.dataset.name for entry in parent.inputs.dataset_inputs}
    assert sorted(data) == ["evaluation", "training"]
    assert data["evaluation"] == f"{data['training']} held out"
    for name, side in (("evaluate", "after"), ("evaluate_base", "before")):
        (run,) = (run for run in children if run.info.run_name == f"{own}: {name}")
        traces = client.search_traces(locations=[parent.info.experiment_id], run_id=run.info.run_id)
        assert {trace.info.execution_duration for trace in traces} == {None}, "no time was measured"
        answers = (_folder(runs.lora) / "evaluation/answers.jsonl").read_text().splitlines()
        shown = sorted(trace.data.spans[0].outputs for trace in traces)
        assert shown == sorted(json.loads(line)[side] for line in answers)
    summary = json.loads((_folder(runs.lora) / "summary.json").read_text())
    exact_match = pytest.approx(summary["exact_match_after"], rel=1e-6)  # MLflow's is rounded
    assert parent.data.metrics["eval/exact_match_after"] == exact_match
    assert len(client.get_metric_history(parent.info.run_id, "train/loss")) == int(
        parent.data.params["train.steps"]
    )
    assert parent.data.tags["canvastune.verdict"] in ("better", "worse", "undecided")
    assert "exact match" in parent.data.tags["mlflow.note.content"]
    recorded = json.loads((_folder(runs.lora) / "steps.json").read_text())["steps"]
    assert {name: step["status"] for name, step in recorded.items()} == dict.fromkeys(
        STEPS, "FINISHED"
    )
    (evaluated,) = [
        run.data.metrics for run in children if run.info.run_name.endswith(": evaluate")
    ]
    assert evaluated["eval/exact_match_after"] == exact_match
    for side, moment in (("before", "first"), ("after", "last")):
        expected = pytest.approx(summary[f"validation_loss_{moment}"], rel=1e-3)
        assert evaluated[f"eval/validation_loss_{side}"] == expected, (
            f"the loss {side} is not the one that training saw {moment}"
        )


def test_ctrl_c_ends_every_process_and_leaves_a_checkpoint(runs: Runs) -> None:
    assert runs.interrupted.code == 130, runs.interrupted.said
    assert not runs.left_by_interrupted, f"still running: {runs.left_by_interrupted}"
    assert "Traceback" not in runs.interrupted.said, runs.interrupted.said
    assert re.search(r"\bwaiting for train\b.* \d+ s$", runs.interrupted.said, re.MULTILINE)
    last = runs.interrupted.said.splitlines()[-1]
    words = shlex.split(last)
    assert words[0].endswith("canvastune")
    assert sorted(words[1:]) == sorted(runs.interrupted.command), "an option is lost"
    assert "resumed" in runs.full.said, f"trained from the beginning:\n{runs.full.said}"


def test_the_same_command_again_goes_on_and_finishes(runs: Runs) -> None:
    assert runs.full.code == 0, runs.full.said
    folder = runs.workspace / "runs" / "full"
    records = read_metrics(folder / "train" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 31)), (
        "a step is missing or was made twice"
    )
    assert (folder / "train" / "model" / "config.json").is_file()
    assert not (folder / "model").exists(), "full fine-tuning has nothing to merge"
    record = read_record(folder)
    assert record is not None
    assert record.finished, "the exit task did not run: was it answered from the cache?"


def test_an_interrupted_and_resumed_run_is_one_run_in_mlflow(runs: Runs) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs.workspace / 'full.db'}")
    experiment = client.get_experiment_by_name("canvastune")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}, "a run would count as running"
    (parent,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
    tags = parent.data.tags
    assert (tags["canvastune.state"], tags["canvastune.attempts"]) == ("finished", "2")
    assert re.search(r"\binterrupted\b.* train\b.* 0:", tags["canvastune.attempt_1"])
    assert re.search(r"\bfinished\b.* 0:", tags["canvastune.attempt_2"])
    assert "evaluate.rows: 2 -> 3" in tags["canvastune.changed_settings"]
    assert len(client.get_metric_history(parent.info.run_id, "train/loss")) == 30


def test_an_unfinished_run_goes_on_with_other_settings_of_later_steps(runs: Runs) -> None:
    """Here without a judge: the score is left out, and all else is reported."""
    folder = runs.workspace / "runs" / "full"
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert (found["rows"], found["scored"], found["judges"]) == (3, 0, [])
    assert found["exact_match_after"] is found["verdict"] is None
    assert found["validation_loss_after"] < found["validation_loss_before"]
    assert len((folder / "evaluation" / "answers.jsonl").read_text().splitlines()) == 3
    assert not any("exact" in name for name in json.loads((folder / "summary.json").read_text()))
    assert re.search(r"exact match\b.*: evaluate\.judge is \[\]", runs.full.said)
    page = (folder / "report" / "report.html").read_text()
    assert "evaluate.judge is []" in page
    for side in ("before", "after"):
        assert f"{found[f'validation_loss_{side}']:.3f}" in page.partition("<h2>Losses")[0]


def test_prepared_data_is_reused_and_never_overwritten(runs: Runs) -> None:
    assert re.search(r"\nprepare_data\n +reused: ", runs.interrupted.said)
    assert len(runs.prepared) == 1
    found = sorted(runs.workspace.glob("kfp/*/prepare-data/dataset"))
    assert found[0] == runs.prepared[0]
    (tried,) = found[1:]  # of the run with another answer pattern, which is tried on the references
    for split in ("train", "validation"):
        assert hash_path(tried / split) == hash_path(found[0] / split), "the rows are others"
    assert runs.print_now == runs.print_then, "an earlier run's data changed"
    assert _folder(runs.lora) != runs.workspace / "runs" / "full"


def test_a_broken_row_fails_the_pipeline_with_its_place(runs: Runs) -> None:
    said, reason = runs.broken.said, runs.broken.said.splitlines()[-1]
    assert runs.broken.code == 1
    assert re.search(r"canvastune: error: step prepare_data\b", said)
    assert "broken.jsonl" in said, "the file is not named"
    assert re.search(r"broken\.jsonl\b.{0,20}\b7\b", said), f"the row is not named: {reason}"
    assert "Traceback" not in said
    assert not (runs.broken.workspace / "runs/broken/train").exists(), (
        "training started on data that could not be read"
    )
    (task,) = runs.broken.workspace.glob("kfp/*/prepare-data")
    assert not list(task.iterdir()), "half a data set was left behind"


def test_runs_leave_no_process_and_no_temporary_file(runs: Runs) -> None:
    assert not _processes_of(runs.workspace)
    for run in (runs.lora, runs.interrupted, runs.full, runs.broken):
        assert not list(run.scratch.iterdir()), run.said

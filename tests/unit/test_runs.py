"""Many runs of a workspace: listed, resumed and removed without a surprise."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import load_config
from canvastune.errors import UserError
from canvastune.io.byte_size import format_bytes
from canvastune.tracking import steps
from canvastune.tracking.client import TrackingError
from canvastune.tracking.steps import FAILED, FINISHED, KILLED, Attempt
from components import run_list, run_removal
from components.run_directory import RunRecord, read_record, write_record
from components.run_list import list_runs, unfinished_runs
from components.run_owner import own_run
from pipelines import local_runner
from pipelines.cli import main

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipelines" / "recipes"
RECIPE = str(RECIPES / "gsm8k_lora.yaml")
HERE = socket.gethostname()
MakeRun = Callable[..., Path]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path / "workspace"


@pytest.fixture
def make_run(workspace: Path) -> MakeRun:
    """Write the folder of a run as its steps would, without MLflow."""

    def make(
        name: str, status: str | None = FINISHED, step: str = "", host: str = HERE, **options: Any
    ) -> Path:
        folder = workspace / "runs" / name
        config = load_config(RECIPE, options.get("settings", []))
        record = RunRecord(
            "1", config.model_dump_json(), "f", options.get("parent", ""), status == FINISHED
        )
        write_record(folder, record)
        command = f"canvastune run {RECIPE} --run-name {name}"
        attempt = Attempt("1", time.time(), host, 77, command, str(Path.cwd()))
        steps.begin_attempt(folder, "1", attempt)
        if status is not None:
            steps.end_attempt(folder, "1", status, step, options.get("reason", ""))
        (folder / "train").mkdir()
        lines = [json.dumps({"kind": "train", "step": at, "loss": 1 / at}) for at in (1, 2)]
        lines.append('{"kind": "val')  # the process was killed while it wrote
        (folder / "train" / "metrics.jsonl").write_text("\n".join(lines))
        if status == FINISHED:
            (folder / "train" / "checkpoints").mkdir()
            (folder / "train" / "checkpoints" / "shard").write_bytes(b"x" * 50_000)
            (folder / "summary.json").write_text(
                '{"exact_match_before": 0.016, "exact_match_after": 0.797, "train_loss_last": 0.5}'
            )
        return folder

    return make


def test_every_run_is_listed_with_state_figures_size_and_what_to_do(
    workspace: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("good")
    make_run("stopped", KILLED, "train", reason="interrupted (Ctrl-C, or SIGTERM)")
    make_run("broken", FAILED, "evaluate", reason="evaluate.judge: no answer\nStart the judge.")
    make_run("killed", None)
    make_run("far", None, host="another-host")
    make_run("cluster", None, host="")
    (workspace / "runs" / "damaged").mkdir()
    (workspace / "runs" / "damaged" / "run.json").write_text("{")
    (workspace / "runs" / ".base-results").mkdir()
    (workspace / "runs" / "empty").mkdir()
    running = make_run("running", None)
    with own_run(running):
        assert main(["runs", "--workspace", str(workspace)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in reversed(out.splitlines()) if line}
    assert re.search(
        r"good +finished +exact match 1\.6% -> 79\.7% +[\d.]+ kB +\d+ s ago", rows["good"]
    )
    assert re.search(r"stopped +interrupted\b.* train\b.* 2 of 800 ", rows["stopped"])
    assert re.search(r"broken +failed\b.* evaluate\b", rows["broken"])
    assert re.search(
        rf"running +running: starting: process {os.getpid()} on {HERE}", rows["running"]
    )
    assert re.search(r"killed +interrupted +step 2", out)
    assert re.search(r"far +running\b.* process 77 on another-host\b", rows["far"])
    assert "running: starting: Kubeflow job 1" in rows["cluster"]
    assert "run.json" in rows["damaged"]
    assert "base-results" not in "".join(rows)
    assert re.search(r"\bbroken\b.* evaluate\.judge: no answer\n  \w+: Start the judge\n", out)
    for name in ("stopped", "broken", "killed"):
        assert f" {name}:\n  canvastune run {RECIPE} --run-name {name}" in out
    assert out.count("\n  canvastune run ") == 3
    assert f"canvastune sync {workspace / 'runs' / 'killed'}" in out
    assert out.count("canvastune sync") == 1
    assert "interrupted before its first step" in rows["empty"]
    assert re.search(r"\b9 runs\b.* [\d.]+ kB\b.* [\d.,]+ [GT]B\b", out)


def test_the_list_is_json_for_scripts(
    workspace: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("good")
    os.utime(folder / "run.json", (1.9e9, 1.9e9))  # the clock has gone back since
    assert main(["runs", "--workspace", str(workspace), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    (run,) = tree["runs"]
    assert (run["name"], run["state"], run["step"], run["steps"]) == ("good", "finished", 2, 800)
    assert run["figures"]["exact_match"] == {"before": 0.016, "after": 0.797}
    assert run["bytes"] > 50_000
    assert run["folder"] == str(folder)
    assert tree["free_bytes"] > 0
    assert main(["runs", "--workspace", str(workspace)]) == 0
    assert " 0 s ago" in capsys.readouterr().out


def test_a_workspace_without_runs_and_none_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--workspace", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert main(["runs", "--workspace", str(tmp_path / "none")]) == 1
    assert f"--workspace {tmp_path / 'none'}: " in capsys.readouterr().err


def test_listing_runs_imports_no_heavy_library(workspace: Path, make_run: MakeRun) -> None:
    make_run("good")
    check = (
        "import sys\n"
        "from pipelines.cli import main\n"
        f"assert main(['runs', '--workspace', {str(workspace)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'kfp', 'datasets', 'pandas', 'matplotlib'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


# --- resuming


def _fake_pipeline(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    """A pipeline whose run begins and then ends with an error; returns the names of its runs."""
    names: list[str] = []

    def begin(_: object, arguments: dict[str, str], workspace: Path, *__: object) -> None:
        names.append(arguments["run_name"])
        folder = workspace / "runs" / names[-1]
        config = load_config(RECIPE).model_dump_json()
        write_record(folder, RunRecord(str(len(names)), config, "f", first_job="1"))
        attempt = Attempt(str(len(names)), time.time(), HERE, os.getpid())
        steps.begin_attempt(folder, "1", attempt)
        raise error

    monkeypatch.setattr(local_runner, "run_locally", begin)
    monkeypatch.setattr(
        "components.finish.step.tracking.finish",
        lambda run, *end: steps.end_attempt(run.folder, run.job, *end),
    )
    return names


def test_ctrl_c_ends_with_the_command_that_resumes_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = _fake_pipeline(monkeypatch, KeyboardInterrupt())
    command = ["run", RECIPE, "--set", "tracking.experiment=a b", "--workspace", str(workspace)]
    assert main([*command, "--log-format", "text"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    words = shlex.split(last)
    assert words[0].endswith("canvastune")
    assert words[1:] == [*command, "--run-name", names[0]]
    (run,) = list_runs(workspace)
    assert run.state == "interrupted"
    assert "SIGTERM" in run.reason
    assert main(words[1:]) == 130
    assert names == [names[0]] * 2, "the printed command resumes another run"


def test_a_run_without_a_name_names_the_unfinished_one_and_resume_takes_it_up(
    workspace: Path,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = _fake_pipeline(monkeypatch, KeyboardInterrupt())
    command = ["run", RECIPE, "--workspace", str(workspace)]
    assert main([*command, "--resume"]) == 1
    assert re.search(rf"--resume: .*{workspace / 'runs'}", capsys.readouterr().err)
    make_run("good")
    make_run("other", FAILED, "train", settings=["lora.rank=3"])
    assert main(command) == 130
    assert "--run-name" not in capsys.readouterr().out, "a run of another recipe is offered"
    first = names[0]
    assert main(command) == 130
    out = capsys.readouterr().out
    assert f"{first}, interrupted" in out
    assert re.search(rf"\n  \S*canvastune run {RECIPE} --workspace \S+ --run-name {first}\n", out)
    assert names[1] != first, "a new run was asked for"
    assert main([*command, "--resume"]) == 130
    assert names[2] == names[1], "not the newest one"
    assert main([*command, "--resume", "--run-name", first]) == 130
    assert names[3] == first
    assert main([*command, "--resume", "--run-name", "nothing"]) == 1
    assert re.search(rf"--resume: .*{workspace / 'runs' / 'nothing'}\b", capsys.readouterr().err)
    assert not (workspace / "runs" / "nothing").exists()
    with own_run(workspace / "runs" / names[1]):
        found = unfinished_runs(workspace, load_config(RECIPE, ["evaluate.rows=3"]))
        assert [run.name for run in found] == [first], "a running one is no offer"


def test_a_failed_step_is_recorded_but_never_in_a_run_of_somebody_else(
    workspace: Path,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failure = local_runner.StepFailed("prepare_data", UserError("row 7", hint="Fix it."))
    names = _fake_pipeline(monkeypatch, failure)
    command = ["run", RECIPE, "--workspace", str(workspace)]
    assert main(command) == 1
    run = run_list.read_run(workspace / "runs" / names[0])
    assert (run.state, run.where, run.reason) == ("failed", "prepare_data", "row 7\nFix it.")
    *_, fix, resume = capsys.readouterr().err.splitlines()
    assert "Fix it." in fix
    assert resume.endswith(f"--run-name {names[0]}")

    folder = make_run("good")
    assert main([*command, "--run-name", "good"]) == 1, "a finished run is not overwritten"
    assert len(names) == 1, "its steps were started"
    stopped = make_run("stopped", KILLED, "train")

    def refuse(*_: object) -> None:
        raise local_runner.StepFailed("resolve", UserError("another recipe"))

    monkeypatch.setattr(local_runner, "run_locally", refuse)
    assert main([*command, "--run-name", "stopped"]) == 1
    for each, finished in ((folder, True), (stopped, False)):
        record = read_record(each)
        assert record is not None
        assert record.finished is finished
    assert run_list.read_run(stopped).where == "train"


@pytest.mark.parametrize(
    ("key", "place"),
    [
        *itertools.product(("data.source", "model.id"), ("./nothere.jsonl", "work/tiny-bse")),
        ("model.id", "work/other"),  # may be on the Hub: it is asked
    ],
)
def test_a_path_that_is_not_there_is_refused_before_a_run_begins(
    place: str,
    key: str,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work" / "tiny-base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    command = ["run", RECIPE, "--workspace", str(workspace), "--set", f"{key}={place}"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert f"{key}: {place}: " in error
    assert ("work/tiny-base" in error) == (place == "work/tiny-bse"), "the near name"
    assert not workspace.exists(), "something was left behind"


def test_a_pipe_is_refused_before_a_run_begins(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    command = ["run", RECIPE, "--workspace", str(workspace)]
    assert main([*command, "--set", f"data.source={tmp_path / 'rows.jsonl'}"]) == 1
    assert "rows.jsonl: found a pipe" in capsys.readouterr().err
    assert not workspace.exists()


@pytest.mark.parametrize("recipe", ["tiny_lora", "tiny_support"])
def test_what_the_demo_makes_is_not_looked_for_on_the_hub(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(RECIPES / f"{recipe}.yaml")]) == 1
    error = capsys.readouterr().err
    assert "model.id: workspace/" in error
    assert "canvastune demo" in error
    assert not list(tmp_path.iterdir())


# --- removing


@pytest.fixture
def mlflow_aliases(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, list[str]] | Exception]:
    """What MLflow says of the models of a run, by the id of its run."""
    found: dict[str, Any] = {}

    class Server:
        def request(self, action: Callable[[object], Any]) -> Any:
            return action(None)

        def __str__(self) -> str:
            return "http://mlflow"

    def aliases_of(_: object, parent: str) -> dict[str, list[str]]:
        if isinstance(found[parent], Exception):
            raise found[parent]
        return dict(found[parent])

    monkeypatch.setattr(run_removal, "connect", lambda _: Server())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setattr(run_removal, "aliases_of", aliases_of)
    return found


def _artifacts(workspace: Path, job: str, folder: Path) -> Path:
    """What an attempt at a run leaves in kfp/."""
    for task in ("resolve", "prepare-data", "train"):
        (workspace / "kfp" / job / task).mkdir(parents=True)
        (workspace / "kfp" / job / task / "data").write_bytes(b"x" * 10_000)
    output = {"parameterValues": {"run_folder": str(folder)}}
    (workspace / "kfp" / job / "resolve" / "executor_output.json").write_text(json.dumps(output))
    return workspace / "kfp" / job


def test_removing_says_what_goes_and_asks(
    workspace: Path,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, other = make_run("good"), make_run("other")
    mine, others = _artifacts(workspace, "job-1", folder), _artifacts(workspace, "job-2", other)
    command = ["runs", "--workspace", str(workspace), "rm", "good"]
    assert main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"good: finished, exact match 1.6% -> 79.7%, {_size(folder, mine)}" in out
    assert f"    {folder}\n" in out
    assert f"    {mine / 'train'}\n" in out
    assert "--dry-run" in out
    assert folder.is_dir()
    assert main(command) == 1, "not asked: no terminal"
    for answer in ("\n", "no\n"):
        monkeypatch.setattr("sys.stdin", _terminal(answer))
        assert main(command) == 0
        assert "[y/N]" in capsys.readouterr().out
        assert folder.is_dir()
    monkeypatch.setattr("sys.stdin", _terminal("y\n"))
    assert main(command) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["other"]
    assert not mine.exists()
    assert len(list(others.iterdir())) == 3


def _terminal(answer: str) -> io.StringIO:
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    return terminal


def _size(*folders: Path) -> str:
    return format_bytes(sum(run_list.disk_bytes(folder) for folder in folders))


def test_only_the_checkpoints_of_a_finished_run_can_go(
    workspace: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("good")
    make_run("stopped", KILLED, "train")
    command = ["runs", "rm", "--workspace", str(workspace), "--checkpoints", "--yes"]
    size = _size(folder / "train" / "checkpoints")
    assert main([*command, "good"]) == 0
    assert re.search(rf"\b1 run\b.* {re.escape(size)} ", capsys.readouterr().out)
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["metrics.jsonl"]
    assert list_runs(workspace)[0].state == "finished"
    assert main([*command, "stopped"]) == 1
    assert "error: stopped: " in capsys.readouterr().err


def test_a_running_run_is_never_removed(
    workspace: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("running", None)
    command = ["runs", "--workspace", str(workspace), "rm", "--yes"]
    with own_run(folder):
        assert main([*command, "running"]) == 1
        assert "error: running: " in capsys.readouterr().err
    make_run("cluster", None, host="")
    assert main([*command, "cluster"]) == 1, "only Kubeflow knows whether it has ended"
    (planned,) = run_removal.plan_removal(workspace, ["running"])
    with own_run(folder), pytest.raises(UserError, match="running"):
        run_removal.remove(planned)
    assert folder.is_dir()
    assert main([*command, "running2"]) == 1
    assert "'running'" in capsys.readouterr().err, "the nearest name is not offered"


def test_a_model_with_an_alias_is_never_removed(
    workspace: Path,
    make_run: MakeRun,
    capsys: pytest.CaptureFixture[str],
    mlflow_aliases: dict[str, Any],
) -> None:
    folder = make_run("good", parent="id")
    command = ["runs", "--workspace", str(workspace), "rm", "good", "--yes"]
    for alias in ("champion", "production"):
        mlflow_aliases["id"] = {"tiny-words/1": ["candidate", alias]}
        assert main(command) == 1
        error = capsys.readouterr().err
        assert re.search(rf"\btiny-words/1\b.* {alias!r}", error)
    mlflow_aliases["id"] = {"tiny-words/1": ["candidate"]}
    assert main(command) == 0
    assert "MLflow keeps tiny-words/1" in capsys.readouterr().out
    assert not folder.exists()


def test_a_run_whose_champion_cannot_be_looked_up_stays(
    workspace: Path,
    make_run: MakeRun,
    capsys: pytest.CaptureFixture[str],
    mlflow_aliases: dict[str, Any],
) -> None:
    make_run("registered", parent="id", settings=["tracking.registered_model=tiny-words"])
    make_run("plain", parent="id")
    mlflow_aliases["id"] = TrackingError("cannot be reached (Connection refused)")
    command = ["runs", "--workspace", str(workspace), "rm", "--yes"]
    assert main([*command, "registered"]) == 1
    assert re.search(r"error: registered: .*\btiny-words\b", capsys.readouterr().err)
    assert main([*command, "plain"]) == 0
    assert re.search(r"\bMLflow\b.* registered\b", capsys.readouterr().out)


def test_a_run_that_another_one_was_trained_from_stays(
    workspace: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("first")
    make_run("second", settings=[f"model.id={os.path.relpath(folder / 'model')}"])
    command = ["runs", "--workspace", str(workspace), "rm", "--yes"]
    assert main([*command, "first"]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"first: .* second\b.* {folder / 'model'}\b.*model\.id", error)
    assert main([*command, "second", "first"]) == 0
    assert not list((workspace / "runs").iterdir())


def test_prepared_data_that_an_unfinished_run_resumes_with_stays(
    workspace: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("good")
    made = _artifacts(workspace, "job-1", folder)
    make_run("stopped", KILLED, "train")
    assert main(["runs", "--workspace", str(workspace), "rm", "--yes", "good"]) == 0
    assert re.search(r"\bprepared data\b.* stopped\b", capsys.readouterr().out)
    assert [path.name for path in made.iterdir()] == ["prepare-data"]


def test_what_an_interrupted_removal_left_is_no_run_and_goes_with_the_next(
    workspace: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("good")
    make_run("other")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_removal.shutil, "rmtree", stop)
        assert main(["runs", "--workspace", str(workspace), "rm", "--yes", "good"]) == 130
    assert [run.name for run in list_runs(workspace)] == ["other"]
    assert main(["runs", "--workspace", str(workspace), "rm", "--yes", "other"]) == 0
    assert not list((workspace / "runs").iterdir())

"""The state of a local run's steps is read from sentences of Kubeflow's log: these tests hold them
to its version.
"""

import json
import re
import shutil
from pathlib import Path

import kfp
import pytest
from kfp import dsl

from canvastune.errors import UserError
from canvastune.logging import LOG_FORMAT
from pipelines.local_runner import run_locally


@dsl.component(base_image="python:3", install_kfp_package=False)
def say_hello(name: str) -> str:
    print(f"hello {name}")
    return name


@dsl.component(base_image="python:3", install_kfp_package=False)
def break_down() -> None:
    print("canvastune: error: data.source: file not found: x.jsonl\n  hint: Check the path.")
    raise SystemExit(1)


@dsl.pipeline(name="hello")
def hello(name: str) -> None:
    with dsl.ExitHandler(say_hello(name="exit").set_caching_options(False)):
        say_hello(name=name)


@dsl.pipeline(name="broken")
def broken() -> None:
    with dsl.ExitHandler(say_hello(name="exit").set_caching_options(False)):
        break_down()


def _events(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    lines = capsys.readouterr().out.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]  # others: KFP's own
    return [(event["event"], event["task"]) for event in events if event["event"] != "log"]


def test_each_state_of_a_step_is_an_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kfp.__version__.startswith("2.17."), "check pipelines/local_output.py with this version"
    monkeypatch.setenv(LOG_FORMAT, "json")
    run_locally(hello, {"name": "ann"}, tmp_path)
    step = [("task_started", "say_hello"), ("task_finished", "say_hello")]
    assert _events(capsys) == [*step, *step]
    run_locally(hello, {"name": "ann"}, tmp_path)
    assert _events(capsys) == [("task_reused", "say_hello"), *step]
    with pytest.raises(UserError) as error:
        run_locally(broken, {}, tmp_path)
    assert re.fullmatch(
        r".*\bbreak_down\b.*: data\.source: file not found: x\.jsonl", str(error.value)
    )
    assert error.value.hint == "Check the path."
    failed = [("task_started", "break_down"), ("task_failed", "break_down")]
    assert _events(capsys) == [*failed, *step]


@dsl.component(base_image="python:3", install_kfp_package=False)
def prepare_data(dataset: dsl.Output[dsl.Dataset]) -> None:
    import json
    from pathlib import Path

    folder = Path(dataset.path)
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        state = {"_data_files": [{"filename": "data.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
        (folder / split / "dataset_info.json").write_text("{}")
        (folder / split / "data.arrow").write_text("rows")
    (folder / "card.json").write_text("{}")


@dsl.pipeline(name="prepared")
def prepared() -> None:
    with dsl.ExitHandler(say_hello(name="exit").set_caching_options(False)):
        prepare_data()


@pytest.mark.parametrize("lost", ["train/data.arrow", "card.json"])
def test_prepared_data_that_lost_a_file_is_prepared_again(
    lost: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    run_locally(prepared, {}, tmp_path)
    run_locally(prepared, {}, tmp_path)
    assert ("task_reused", "prepare_data") in _events(capsys)
    (data,) = (tmp_path / "kfp").glob("*/prepare-data/dataset")
    (data / lost).unlink()
    run_locally(prepared, {}, tmp_path)
    events = _events(capsys)
    assert ("task_finished", "prepare_data") in events
    assert ("task_reused", "prepare_data") not in events
    assert f"{data}: {lost} " in caplog.text
    (data,) = (tmp_path / "kfp").glob("*/prepare-data/dataset")
    assert (data / lost).is_file()


def test_a_copied_workspace_uses_its_own_prepared_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    run_locally(prepared, {}, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (entry,) = (tmp_path / "b" / "kfp" / ".kfp_cache").glob("*.json")
    assert str(tmp_path / "a") in entry.read_text()
    run_locally(prepared, {}, tmp_path / "b")
    assert ("task_reused", "prepare_data") in _events(capsys)
    assert str(tmp_path / "a") not in entry.read_text(), "it uses the original's data"
    for copied in (tmp_path / "b" / "kfp").glob("*/prepare-data"):
        shutil.rmtree(copied)
    run_locally(prepared, {}, tmp_path / "b")
    assert ("task_finished", "prepare_data") in _events(capsys)

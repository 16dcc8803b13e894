"""The state of a local run's steps is read from sentences of Kubeflow's log: these tests hold them
to its version.
"""

import json
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
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
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
    assert str(error.value) == "step break_down failed: data.source: file not found: x.jsonl"
    assert error.value.hint == "Check the path."
    failed = [("task_started", "break_down"), ("task_failed", "break_down")]
    assert _events(capsys) == [*failed, *step]

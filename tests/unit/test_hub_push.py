"""The tuned model goes to the Hub with its card, privately, and only with a token that may write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from canvastune.checkpoint.hub_push import check_push, push_to_hub
from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.tracking import StepRun
from components.report.step import push_model
from pipelines.doctor.later_steps import check_push as doctor_check
from tests.fakes.hub import TOKEN, FakeHub

NAME = "ada/tiny-words"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for name in ("model", "train/adapter"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\nlicense: gemma\n---\n# {folder.name}\n")
        (folder / "model.safetensors").write_bytes(b"weights of " + folder.name.encode())
        (folder / ".README.md-17").write_text("half")
    return tmp_path


def config(**tracking: Any) -> RunConfig:
    return parse_config({"name": "small", "data": {"source": "org/rows"}, "tracking": tracking})


class Record(StepRun):
    """Keeps the tags of the pipeline run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, str] = {}

    def tags(self, values: Any, *, of: str = "") -> None:
        assert of == "run/"
        self.seen |= values


def push(run_folder: Path, **tracking: Any) -> dict[str, str]:
    """Push as the step `report` does; return the tags of the run."""
    record = Record()
    push_model(config(**tracking), record, run_folder, run_folder / "model")
    return record.seen


def test_the_model_and_its_card_are_pushed_to_a_private_repository(
    hub: FakeHub, run_folder: Path
) -> None:
    tags = push(run_folder, hub_model_id=NAME)
    assert hub.private == {NAME: True}
    assert hub.files[NAME] == {
        "README.md": b"---\nlicense: gemma\n---\n# model\n",
        "model.safetensors": b"weights of model",
    }
    assert tags["canvastune.hub_model"].startswith(f"{hub.url}/{NAME}/commit/")


def test_the_adapter_alone_and_a_public_repository_are_settings(
    hub: FakeHub, run_folder: Path
) -> None:
    push(run_folder, hub_model_id=NAME, hub_content="adapter", hub_private_repo=False)
    assert hub.private == {NAME: False}
    assert hub.files[NAME]["model.safetensors"] == b"weights of adapter"


def test_a_repeated_push_replaces_the_files_and_leaves_who_sees_them(
    hub: FakeHub, run_folder: Path
) -> None:
    push(run_folder, hub_model_id=NAME)
    (run_folder / "model" / "README.md").write_text("# better\n")
    push(run_folder, hub_model_id=NAME, hub_private_repo=False)
    assert hub.files[NAME]["README.md"] == b"# better\n"
    assert hub.private == {NAME: True}


def test_without_the_key_nothing_is_pushed(hub: FakeHub, run_folder: Path) -> None:
    assert push(run_folder) == {}
    assert hub.commits == []


def test_a_hub_that_is_down_ends_the_step_with_a_way_on(hub: FakeHub, run_folder: Path) -> None:
    hub.down = True
    with pytest.raises(UserError, match=rf"model.* {NAME}\b") as caught:
        push_to_hub(run_folder / "model", NAME, private=True)
    assert caught.value.hint


def test_a_token_that_may_not_write_is_refused_before_training(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_push(NAME)
    check_push("engines/tiny-words")
    with pytest.raises(UserError, match=r"owner 'eve'.*'ada'.*ada, engines"):
        check_push("eve/tiny-words")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(UserError, match=r"\bHub\b.* HF_TOKEN\b"):
        check_push(NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"HF_TOKEN\b.* set\b"):
        check_push(NAME)
    assert not caplog.records
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.down = True
    check_push(NAME)
    (warning,) = caplog.records
    assert "tracking.hub_model_id" in warning.getMessage(), "a Hub that is down stops no run"


def test_doctor_says_whether_the_push_will_be_refused(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = doctor_check(config(hub_model_id=NAME), submitted=False)
    assert found.state == "ok"
    assert NAME in found.found
    assert list(doctor_check(config(), submitted=False)) == []
    (found,) = doctor_check(config(hub_model_id=NAME), submitted=True)
    assert found.state == "skipped"
    hub.down = True
    (found,) = doctor_check(config(hub_model_id=NAME), submitted=False)
    assert found.state == "warning", "a Hub that does not respond is called ok"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"HF_TOKEN\b.* set\b"):
        list(doctor_check(config(hub_model_id=NAME), submitted=False))


@pytest.mark.parametrize("name", ["tiny-words", "https://huggingface.co/ada/tiny", "ada/", "a/b/c"])
def test_what_is_no_repository_is_refused_with_the_recipe(name: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.hub_model_id"):
        config(hub_model_id=name)


def test_an_adapter_that_full_fine_tuning_does_not_make_is_refused() -> None:
    tree = {"name": "small", "data": {"source": "org/rows"}, "train": {"method": "full"}}
    with pytest.raises(UserError, match=r"tracking\.hub_content: .*adapter.*train\.method=full"):
        parse_config({**tree, "tracking": {"hub_content": "adapter"}})

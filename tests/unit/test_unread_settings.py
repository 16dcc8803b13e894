"""A setting that another one turns off is reported when a run starts, and is no error."""

from __future__ import annotations

import logging
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvastune.config import RunConfig, parse_config
from canvastune.config.unread import informative_settings, unread_settings
from components.resolve import step as resolution
from pipelines.doctor.doctor import run_checks
from pipelines.doctor.finding import DoctorOptions

JUDGE = {"address": "http://judge.example/v1", "model": "m", "timeout": 5}


def recipe(**sections: Any) -> RunConfig:
    return parse_config({"name": "chat", "data": {"source": "rows.jsonl"}} | sections)


def mixture(*judged: str, **evaluation: Any) -> dict[str, Any]:
    return {
        "data": {"mixture": [{"source": "a.jsonl"}, {"source": "b.jsonl"}]},
        "evaluate": {"judges": dict.fromkeys(judged, "text"), **evaluation},
    }


UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "a judging model without its judge": (
        {"evaluate": {"judge_model": JUDGE}},
        "evaluate.judge_model.address, evaluate.judge_model.model, evaluate.judge_model.timeout are "
        "set, but not read: no judge is `model`",
    ),
    "a pattern that no judge compares": (
        {"evaluate": {"judge": "number", "answer_pattern": "(.+)"}},
        "evaluate.answer_pattern is set, but not read: no judge is `pattern`",
    ),
    "a judge of no source": (
        mixture("a.jsonl", "b.jsonl", judge="chrf"),
        "evaluate.judge is set, but not read: evaluate.judges",
    ),
    "other data that have no source": (
        {"evaluate": {"forgetting": {"rows": 8, "columns": {"prompt": "q"}}}},
        "evaluate.forgetting.columns.prompt, evaluate.forgetting.rows are set, but not read",
    ),
    "an adapter where all weights are trained": (
        {"train": {"method": "full"}, "lora": {"rank": 8}},
        "lora.rank is set, but not read: train.method is full",
    ),
    "a decay that does not come": (
        {"optimizer": {"schedule": "constant", "min_lr": 1e-6}},
        "optimizer.min_lr is set, but not read",
    ),
    "a fraction next to held-out rows": (
        {"data": {"source": "a.jsonl", "validation": "./b.jsonl", "validation_fraction": 0.5}},
        "data.validation_fraction is set, but not read: data.validation is set",
    ),
    "a promotion of no model": (
        {"tracking": {"promote": "never"}},
        "tracking.promote is set, but not read: tracking.registered_model",
    ),
    "a push to nowhere": (
        {"tracking": {"hub_private_repo": False}},
        "tracking.hub_private_repo is set, but not read: tracking.hub_model_id",
    ),
}
READ: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "a judging model": {"evaluate": {"judge": ["tool_call", "model"], "judge_model": JUDGE}},
    "a judging model of one source": mixture("a.jsonl", judge="chrf")
    | {"evaluate": {"judges": {"a.jsonl": "model"}, "judge_model": JUDGE}},
    "a pattern by default": {"evaluate": {"answer_pattern": "(.+)"}},
    "a judge of the rest": mixture("a.jsonl", judge="chrf"),
    "a judge of the other data": mixture(
        "a.jsonl", "b.jsonl", judge="chrf", forgetting={"source": "c.jsonl"}
    ),
    "other data": {"evaluate": {"forgetting": {"source": "c.jsonl", "rows": 8}}},
}


@pytest.mark.parametrize(("sections", "said"), UNREAD.values(), ids=UNREAD)
def test_a_setting_that_nothing_reads_is_a_line_with_its_reason(
    sections: dict[str, Any], said: str
) -> None:
    (line,) = unread_settings(recipe(**sections))
    assert line.startswith(said)


@pytest.mark.parametrize("sections", READ.values(), ids=READ)
def test_a_setting_that_is_read_is_no_line(sections: dict[str, Any]) -> None:
    assert unread_settings(recipe(**sections)) == []


def test_a_variable_of_the_training_pods_is_informative() -> None:
    found = informative_settings(recipe(cluster={"env": {"HF_HUB_OFFLINE": "1"}}))
    assert found["cluster.env.HF_HUB_OFFLINE"] == "1", "no default has such a key"


def test_doctor_and_the_start_of_a_run_say_it(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = recipe(model={"id": str(tiny_model)}, evaluate={"forgetting": {"rows": 8}})
    line = "evaluate.forgetting.rows is set, but not read: evaluate.forgetting.source is not set"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    found = takewhile(lambda each: each.name != "model", run_checks(DoctorOptions(str(file))))
    recipes = [(each.state, each.found) for each in found if each.name == "recipe"]
    assert recipes[1:] == [("warning", line)]
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    with caplog.at_level(logging.WARNING):
        resolution.resolve(file.read_text(), "", "", str(tmp_path), "mine", "job", "job")
    assert caplog.messages == [line]

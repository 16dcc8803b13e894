"""What makes an earlier attempt the same run.

Settings, data, and the version of the data preparation.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from canvastune.config import changed_settings, parse_config
from canvastune.config.loading import known_keys
from canvastune.config.strict import affects_weights
from canvastune.preparation import PREPARATION_VERSION
from canvastune.preparation.prepare import prepare_data
from components.resolve import step as resolve
from tests.support.data_fixtures import make_model, problems, run_config, write_lines

RECIPE = {"name": "small", "data": {"source": "rows.jsonl"}}
PREPARED = {1: "5e89a100", 2: "5e89a100"}  # PREPARATION_VERSION -> beginning of the content hash


def test_a_setting_that_decides_a_weight_makes_another_run() -> None:
    old = parse_config(RECIPE).model_dump(mode="json")
    new = parse_config(
        RECIPE
        | {
            "seed": 7,
            "optimizer": {"lr": 0.01},
            "train": {"steps": 9, "log_every": 3},
            "evaluate": {"rows": 2},
        }
    )
    assert changed_settings(old, new) == [
        ("seed", 42, 7),
        ("train.steps", 800, 9),
        ("optimizer.lr", 1.5e-4, 0.01),
    ]
    assert changed_settings(old, new, affecting_weights=False) == [
        ("train.log_every", 10, 3),
        ("evaluate.rows", 64, 2),
    ]
    assert changed_settings(new.model_dump(mode="json"), new) == []


def test_a_key_that_an_earlier_version_did_not_know_had_its_default() -> None:
    config = parse_config(RECIPE | {"optimizer": {"eps": 1e-6}})
    flat = {"name": "small", "data.source": "rows.jsonl", "optimizer.lr": 1.5e-4, "removed.key": 1}
    assert changed_settings(flat, config) == [("optimizer.eps", 1e-8, 1e-6)]


def test_every_key_of_the_cluster_may_change_labels_with_dots_as_well() -> None:
    new = parse_config(
        RECIPE
        | {"cluster": {"node_selector": {"nvidia.com/gpu.product": "H100"}, "env": {"A": "1"}}}
    )
    assert changed_settings(parse_config(RECIPE).model_dump(mode="json"), new) == []


def test_settings_of_later_steps_and_of_the_machine_affect_no_weight() -> None:
    keys = {key for key, field in known_keys().items() if not affects_weights(field)}
    assert {
        "evaluate",
        "tracking",
        "parallel",
        "hardware",
        "cluster",
        "train.log_every",
        "train.export",
    } <= keys
    assert not keys & {
        "seed",
        "model",
        "model.id",
        "data",
        "data.source",
        "lora",
        "objective",
        "optimizer",
        "train",
        "train.steps",
    }


def test_the_datas_key_changes_with_the_preparations_version_not_with_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_config(
        {
            "name": "small",
            "data": {"source": str(write_lines(tmp_path / "rows.jsonl", problems(2)))},
        }
    )
    before = resolve.data_fingerprint(config)
    assert resolve.data_fingerprint(config) == before
    monkeypatch.setattr(resolve, "PREPARATION_VERSION", PREPARATION_VERSION + 1)
    assert resolve.data_fingerprint(config) != before


def test_prepared_rows_change_only_with_the_preparations_version(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", problems(40))
    card = prepare_data(run_config(source), make_model(tmp_path / "model"), tmp_path / "out")
    assert card["content_hash"][:8] == PREPARED.get(PREPARATION_VERSION), (
        "the same rows give other tokens: raise PREPARATION_VERSION, so that no unfinished run "
        "resumes with data of both kinds"
    )

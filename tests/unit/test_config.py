"""A recipe is read from text, defaults and overrides; the older name of a key keeps its meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvastune.config import RunConfig, load_config, loads, parse_config, write_config
from canvastune.config.loading import known_keys
from canvastune.errors import UserError

RECIPE: dict[str, Any] = {"name": "small", "data": {"source": "rows.jsonl"}}
OLDER = {
    "data.max_bad_row_fraction": "data.max_bad_rows",
    "data.max_duplicate_fraction": "data.max_duplicates",
}


def refusal(tree: dict[str, Any], *overrides: str) -> UserError:
    with pytest.raises(UserError) as error:
        loads(yaml.safe_dump(tree), overrides=overrides)
    return error.value


def leaf(config: RunConfig, key: str) -> float:
    return float(getattr(config.data, key.removeprefix("data.")))


def test_text_and_file_are_read_alike_and_errors_name_the_source(tmp_path: Path) -> None:
    text = yaml.safe_dump(RECIPE)
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert loads(text, overrides=["lora.rank=8"]) == load_config(file, ["lora.rank=8"])
    for bad in ("name: [", "nmae: x\n"):
        file.write_text(bad)
        with pytest.raises(UserError) as of_text:
            loads(bad, source="<text>")
        with pytest.raises(UserError) as of_file:
            load_config(file)
        assert str(of_text.value).startswith("<text>: ")
        assert str(of_file.value) == str(of_text.value).replace("<text>", str(file))


def test_defaults_are_beneath_the_text_and_its_overrides() -> None:
    defaults = {
        "backend": "pytorchjob",
        "nodes": 2,
        "cpu": "32",
        "env": {"NCCL_DEBUG": "WARN", "HTTPS_PROXY": "proxy"},
    }
    text = yaml.safe_dump(RECIPE | {"cluster": {"nodes": 1, "env": {"NCCL_DEBUG": "INFO"}}})
    cluster = loads(text, overrides=["cluster.cpu=8"], defaults=defaults).cluster
    assert (cluster.backend, cluster.nodes, cluster.cpu) == ("pytorchjob", 1, "8")
    assert cluster.env == {"NCCL_DEBUG": "INFO", "HTTPS_PROXY": "proxy"}
    assert defaults["env"] == {"NCCL_DEBUG": "WARN", "HTTPS_PROXY": "proxy"}, (
        "the caller's defaults were changed"
    )


@pytest.mark.parametrize("key", OLDER)
def test_the_older_name_of_a_key_is_accepted_in_text_and_overrides(key: str) -> None:
    for name in (key, OLDER[key]):
        section, _, short = name.partition(".")
        tree = RECIPE | {section: RECIPE["data"] | {short: 0.25}}
        assert leaf(loads(yaml.safe_dump(tree)), key) == 0.25
        for override in (key, OLDER[key]):
            config = loads(yaml.safe_dump(tree), overrides=[f"{override}=0.5"])
            assert leaf(config, key) == 0.5, "the name that the recipe uses won over --set"
        assert name in known_keys()


@pytest.mark.parametrize("key", OLDER)
def test_files_keep_the_older_name_so_that_earlier_runs_compare_equal(
    key: str, tmp_path: Path
) -> None:
    config = loads(yaml.safe_dump(RECIPE), overrides=[f"{key}=0.25"])
    older = OLDER[key].removeprefix("data.")
    write_config(config, tmp_path / "config.yaml")
    for tree in (
        config.model_dump(mode="json"),
        json.loads(config.model_dump_json()),
        yaml.safe_load((tmp_path / "config.yaml").read_text()),
    ):
        assert tree["data"][older] == 0.25
        assert key.removeprefix("data.") not in tree["data"]
        assert parse_config(tree) == config


@pytest.mark.parametrize("key", [*OLDER, *OLDER.values()])
def test_a_count_where_a_fraction_is_expected_is_refused(key: str) -> None:
    error = str(refusal(RECIPE, f"{key}=5"))
    assert re.search(r"found 5, .*\bfraction\b.* 0\.05\b", error)


@pytest.mark.parametrize("value", ["0", "-1", "some", "true", "2.5", "null"])
def test_blocks_are_a_count_or_all(value: str) -> None:
    error = refusal(RECIPE, f"objective.blocks={value}")
    assert str(error).startswith(f"--set objective.blocks={value}: objective.blocks: ")
    assert re.search(r", expected .* 1\b.* all$", str(error))
    for given, blocks in (("1", 1), ("12", 12), ("all", "all")):
        config = loads(yaml.safe_dump(RECIPE), overrides=[f"objective.blocks={given}"])
        assert config.objective.blocks == blocks
    assert loads(yaml.safe_dump(RECIPE)).objective.blocks == 1


def test_both_names_of_a_key_at_once_are_refused() -> None:
    error = refusal(
        RECIPE | {"data": {"source": "x", "max_bad_rows": 0.1, "max_bad_row_fraction": 0.2}}
    )
    assert re.search(r"data\.max_bad_rows: .* data\.max_bad_row_fraction\b", str(error))


def test_a_suggestion_uses_the_current_name() -> None:
    assert "data.max_duplicate_fraction" in refusal(RECIPE, "data.max_duplicate=0.5").hint


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("learning_rate", "optimizer.lr"),
        ("train.num_train_epochs", "train.global_batch_size"),
        ("lora_r", "lora.rank"),
        ("output_dir", "--workspace"),
    ],
)
def test_what_other_trainers_call_a_setting_is_known(key: str, own: str) -> None:
    with pytest.raises(UserError) as refused:
        loads("name: x\ndata: {source: rows.jsonl}", overrides=[f"{key}=1"])
    assert own in refused.value.hint


def test_a_bad_value_is_blamed_on_what_set_it() -> None:
    recipe = "name: x\ndata: {source: rows.jsonl}\nlora: {rank: many}"
    with pytest.raises(UserError) as refused:
        loads(recipe, overrides=["train.steps=ten"], source="mine.yaml")
    by_option, by_file = sorted(str(refused.value).splitlines())
    assert by_option.startswith("--set train.steps=ten: train.steps: found 'ten'")
    assert by_file.startswith("mine.yaml: lora.rank: found 'many'")

"""Claims about several sources: their shares of the training stream, chosen held-out rows, and
what each step says of them.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from canvastune.config import RunConfig, changed_settings, load_config, loads, parse_config
from canvastune.config.schema import ObjectiveConfig
from canvastune.data.dataset import TrainingDataset
from canvastune.data.mixture import Interleaving, Mixture, Share
from canvastune.errors import UserError
from canvastune.noise import epoch_order
from canvastune.preparation.card import render_card
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.stats import BEYOND, DUPLICATE, HELD_OUT
from canvastune.tracking.lifecycle import _dataset_fields
from canvastune.training.run import check_prepared
from components.resolve.step import data_fingerprint, dataset_override
from pipelines.doctor.sources import check_data
from pipelines.submit import refuse_local_paths
from tests.support.data_fixtures import make_model, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Greet {name} {n}.", "response": f"Hi {name} {n}."} for n in range(count)]


def recipe(**data: Any) -> RunConfig:
    return parse_config({"name": "test", "data": {"seq_length": 256} | data})


def mixed(folder: Path, **data: Any) -> RunConfig:
    """Two sources with weights 3 and 1; one row is in both."""
    a = write_lines(folder / "a.jsonl", rows("a", 40))
    b = write_lines(folder / "b.jsonl", [*rows("b", 15), *rows("a", 1)])
    sources = [{"source": str(a), "weight": 3}, {"source": str(b)}]
    return recipe(**({"mixture": sources, "validation_fraction": 0.3} | data))


def stream(folder: Path, seed: int = 0) -> TrainingDataset:
    sizes: dict[str, Any] = {"canvas_length": 16, "vocab_size": 300, "eos_token_id": 1}
    return TrainingDataset(folder, **sizes, seed=seed, objective=ObjectiveConfig())


def split(out: Path, name: str) -> list[dict[str, Any]]:
    return list(load_from_disk(str(out / name)))


def read_card(out: Path) -> dict[str, Any]:
    return json.loads((out / "card.json").read_text())


# The stream


WEIGHTS = [
    [1.0, 1.0],
    [5.0, 2.0, 3.0],
    [0.7, 0.2, 0.1],
    [1e-3, 1.0],
    [1 / 3, 2 / 3],
    [7473.0, 395000.0, 12.5],
    [0.123456789, 0.377, 0.9182736455, 0.01],
    *([random.Random(n).random() for _ in range(2 + n)] for n in range(6)),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_no_source_is_ever_a_whole_example_away_from_its_share(weights: list[float]) -> None:
    interleaving = Interleaving(weights)
    total = sum(Fraction(repr(weight)) for weight in weights)
    shares = [Fraction(repr(weight)) / total for weight in weights]
    counts = [0] * len(weights)
    for position in range(3000):
        source, before = interleaving.at(position)
        assert before == counts[source], "the number of earlier examples of the source is wrong"
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - share * (position + 1)) < 1


def test_a_position_has_the_same_source_however_it_is_reached() -> None:
    weights = [5.0, 2.0, 3.5]
    ahead = Interleaving(weights)
    expected = [ahead.at(position) for position in range(500)]
    for position in random.Random(0).sample(range(500), 500):
        assert Interleaving(weights).at(position) == expected[position]
    source, before = ahead.at(21 * 10**12 + 3)
    assert (source, before) == (expected[3][0], expected[3][1] + 10**12 * [10, 4, 7][source])


def test_one_source_is_the_stream_itself() -> None:
    assert [Interleaving([0.3]).at(position) for position in (0, 7, 10**15)] == [
        (0, 0),
        (0, 7),
        (0, 10**15),
    ]


def test_each_source_is_walked_in_its_own_epochs(tmp_path: Path, model: Path) -> None:
    card = prepare_data(mixed(tmp_path), model, tmp_path / "out")
    kept = {source["source"][-7]: source["train"] for source in card["sources"]}
    data = stream(tmp_path / "out")
    origins = {row["id"]: row["origin"][0] for row in split(tmp_path / "out", "train")}
    ids = [example.id for example in data.train_examples(range(400))]
    assert Counter(origins[id] for id in ids[:100]) == {"a": 75, "b": 25}
    for name, count in kept.items():
        own = [id for id in ids if origins[id] == name]
        epochs = [own[start : start + count] for start in range(0, len(own) - count + 1, count)]
        assert len(epochs) > 1
        assert all(len(set(epoch)) == count for epoch in epochs), "a row came twice in an epoch"
        assert epochs[0] != epochs[1]
    later = stream(tmp_path / "out").train_examples(range(250, 260))
    assert [example.id for example in later] == ids[250:260]


def test_a_mixture_of_one_source_is_that_source(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows("a", 30))
    one = prepare_data(recipe(source=str(source), validation_fraction=0.2), model, tmp_path / "one")
    mixture = prepare_data(
        recipe(mixture=[{"source": str(source), "weight": 0.5}], validation_fraction=0.2),
        model,
        tmp_path / "mixture",
    )
    assert one["content_hash"] == mixture["content_hash"]
    data = stream(tmp_path / "one")
    order = epoch_order(0, 1, len(data))
    train = split(tmp_path / "one", "train")
    found = [example.id for example in data.train_examples(range(len(data), 2 * len(data)))]
    assert found == [train[at]["id"] for at in order]
    other = stream(tmp_path / "mixture").train_examples(range(len(data), 2 * len(data)))
    assert [example.id for example in other] == found


def test_a_mixture_that_does_not_fit_its_rows_is_refused(tmp_path: Path, model: Path) -> None:
    prepare_data(mixed(tmp_path), model, tmp_path / "out")
    file = tmp_path / "out" / "train" / "mixture.json"
    count = len(split(tmp_path / "out", "train"))
    assert sum(share.rows for share in Mixture.read(file.parent, count).shares) == count
    Mixture((Share(1.0, 3),)).write(file.parent)
    with pytest.raises(UserError, match=rf"\b3 rows, .*\b{count}\b"):
        stream(tmp_path / "out")
    file.write_text('{"shares": [{"weight": 1}]}')
    with pytest.raises(UserError, match=re.escape(f"{file}: ") + ".*TypeError"):
        stream(tmp_path / "out")


# Preparing


def test_the_card_counts_the_rows_of_each_source(tmp_path: Path, model: Path) -> None:
    card = prepare_data(mixed(tmp_path, max_rows=30), model, tmp_path / "out")
    a, b = card["sources"]
    assert (a["rows_read"], a["kept"], a["dropped"]) == (30, 30, {})
    assert (b["rows_read"], b["kept"]) == (16, 15)
    assert b["dropped"] == {DUPLICATE: 1}, "a repetition across sources"
    assert (a["weight"], a["share"], b["share"]) == (3, 0.75, 0.25)
    assert card["rows_read"] == 46
    for name in ("train", "validation"):
        assert a[name] + b[name] == card[name] == len(split(tmp_path / "out", name))
        origins = [row["origin"][0] for row in split(tmp_path / "out", name)]
        assert origins == ["a"] * a[name] + ["b"] * b[name]
    assert card["dropped"] == b["dropped"]
    assert read_card(tmp_path / "out") == card
    page = render_card(card)
    assert "By source" in page
    assert '<td class="number">75.0%</td>' in page


def test_rows_beyond_validation_rows_are_counted_for_their_source(
    tmp_path: Path, model: Path
) -> None:
    card = prepare_data(mixed(tmp_path, validation_rows=4), model, tmp_path / "out")
    assert card["validation"] == 4
    for source in card["sources"]:
        assert source["kept"] == source["train"] + source["validation"]
        assert source["rows_read"] == source["kept"] + sum(source["dropped"].values())


def test_a_small_source_of_bad_rows_is_not_hidden_by_a_large_one(
    tmp_path: Path, model: Path
) -> None:
    config = mixed(tmp_path, max_bad_row_fraction=0.2)
    write_lines(tmp_path / "b.jsonl", [*rows("b", 2), {"prompt": "x", "response": 3}])
    with pytest.raises(UserError, match=r"b\.jsonl: 1 of 3 rows .*max_bad_row"):
        prepare_data(config, model, tmp_path / "out")
    write_lines(tmp_path / "b.jsonl", rows("a", 3))
    with pytest.raises(UserError, match=r"b\.jsonl: 3 of 3 rows .*max_dup"):
        prepare_data(config, model, tmp_path / "out")


def test_a_source_whose_rows_are_all_held_out_is_refused(tmp_path: Path, model: Path) -> None:
    config = mixed(tmp_path, validation_fraction=0.9)
    write_lines(tmp_path / "b.jsonl", rows("b", 1))
    with pytest.raises(UserError, match=r"b\.jsonl: .*\b1 rows"):
        prepare_data(config, model, tmp_path / "out")


def test_rows_of_ones_own_are_held_out_and_nothing_else(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = write_lines(tmp_path / "held.jsonl", [*rows("v", 6), *rows("a", 2), *rows("v", 1)])
    caplog.set_level("INFO")
    config = mixed(tmp_path, validation=str(held), max_rows=20, max_duplicate_fraction=0.2)
    card = prepare_data(config, model, tmp_path / "out")
    first, a, b = card["sources"]
    assert [row["origin"] for row in split(tmp_path / "out", "validation")] == [
        f"held.jsonl:{n}" for n in range(1, 9)
    ]
    assert first["held_out"]
    assert first["dropped"] == {DUPLICATE: 1}
    assert (first["validation"], first["train"], a["validation"], b["validation"]) == (8, 0, 0, 0)
    assert a["dropped"] == {HELD_OUT: 2}
    assert b["dropped"] == {HELD_OUT: 1}
    train = split(tmp_path / "out", "train")
    assert len(train) == card["train"] == 18 + 15
    assert not {row["id"] for row in train} & {
        row["id"] for row in split(tmp_path / "out", "validation")
    }
    assert card["dropped"][HELD_OUT] == 3
    assert card["samples"][0]["origin"] == "a.jsonl:3", "a sample shows what is trained"
    assert "data.validation_fraction" in caplog.text, "that it does not apply"
    assert "data.validation_fraction" in render_card(card)
    shares = Mixture.read(tmp_path / "out" / "train", 33).shares
    assert [(share.weight, share.rows) for share in shares] == [(3, 18), (1, 15)]


def test_validation_rows_limits_rows_of_ones_own_and_trains_on_none_of_the_rest(
    tmp_path: Path, model: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*rows("a", 9), *rows("v", 5)])
    held = write_lines(tmp_path / "v.jsonl", rows("v", 5))
    config = recipe(source=str(source), validation=str(held), validation_rows=2)
    card = prepare_data(config, model, tmp_path / "out")
    assert (card["train"], card["validation"]) == (9, 2)
    assert card["sources"][0]["dropped"] == {BEYOND: 3}
    assert not (tmp_path / "out" / "train" / "mixture.json").exists()


def test_a_turn_that_is_held_out_is_not_learned_within_a_longer_conversation(
    tmp_path: Path, model: Path
) -> None:
    turns = [
        {"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")
    ]
    source = write_lines(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[2:]}])
    held = write_lines(tmp_path / "v.jsonl", [{"messages": turns[:4]}])
    config = {"source": str(source), "validation": str(held)}
    card = prepare_data(recipe(**config, learn="all"), model, tmp_path / "all")
    assert card["dropped"] == {HELD_OUT: 1}
    assert (card["train"], card["validation"]) == (2, 2)
    card = prepare_data(recipe(**config), model, tmp_path / "last")
    assert card["dropped"] == {}, "the held-out turn is context only"


def test_the_same_rows_on_both_sides_leave_nothing_to_train_on(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows("a", 9))
    held = write_lines(tmp_path / "v.jsonl", rows("a", 9))
    with pytest.raises(UserError, match=r"\b9 rows") as raised:
        prepare_data(recipe(source=str(source), validation=str(held)), model, tmp_path / "out")
    assert "data.source and data.validation" in (raised.value.hint or "")


# The recipe


def refusal(**data: Any) -> str:
    with pytest.raises(UserError) as raised:
        recipe(**data)
    return f"{raised.value}. {raised.value.hint}"


def test_source_and_mixture_exclude_each_other() -> None:
    entry = {"source": "a.jsonl"}
    assert "'data.source'" in refusal()
    assert "data.source: found 'b'" in refusal(mixture=[entry], source="b")
    assert "data.split: " in refusal(mixture=[entry], split="x")
    assert "data.columns: " in refusal(mixture=[entry], columns={"prompt": "q"}, validation="test")
    assert recipe(mixture=[entry], columns={"prompt": "q"}, validation="./x").data.validation
    assert "data.mixture.0.weight: found 0" in refusal(mixture=[entry | {"weight": 0}])


def test_a_validation_that_is_trained_on_is_refused() -> None:
    file = refusal(source="a.jsonl", validation="a.jsonl")
    assert re.search(r"data\.validation: found 'a\.jsonl'.* a\.jsonl ", file)
    split = refusal(source="org/name", validation="train")
    assert re.search(r"data\.validation: found 'train'.* org/name ", split)
    assert "./org/name" in refusal(source="a", validation="org/name")


def test_a_weight_makes_another_run_and_an_older_record_has_no_mixture(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    other = config.model_dump(mode="json")
    other["data"]["mixture"][0]["weight"] = 2
    assert [key for key, *_ in changed_settings(other, config)] == ["data.mixture"]
    old = {"name": "test", "data.source": "x", "data.seq_length": 256}
    assert changed_settings(old, recipe(source="x")) == []


def test_a_data_set_given_to_the_pipeline_takes_the_place_of_a_mixture(tmp_path: Path) -> None:
    text = json.dumps(mixed(tmp_path).model_dump(mode="json"))
    config = loads(text, overrides=dataset_override("c.jsonl"))
    assert (config.data.source, config.data.mixture) == ("c.jsonl", ())


# The steps


def test_a_change_of_any_source_makes_other_data(tmp_path: Path, model: Path) -> None:
    held = write_lines(tmp_path / "held.jsonl", rows("v", 6))
    config = mixed(tmp_path, validation=str(held))
    prepare_data(config, model, tmp_path / "out")
    check_prepared(tmp_path / "out", config)
    for name in ("a", "b", "held"):
        file = tmp_path / f"{name}.jsonl"
        text, before = file.read_text(), data_fingerprint(config)
        file.write_text(text + json.dumps(rows("new", 1)[0]))
        assert data_fingerprint(config) != before
        with pytest.raises(UserError, match=rf"{name}\.jsonl"):
            check_prepared(tmp_path / "out", config)
        file.write_text(text)


def test_mlflow_gets_the_place_of_each_source(tmp_path: Path, model: Path) -> None:
    held = write_lines(tmp_path / "held.jsonl", rows("v", 6))
    config = mixed(tmp_path, validation=str(held))
    prepare_data(config, model, tmp_path / "out")
    fields = _dataset_fields(config, tmp_path / "out", "training")
    assert fields["name"] == "a.jsonl + b.jsonl"
    assert json.loads(fields["source"]) == {
        "data.mixture.0": {"uri": str(tmp_path / "a.jsonl")},
        "data.mixture.1": {"uri": str(tmp_path / "b.jsonl")},
        "data.validation": {"uri": str(held)},
    }


def test_doctor_and_submit_look_at_every_source(tmp_path: Path) -> None:
    config = mixed(tmp_path, validation=str(tmp_path / "held.jsonl"))
    (tmp_path / "b.jsonl").write_text("{\n")
    assert [(found.state, found.found.partition(": ")[0]) for found in check_data(config)] == [
        ("ok", str(tmp_path / "a.jsonl")),
        ("warning", str(tmp_path / "b.jsonl")),
        ("problem", "data.validation"),
    ]
    with pytest.raises(UserError, match=r"^data\.mixture\.0: .*a\.jsonl"):
        refuse_local_paths(config)
    recipe_file = Path(__file__).parents[2] / "pipelines/recipes/tiny_lora.yaml"
    settings = ["data.source=s3://bucket/a.jsonl", "model.id=org/name"]
    with pytest.raises(UserError, match=r"^data\.source: s3://bucket/a\.jsonl: "):
        refuse_local_paths(load_config(recipe_file, settings))

"""Held-out rows that nearly repeat a training row are counted and shown, and nothing else is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from canvastune.preparation import near_duplicates as module
from canvastune.preparation.card import render_card
from canvastune.preparation.near_duplicates import near_duplicates
from canvastune.preparation.prepare import prepare_data
from tests.support.data_fixtures import make_model, run_config, write_lines


def split(rows: list[list[int]], name: str) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "id": [f"{number:04d}" for number in range(len(rows))],
            "origin": [f"{name}:{number}" for number in range(len(rows))],
        }
    )


def tokens(seed: int, count: int = 60) -> list[int]:
    return [random.Random(seed * 1000 + at).randint(0, 500) for at in range(count)]


def jaccard(one: list[int], other: list[int]) -> float:
    first, second = (
        {tuple(row[at : at + 5]) for at in range(len(row) - 4)} for row in (one, other)
    )
    return len(first & second) / len(first | second)


def test_similarity_is_the_jaccard_index_of_runs_of_five_tokens() -> None:
    held_out = [tokens(seed) for seed in range(12)]
    edited = [*held_out[3]]
    edited[10] = 900
    longer = [*held_out[5], 901, 902, 903]
    other = [*held_out[7]]
    other[5::9] = [903] * len(other[5::9])
    train = [tokens(seed) for seed in range(100, 700)] + [edited, longer, other]
    found = near_duplicates(split(train, "train"), split(held_out, "held"))
    assert (found["checked"], found["found"]) == (12, 2)
    assert found["examples"] == [
        {
            "held_out": f"held:{row}",
            "train": f"train:{at}",
            "similarity": round(jaccard(held_out[row], train[at]), 3),
        }
        for row, at in ((5, 601), (3, 600))
    ]
    assert jaccard(held_out[7], other) < 0.75


def test_the_most_similar_row_is_the_example() -> None:
    held_out = [tokens(1)]
    worse, better = [*held_out[0]], [*held_out[0]]
    worse[20] = better[0] = 999
    for rows in ([worse, better], [better, worse]):
        found = near_duplicates(split(rows, "train"), split(held_out, "held"))
        assert found["examples"][0]["train"] == f"train:{rows.index(better)}"


def test_what_many_rows_share_does_not_count() -> None:
    system = tokens(7, 300)
    held_out = [system + tokens(seed, 20) for seed in range(20, 32)]
    train = [system + tokens(seed, 20) for seed in range(40, 90)]
    assert jaccard(held_out[0], train[0]) > 0.75
    assert near_duplicates(split(train, "train"), split(held_out, "held"))["found"] == 0
    repeated = [*held_out[4][:-1], 999]
    found = near_duplicates(split([*train, repeated], "train"), split(held_out, "held"))
    assert [each["held_out"] for each in found["examples"]] == ["held:4"]


def test_short_rows_are_not_called_alike() -> None:
    held_out, train = [[1, 2, 3, 4, 5, 6], [1, 2]], [[1, 2, 3, 4, 5, 6], [1, 2], []]
    found = near_duplicates(split(train, "train"), split(held_out, "held"))
    assert found == {"checked": 2, "found": 0, "examples": []}


def test_a_sample_of_the_shingles_finds_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [tokens(seed, 400) for seed in range(30)]
    train = [[*held_out[seed][:-1], 999] for seed in range(0, 30, 3)]
    train += [tokens(seed, 400) for seed in range(200, 260)]
    whole = near_duplicates(split(train, "train"), split(held_out, "held"))
    monkeypatch.setattr(module, "_MOST_SHINGLES", 3000)
    sampled = near_duplicates(split(train, "train"), split(held_out, "held"))
    assert whole["found"] == sampled["found"] == 10


def test_the_card_the_log_and_the_page_say_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def text(seed: int) -> str:
        draw = random.Random(seed)
        return " ".join("".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(8))

    rows = [
        {"question": text(seed), "answer": f"{text(seed + 500)} {n}"}
        for seed in range(40)
        for n in (1, 2)
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    with caplog.at_level("INFO"):
        card = prepare_data(
            run_config(source, validation_fraction=0.3),
            make_model(tmp_path / "model"),
            tmp_path / "out",
        )
    found = card["near_duplicates"]
    splits: list[Any] = [load_from_disk(str(tmp_path / "out" / n)) for n in ("train", "validation")]
    # rows 2n - 1 and 2n of the file differ in their last word only
    pairs = [{(int(row.rpartition(":")[2]) - 1) // 2 for row in each["origin"]} for each in splits]
    across = len(pairs[0] & pairs[1])
    assert across > 3
    assert (found["checked"], found["found"]) == (len(splits[1]), across)
    for example in found["examples"]:
        one, other = (int(example[side].rpartition(":")[2]) for side in ("held_out", "train"))
        assert (one - 1) // 2 == (other - 1) // 2
    assert f"{across} of {found['checked']} " in caplog.text
    assert found["examples"][0]["held_out"] in caplog.text
    assert found["examples"][4]["train"] in render_card(card)

"""Claims about the step prepare_data: what it writes, how it splits, what it drops and counts, and
what it refuses.
"""

from __future__ import annotations

import json
import logging
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from canvastune.config import load_config
from canvastune.data import data_profile
from canvastune.errors import UserError
from canvastune.io.hashing import hash_path
from canvastune.preparation import near_duplicates, split_writer
from canvastune.preparation.prepare import Throughput, prepare_data
from canvastune.preparation.stats import BEYOND, DUPLICATE, NO_ROOM
from canvastune.tiny_model import write_problems
from tests.support.data_fixtures import THOUGHT, make_model, problems, run_config, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def split(out: Path, name: str) -> list[dict[str, Any]]:
    return list(load_from_disk(str(out / name)))


def both(out: Path) -> list[dict[str, Any]]:
    return split(out, "train") + split(out, "validation")


def refusal(source: Path, model: Path, **data: Any) -> str:
    """The error of a preparation that must fail, and must leave nothing behind."""
    out = source.parent / "out"
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(UserError) as raised:
        prepare_data(run_config(source, **data), model, out)
    assert sorted(source.parent.rglob("*")) == before, "a failed preparation left files behind"
    return f"{raised.value}\n{raised.value.hint}"


def test_a_prepared_folder_holds_what_the_trainer_reads(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", problems(40))
    card = prepare_data(run_config(source), model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "train",
        "validation",
        "card.json",
        "card.html",
        "profile.npz",
        "config.yaml",
        "provenance.json",
    }
    rows = both(tmp_path / "out")
    assert len(rows) == 40
    for row in rows:
        assert set(row) == {
            "input_ids",
            "prefix_length",
            "complete",
            "id",
            "origin",
            "prompt",
            "answer",
        }
        original = problems(40)[int(row["origin"].removeprefix("gsm.jsonl:")) - 1]
        assert row["answer"] == original["answer"]
        assert json.loads(row["prompt"]) == [{"role": "user", "content": original["question"]}]
        assert row["complete"]
        prefix, response = (
            row["input_ids"][: row["prefix_length"]],
            row["input_ids"][row["prefix_length"] :],
        )
        assert prefix == tokenizer.apply_chat_template(
            json.loads(row["prompt"]), add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.decode(response) == original["answer"] + "<turn|>", (
            "the response has a fill, a padding or a header"
        )
    assert (
        load_from_disk(str(tmp_path / "out" / "train")).features["input_ids"].feature.dtype
        == "int32"
    )
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == card
    assert load_config(tmp_path / "out" / "config.yaml") == run_config(source)
    inputs = json.loads((tmp_path / "out" / "provenance.json").read_text())["inputs"]
    assert inputs["data"] == hash_path(source) == card["fingerprint"]
    assert set(inputs) == {"data", "config.json", "tokenizer.json"}


def test_the_profile_has_every_row_and_counts_every_token(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_profile, "_BATCH_ROWS", 7)
    source = write_lines(tmp_path / "gsm.jsonl", [*problems(40), {"question": "q?", "answer": "ω"}])
    prepare_data(run_config(source), model, tmp_path / "out")
    profile = data_profile.DataProfile.read(tmp_path / "out")
    assert profile is not None
    tokens: dict[str, Counter[int]] = {"prompt": Counter(), "response": Counter()}
    for name, hashes in (("train", profile.train), ("validation", profile.validation)):
        rows = split(tmp_path / "out", name)
        assert hashes.tolist() == sorted(int(row["id"][:16], 16) for row in rows)
        for row in rows:
            tokens["prompt"].update(row["input_ids"][: row["prefix_length"]])
            tokens["response"].update(row["input_ids"][row["prefix_length"] :])
    for side, counts in (("prompt", profile.prompt), ("response", profile.response)):
        found = {token: count for token, count in enumerate(counts.tolist()) if count}
        assert found == tokens[side], side


def test_the_card_accounts_for_every_row(tmp_path: Path, model: Path) -> None:
    rows: list[Any] = [
        *problems(100),
        *problems(5),
        "not json",
        {"question": "q", "answer": ""},
        {"question": "x" * 300, "answer": "a"},
    ]
    rows += [{"question": "long", "answer": "y" * (300 + n)} for n in range(9)]
    source = write_lines(tmp_path / "gsm.jsonl", rows)
    card = prepare_data(
        run_config(source, max_bad_row_fraction=0.1, validation_rows=3), model, tmp_path / "out"
    )
    assert card["rows_read"] == 117
    assert card["dropped"].pop(BEYOND) > 0
    assert card["dropped"] == {
        "bad row": 2,
        DUPLICATE: 5,
        NO_ROOM: 1,
    }
    full = json.loads((tmp_path / "out" / "card.json").read_text())
    assert full["kept"] + sum(full["dropped"].values()) == full["rows_read"], (
        "rows vanish without a reason"
    )
    assert full["kept"] == full["train"] + full["validation"] == len(both(tmp_path / "out"))
    assert [(bad["file"], bad["row"]) for bad in full["bad_rows"]] == [
        (str(source), 106),
        (str(source), 107),
    ]
    cut, empty = (bad["reason"] for bad in full["bad_rows"])
    assert "JSON" in cut
    assert "'answer'" in empty
    lengths = [len(row["input_ids"]) for row in both(tmp_path / "out")]
    assert (
        sum(full["token_histogram"]["counts"])
        == sum(full["block_histogram"].values())
        == full["kept"]
    )
    blocks = [
        -(-(len(row["input_ids"]) - row["prefix_length"]) // 16) for row in both(tmp_path / "out")
    ]
    assert {int(number): count for number, count in full["block_histogram"].items()} == {
        n: blocks.count(n) for n in set(blocks)
    }
    assert full["cut"] == sum(not row["complete"] for row in both(tmp_path / "out")) > 0
    assert max(lengths) == 256
    assert (full["format"], full["seq_length"], full["canvas_length"], full["tokenizer"]) == (
        "gsm8k",
        256,
        16,
        "GemmaTokenizer",
    )


def test_a_response_that_lost_its_end_is_not_complete(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{"question": "q", "answer": "z" * n} for n in range(1, 60)]
    prepare_data(
        run_config(write_lines(tmp_path / "a.jsonl", rows), seq_length=40), model, tmp_path / "out"
    )
    for row in both(tmp_path / "out"):
        response = tokenizer.decode(row["input_ids"][row["prefix_length"] :])
        whole = row["prefix_length"] + len(row["answer"]) + 1 <= 40
        assert row["complete"] is whole
        assert response == (
            row["answer"] + "<turn|>" if whole else "z" * (40 - row["prefix_length"])
        )


def test_a_prefix_that_leaves_room_for_one_token_is_kept_and_one_more_is_dropped(
    tmp_path: Path, model: Path
) -> None:
    question = [{"role": "user", "content": "-"}]
    prompt: Any = AutoTokenizer.from_pretrained(model).apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    header = len(prompt)
    rows = [
        {"question": "-" * (40 - header + 1 - spare), "answer": f"{n}b"}
        for n in range(20)
        for spare in (0, 1)
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    config = run_config(source, seq_length=40, max_too_long_fraction=0.5)
    card = prepare_data(config, model, tmp_path / "out")
    assert card["dropped"] == {NO_ROOM: 20}
    assert {row["prefix_length"] for row in both(tmp_path / "out")} == {39}
    assert {len(row["input_ids"]) for row in both(tmp_path / "out")} == {40}


def test_the_same_row_falls_into_the_same_split_anywhere(tmp_path: Path, model: Path) -> None:
    rows = problems(300)
    prepare_data(run_config(write_lines(tmp_path / "a.jsonl", rows)), model, tmp_path / "all")
    other = [
        {
            "messages": [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": r["answer"]},
            ]
        }
        for r in rows[100:]
    ]
    random.Random(0).shuffle(other)
    prepare_data(run_config(write_lines(tmp_path / "b.jsonl", other)), model, tmp_path / "some")
    held_out = {row["id"] for row in split(tmp_path / "all", "validation")}
    assert 30 < len(held_out) < 90, "the validation share is not about the fifth that was asked for"
    assert {row["id"] for row in split(tmp_path / "some", "validation")} == held_out & {
        row["id"] for row in both(tmp_path / "some")
    }
    assert not held_out & {row["id"] for row in split(tmp_path / "all", "train")}, (
        "a validation row is trained on"
    )


def test_validation_rows_does_not_depend_on_the_order_and_trains_on_none_of_the_rest(
    tmp_path: Path, model: Path
) -> None:
    rows = problems(200)
    train, validation = [], []
    for name in ("a", "b"):
        prepare_data(
            run_config(write_lines(tmp_path / f"{name}.jsonl", rows), validation_rows=7),
            model,
            tmp_path / name,
        )
        train.append({row["id"] for row in split(tmp_path / name, "train")})
        validation.append({row["id"] for row in split(tmp_path / name, "validation")})
        random.Random(1).shuffle(rows)
    assert len(validation[0]) == 7
    assert validation[0] == validation[1]
    assert train[0] == train[1]
    prepare_data(run_config(tmp_path / "a.jsonl"), model, tmp_path / "c")
    assert {row["id"] for row in split(tmp_path / "c", "train")} == train[0], (
        "rows beyond validation_rows were trained on"
    )


def test_equal_rows_are_equal_files(tmp_path: Path, model: Path) -> None:
    cards = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        source = write_lines(tmp_path / place / "gsm.jsonl", problems(60))
        cards.append(
            prepare_data(run_config(source, validation_rows=3), model, tmp_path / place / "out")
        )
    for name in ("train", "validation"):
        assert hash_path(tmp_path / "here" / "out" / name) == hash_path(
            tmp_path / "there" / "out" / name
        )
    assert cards[0]["content_hash"] == cards[1]["content_hash"]
    other = prepare_data(
        run_config(tmp_path / "here" / "gsm.jsonl", validation_rows=3, seq_length=50),
        model,
        tmp_path / "other",
    )
    assert other["content_hash"] != cards[0]["content_hash"]


def test_batches_do_not_change_the_result(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", problems(30))
    whole = prepare_data(run_config(source), model, tmp_path / "whole")
    small = Throughput(batch_rows=7, batch_characters=300)
    pieces = prepare_data(run_config(source), model, tmp_path / "pieces", throughput=small)
    assert pieces["content_hash"] == whole["content_hash"]


def test_max_rows_reads_no_more(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", [*problems(50), "broken", "broken too"])
    card = prepare_data(
        run_config(source, max_rows=50, max_bad_row_fraction=0), model, tmp_path / "out"
    )
    assert card["rows_read"] == 50


def test_too_many_bad_rows_fail_and_are_named(tmp_path: Path, model: Path) -> None:
    rows: list[Any] = problems(20)
    rows[3] = "{"
    rows[7] = {"question": "q<turn|>", "answer": "a"}
    rows[9] = {"question": "q"}  # found sooner than row 8, whose text must be tokenized first
    source = write_lines(tmp_path / "gsm.jsonl", rows)
    message = refusal(source, model, max_bad_row_fraction=0.1)
    assert message.startswith(f"{source}: 3 of 20 rows ")
    assert "15.0%" in message
    assert "10.0% (data.max_bad_row_fraction)" in message
    assert re.findall(r": row (\d+):", message) == ["4", "8", "10"], (
        "bad rows are not named in the order of the file"
    )
    reasons = dict(re.findall(rf"^  {re.escape(str(source))}: row (\d+): (.*)$", message, re.M))
    assert "JSON" in reasons["4"]
    assert "'<turn|>'" in reasons["8"]
    assert re.search(r"'answer'.*\bquestion$", reasons["10"]), "the missing column, and those found"
    assert "data.max_bad_row_fraction" in message.splitlines()[-1]
    card = prepare_data(run_config(source, max_bad_row_fraction=0.15), model, tmp_path / "out")
    assert card["bad"] == 3


def test_an_error_names_the_first_five_bad_rows_and_counts_the_rest(
    tmp_path: Path, model: Path
) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", [*problems(20), *["broken"] * 9])
    message = refusal(source, model)
    assert [int(number) for number in re.findall(r": row (\d+):", message)] == [21, 22, 23, 24, 25]
    assert "\n  and 4 more\n" in message


def test_too_many_duplicates_fail_and_are_named(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", [*problems(20), *problems(10)])
    message = refusal(source, model)
    assert message.startswith(f"{source}: 10 of 30 rows ")
    assert "33.3%" in message
    assert "10.0% (data.max_duplicate_fraction)" in message
    assert f"  {source}: row 21\n" in message
    card = prepare_data(run_config(source, max_duplicate_fraction=0.4), model, tmp_path / "out")
    assert (card["kept"], card["dropped"]) == (20, {DUPLICATE: 10})


def test_a_split_without_rows_is_refused_with_the_fraction_that_would_do(
    tmp_path: Path, model: Path
) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", problems(8))
    message = refusal(source, model, validation_fraction=1e-6)
    assert re.search(r"\bnone\b.* 8\b", message)
    enough = float(message.rsplit(" ", 1)[1].removesuffix("."))
    assert re.search(r"\ball\b.* 8\b", refusal(source, model, validation_fraction=0.999999))
    assert enough == 0.3, "16 rows are wanted, but not more than this share"
    card = prepare_data(run_config(source, validation_fraction=enough), model, tmp_path / "out")
    assert card["validation"] == 2


def test_rows_that_are_all_too_long_are_refused_with_their_length(
    tmp_path: Path, model: Path
) -> None:
    message = refusal(write_lines(tmp_path / "gsm.jsonl", problems(8)), model, seq_length=10)
    longest = 1 + max(len(row["question"]) for row in problems(8))
    assert "(8: " in message, "how many rows were dropped for it"
    found = re.search(r" (\d+) tokens\b.* data\.seq_length", message)
    assert found is not None
    assert int(found[1]) > longest


def test_too_many_rows_without_room_are_refused_and_few_are_said(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{**row, "question": row["question"] * 9} for row in problems(24)[20:]]
    source = write_lines(tmp_path / "gsm.jsonl", [*problems(20), *long])
    length = 12 + max(len(row["question"]) for row in problems(20))
    message = refusal(source, model, seq_length=length)
    assert "4 of 24 " in message
    assert "10.0% (data.max_too_long_fraction)" in message
    needed = re.search(r" (\d+) tokens: raise data\.seq_length", message)
    assert needed is not None
    assert int(needed[1]) > length
    with caplog.at_level("INFO"):
        config = run_config(source, seq_length=length, max_too_long_fraction=0.2)
        card = prepare_data(config, model, tmp_path / "out")
    assert (card["kept"], card["too_long"]) == (20, 4)
    assert card["cut"] > 0
    said = "\n".join(caplog.messages)
    assert f"{card['cut']} of 20 responses" in said, "they have no end"
    assert "4 of 24 examples" in said


def test_columns_of_no_known_form_are_listed(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"id": n, "text": "t"} for n in range(5)])
    message = refusal(source, model)
    assert f"{source}: row 1: " in message
    assert " id, text, " in message
    assert "data.columns.prompt=text" in message.splitlines()[-1]
    message = refusal(
        source, model, format="columns", columns={"prompt": "text", "response": "label"}
    )
    assert re.search(rf"{re.escape(str(source))}: row 1: .*\blabel, ", message)
    assert "data.format columns" in message
    assert "data.columns.prompt" in message.splitlines()[-1]
    message = refusal(source, model, format="gsm8k")
    assert re.search(r"row 1: .*\bquestion, answer, ", message)
    assert "data.format" in message.splitlines()[-1]
    assert "row 1: found int" in refusal(write_lines(tmp_path / "b.jsonl", [1, 2]), model)


def test_a_few_odd_rows_at_the_start_do_not_hide_the_form(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"comment": "exported today"}, 7, *problems(30)])
    card = prepare_data(run_config(source, max_bad_row_fraction=0.1), model, tmp_path / "out")
    assert [bad["row"] for bad in card["bad_rows"]] == [1, 2]
    other, number = (bad["reason"] for bad in card["bad_rows"])
    assert re.search(r"'question'.*\bcomment\b", other)
    assert re.search(r"\bint\b.*\bquestion, answer\b", number)


def test_every_form_is_prepared(tmp_path: Path, model: Path) -> None:
    pairs = [(row["question"], row["answer"]) for row in problems(30)]
    forms: dict[str, list[Any]] = {
        "messages": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in pairs
        ],
        "gsm8k": [{"question": q, "answer": a} for q, a in pairs],
        "columns": [{"prompt": q, "response": a} for q, a in pairs],
    }
    hashes = set()
    for form, rows in forms.items():
        card = prepare_data(
            run_config(write_lines(tmp_path / f"{form}.jsonl", rows)), model, tmp_path / form
        )
        assert card["format"] == form
        hashes.add(card["content_hash"])
    assert len(hashes) == 1, "the same conversations in another form became other tokens"


def test_a_model_with_a_thought_channel_is_prepared_as_inference_prompts_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", THOUGHT)
    card = prepare_data(
        run_config(write_lines(tmp_path / "a.jsonl", problems(30))), model, tmp_path / "out"
    )
    assert all(
        sample["prefix"].endswith("<|turn>model\n<|channel>thought\n<channel|>")
        for sample in card["samples"]
    )
    assert all(
        sample["response"].endswith("<turn|>") and "channel" not in sample["response"]
        for sample in card["samples"]
    )


def test_an_output_that_exists_is_never_overwritten(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", problems(30))
    prepare_data(run_config(source), model, tmp_path / "out")
    before = hash_path(tmp_path / "out")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "out"))):
        prepare_data(run_config(source, seq_length=50), model, tmp_path / "out")
    assert hash_path(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "token", "own"),
    [
        ({"vocab_size": 300}, "", 385),
        ({"eos_token_id": 7}, "<eos>", 1),
        ({"pad_token_id": 3}, "<pad>", 0),
        ({"bos_token_id": 1}, "<bos>", 2),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    change: dict[str, Any], token: str, own: int, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    model = make_model(tmp_path / "model", **change)
    message = refusal(write_lines(tmp_path / "gsm.jsonl", problems(5)), model)
    ((key, value),) = change.items()
    assert re.search(rf"{token}.* {own}\b.*\btext_config\.{key}\b.* {value}\b", message)


def test_more_than_one_end_of_sequence_is_understood(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", eos_token_id=[1, 6])
    assert (
        prepare_data(
            run_config(write_lines(tmp_path / "a.jsonl", problems(30))), model, tmp_path / "out"
        )["kept"]
        == 30
    )


def test_a_model_whose_generation_does_not_stop_at_the_end_of_turn_is_refused(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 99]}')
    message = refusal(write_lines(tmp_path / "gsm.jsonl", problems(5)), model)
    assert "generation_config.json: eos_token_id is [1, 99]" in message
    assert "'<turn|>' (id 6)" in message


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "gemma3"}', r"\bmodel_type\b.*'gemma3'.*'diffusion_gemma'"),
        ("config.json", "{", r"\bconfig\.json: "),
        ("tokenizer.json", "{}", r"\btokenizer\b"),
        ("chat_template.jinja", "{{ oops", r"\bchat template\b"),
        ("generation_config.json", "[", r"\bgeneration_config\.json: "),
    ],
)
def test_a_broken_model_folder_is_named(
    file: str, content: str, message: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    (model / file).write_text(content)
    assert re.search(message, refusal(write_lines(tmp_path / "gsm.jsonl", problems(5)), model))


def test_progress_is_logged(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = write_lines(tmp_path / "gsm.jsonl", problems(30))
    prepare_data(
        run_config(source), model, tmp_path / "quick", throughput=Throughput(progress_seconds=60)
    )
    assert "rows read" not in caplog.text, (
        "a preparation of less than two seconds needs no progress"
    )
    prepare_data(
        run_config(source), model, tmp_path / "slow", throughput=Throughput(progress_seconds=0)
    )
    assert "prepare_data: 30 rows read, " in caplog.text


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Throughput(batch_rows=16)
    # reads files by the MiB, more than these rows are
    monkeypatch.setattr(split_writer, "hash_path", lambda path: "0" * 64)
    monkeypatch.setattr(near_duplicates, "_MOST_SHINGLES", 2**12)  # fewer than these rows have
    peaks = []
    for count in (160, 800):
        rows = [
            {"question": f"{n} " + "abcdefgh" * 20, "answer": "the and " * 20} for n in range(count)
        ]
        source = write_lines(tmp_path / f"{count}.jsonl", rows)
        tracemalloc.start()
        prepare_data(
            run_config(source, seq_length=2048), model, tmp_path / f"out{count}", throughput=small
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**19, (
        f"five times the rows took {peaks[1] / 2**20:.1f} instead of {peaks[0] / 2**20:.1f} MiB"
    )


def test_the_word_problems_of_the_tiny_model_are_prepared_whole(
    tmp_path: Path, tiny_model: Path
) -> None:
    """What `make run` reads: the other tests' tokenizer is made here, this one is the product's
    own.
    """
    write_problems(tmp_path / "compare.jsonl", "compare", 200, seed=3)
    card = prepare_data(
        run_config(tmp_path / "compare.jsonl", seq_length=64), tiny_model, tmp_path / "out"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert (card["kept"], card["dropped"], card["cut"]) == (200, {}, 0)
    for row in both(tmp_path / "out"):
        prompt = tokenizer.apply_chat_template(
            json.loads(row["prompt"]), add_generation_prompt=True, return_dict=False
        )
        assert row["input_ids"][: row["prefix_length"]] == prompt
        assert (
            tokenizer.decode(row["input_ids"][row["prefix_length"] :]) == row["answer"] + "<turn|>"
        )


def test_a_name_in_ignore_that_no_row_has_is_said(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{**row, "id": 1} for row in problems(40)])
    with caplog.at_level("INFO"):
        prepare_data(run_config(source, ignore=["id", "absent_key"]), model, tmp_path / "out")
    (said,) = re.findall(r"data\.ignore: .*", caplog.text)
    assert re.findall(r"absent_key|\bid\b", said) == ["absent_key"]

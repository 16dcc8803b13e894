"""What a user can get wrong ends in one message (where, what was found, what to do), exit code 1,
and nothing half-written or lost.
"""

from __future__ import annotations

import gzip
import json
import resource

import pytest

from pipelines.cli import main
from tests.support.bad_inputs import (
    GOOD,
    LINES,
    Case,
    Ground,
    added,
    data,
    data_folder,
    ends_well,
    folder_as_recipe,
    in_json,
    lines,
    model,
    other_tokenizer,
    output,
    pipe,
    recipe,
    said,
    setting,
    talk,
    template,
    unreadable,
    without,
)
from tests.unit.test_data_rows import as_bytes

RECIPES: dict[str, Case] = {
    "an unknown key is answered with the nearest": (
        added("lorra:\n  rank: 8\n"),
        ("unknown key 'lorra'", "'lora'?"),
    ),
    "an unknown key of a section too": (
        added("lora:\n  rnak: 8\n"),
        ("unknown key 'lora.rnak'", "'lora.rank'?"),
    ),
    "a word where a number goes": (
        setting("train.steps=many"),
        ("train.steps: ", "found 'many'", "valid integer"),
    ),
    "a fraction where a whole number goes": (
        setting("train.steps=2.5"),
        ("train.steps: ", "found 2.5", "valid integer"),
    ),
    "true where a whole number goes": (
        setting("train.steps=true"),
        ("train.steps: ", "found True", "not true"),
    ),
    "false where a number may be missing": (
        setting("train.micro_batch_size=off"),
        ("micro_batch_size", "found False", "number, not"),
    ),
    "true where a fraction goes": (
        setting("optimizer.lr=yes"),
        ("optimizer.lr: ", "found True", "not true"),
    ),
    "true among numbers": (
        setting("optimizer.betas=[true, 0.9]"),
        ("optimizer.betas: ", "[True, 0.9]", "not true"),
    ),
    "a list where a section goes": (
        added("train: [1, 2]\n"),
        ("train: ", "found [1, 2]", "expected"),
    ),
    "nothing where a section goes": (added("train:\n"), ("train: ", "found None", "expected")),
    "a number below its range": (
        setting("train.steps=0"),
        ("train.steps: ", "found 0", "equal to 1"),
    ),
    "a number above its range": (
        setting("data.validation_fraction=1"),
        ("validation_fraction", "found 1", "less than 1"),
    ),
    "an infinite learning rate": (
        setting("optimizer.lr=.inf"),
        ("optimizer.lr: ", "found inf", "finite number"),
    ),
    "a learning rate that is no number": (
        setting("optimizer.lr=.nan"),
        ("optimizer.lr: ", "found nan", "expected"),
    ),
    "a word that is not among the choices": (
        setting("train.method=qlora"),
        ("train.method: ", "'qlora'", "'lora' or 'full'"),
    ),
    "two keys that contradict": (
        setting("optimizer.min_lr=1"),
        ("optimizer.min_lr (1.0)", "above optimizer.lr"),
    ),
    "a corruption level outside its range": (
        setting("train.validation_levels=[0.5, 2]"),
        ("validation_levels", "2.0", "(0, 1]"),
    ),
    "nodes without a cluster": (
        setting("cluster.nodes=2"),
        ("cluster.nodes: found 2", "trainjob"),
    ),
    "a name that no folder can have": (
        setting("name=My Run"),
        ("name: ", "'My Run'", "pattern"),
    ),
    "a duplicate key": (
        added("name: again\n"),
        ("duplicate key 'name'", "line ", "this line"),
    ),
    "a duplicate key in a section": (
        added("lora: {rank: 8, rank: 16}\n"),
        ("duplicate key 'rank'", "this line"),
    ),
    "a tab as indentation": (
        recipe("name: x\ndata:\n\tsource: y\n"),
        ("line 3, column 1", "\\t", "this line"),
    ),
    "a bracket that is not closed": (
        added("lora: {rank: 8\n"),
        ("line ", "invalid YAML", "this line"),
    ),
    "a date that is none": (
        setting("name=2001-13-45"),
        ("--set name=2001-13-45", "month", "in quotes"),
    ),
    "two documents in one file": (
        added("---\nname: b\n"),
        ("single document", "another document", "this line"),
    ),
    "brackets nested ten thousand deep": (
        recipe("[" * 10_000),
        ("nested", "sections"),
    ),
    "a list instead of a mapping": (
        recipe("- name: x\n"),
        ("mapping", "list", "tiny_lora.yaml"),
    ),
    "a recipe that is one word": (
        recipe("recipe"),
        ("mapping", "str", "tiny_lora.yaml"),
    ),
    "a recipe that is a number": (recipe("3"), ("mapping", "found an int", "tiny_lora.yaml")),
    "an empty recipe": (recipe(""), ("mapping", "found nothing", "tiny_lora.yaml")),
    "a recipe of only comments": (
        recipe("# later\n"),
        ("mapping", "found nothing", "tiny_lora.yaml"),
    ),
    "a recipe without data": (recipe("name: x\n"), ("key 'data' is missing",)),
    "a recipe with NUL bytes": (
        recipe(b"name: x\0\n"),
        ("recipe.yaml", "#x0000", "plain UTF-8"),
    ),
    "a binary file as a recipe": (
        recipe(b"\x7fELF\x02\x01\xff\xfe"),
        ("recipe.yaml", "not UTF-8", "as UTF-8"),
    ),
    "a recipe in UTF-16": (
        recipe("name: x\n".encode("utf-16")),
        ("(byte 0xff at 0)", "as UTF-8"),
    ),
    "a recipe in Latin-1": (
        recipe("name: café\n".encode("latin-1")),
        ("byte 0xe9 at 9", "as UTF-8"),
    ),
    "a recipe that is not there": (
        lambda ground: ground.recipe.unlink(),
        ("no such", "recipe.yaml", "the path"),
    ),
    "a folder as a recipe": (folder_as_recipe, ("no such", "recipe.yaml", "the path")),
    "--set without a value": (
        setting("lora.rank"),
        ("--set lora.rank", "expected key=value", "--set lora.rank=32"),
    ),
    "--set without a key": (setting("=3"), ("--set =3", "expected key=value")),
    "--set with an open bracket": (
        setting("lora.rank=[8"),
        ("--set lora.rank=[8", "invalid YAML", "this line"),
    ),
    "--set of a key that is not there": (
        setting("lora.dropuot=0.1"),
        ("unknown key 'lora.dropuot'", "'lora.dropout'"),
    ),
    "--set of a section to a word": (setting("lora=big"), ("lora: ", "found 'big'", "expected")),
}

PAIR = {"question": "q", "answer": "a"}
DATA: dict[str, Case] = {
    "data that are not there": (
        setting("data.source=./dta.jsonl"),
        ("data.source", "./dta.jsonl", "no such"),
    ),
    "a kind of file that is not read": (
        data("rows.xlsx", b"PK"),
        ("rows.xlsx", "file type", "as CSV", ".parquet"),
    ),
    "an empty file": (data("rows.jsonl", b""), ("rows.jsonl", "0 bytes", "again")),
    "only blanks": (data("rows.jsonl", b" \n\t\n"), ("rows.jsonl", "no rows", "Use")),
    "UTF-16": (
        data("rows.jsonl", LINES.decode().encode("utf-16")),
        ("rows.jsonl: row 1", "UTF-16", "iconv"),
    ),
    "UTF-16 in an array": (
        data("rows.json", "[]".encode("utf-16")),
        ("rows.json", "UTF-16", "iconv"),
    ),
    "UTF-16 without its mark": (
        data("rows.jsonl", LINES.decode().encode("utf-16-le")),
        ("row 1", "not JSON", "or remove"),
    ),
    "Latin-1": (
        data("rows.jsonl", '{"question": "é", "answer": "a"}'.encode("latin-1")),
        ("row 1", "byte 0xe9", "or remove"),
    ),
    "Latin-1 in an array": (
        data("rows.json", '["é"]'.encode("latin-1")),
        ("rows.json: ", "not UTF-8", "Convert"),
    ),
    "NUL bytes": (
        data("rows.jsonl", b'{"question": "q\0", "answer": "a"}'),
        ("row 1", "control character", "or remove"),
    ),
    "zeros of a torn copy": (
        data("rows.jsonl", LINES + b"\0" * 200),
        ("row 41", "not JSON", "or remove"),
    ),
    "a line that was cut": (
        data("rows.jsonl", LINES[:-20]),
        ("row 40", "not JSON", "data.max_bad_row_fraction"),
    ),
    "quotes that are not escaped": (
        data("rows.jsonl", b'{"question": "he said "hi"", "answer": "a"}'),
        ("row 1", "not JSON: Expecting ','"),
    ),
    "JSON within JSON": (
        lines(json.dumps(json.dumps(PAIR))),
        ("row 1", "object"),
    ),
    "Python instead of JSON": (
        data("rows.jsonl", b"{'question': 'q', 'answer': None}"),
        ("row 1", "not JSON", "or remove"),
    ),
    "a line beyond the limit": (
        data("rows.jsonl", b'{"question": "' + b"x" * (64 * 2**20 + 9)),
        ("row 1", "longer than 64 MiB", "one JSON object"),
    ),
    "brackets that never close": (
        data("rows.jsonl", b"[" * 100_000),
        ("row 1", "nested", "or remove"),
    ),
    "an array of lines": (
        data("rows.json", LINES),
        ("rows.json", "JSON array", "to .jsonl"),
    ),
    "an array that was cut": (
        data("rows.json", as_bytes("json", GOOD)[:-30]),
        ("rows.json: row 40", "not JSON", "this row"),
    ),
    "gzip that was cut": (
        data("rows.jsonl.gz", gzip.compress(LINES)[:-9]),
        ("rows.jsonl.gz", "incomplete", "compress"),
    ),
    "gzip that is none": (
        data("rows.jsonl.gz", LINES),
        ("rows.jsonl.gz", "gzipped", "compress"),
    ),
    "gzip with a plain name": (
        data("rows.jsonl", gzip.compress(LINES)),
        ("rows.jsonl", "is gzip", "to rows.jsonl.gz"),
    ),
    "Parquet that is none": (
        data("rows.parquet", LINES),
        ("rows.parquet", "Parquet", "or copy"),
    ),
    "Parquet that was cut": (
        data("rows.parquet", as_bytes("parquet", GOOD)[:-7]),
        ("rows.parquet", "Parquet", "or copy"),
    ),
    "Parquet of other types": (
        data("rows.parquet", as_bytes("parquet", [{"question": 1, "answer": 2}])),
        ("row 1", " int,", "Correct"),
    ),
    "columns of no known form": (lines({"q": 1, "a": 2}), ("row 1", "q, a", "data.format")),
    "a column that is named and missing": (
        lines(PAIR, format="columns"),
        ("row 1", "prompt", "data.columns"),
    ),
    "rows that are numbers": (lines(1, 2, 3), ("row 1", "object")),
    "an answer that is a list": (
        lines({**PAIR, "answer": ["a"]}),
        ("row 1", "column 'answer'", "or remove"),
    ),
    "an empty answer": (
        lines({**PAIR, "answer": " "}),
        ("row 1", "(assistant): ", "empty", "or remove"),
    ),
    "half of a character": (
        lines({**PAIR, "answer": "\ud83d"}),
        ("row 1", "Unicode"),
    ),
    "an unknown role": (
        talk(said("robot", "x"), said("assistant", "y")),
        ("row 1", "unknown role 'robot'", "or remove"),
    ),
    "a role that is a list": (
        talk(said(["user"], "x"), said("assistant", "y")),
        ("row 1", "unknown role", "or remove"),
    ),
    "no assistant turn": (
        talk(said("user", "x")),
        ("row 1", "no assistant", "or remove"),
    ),
    "nothing before the assistant": (
        talk(said("assistant", "x")),
        ("row 1", "no turn", "or remove"),
    ),
    "messages that are a text": (
        lines({"messages": "user: x"}),
        ("row 1", "'messages'", "a str", "or remove"),
    ),
    "a key that one object has twice": (
        data("rows.jsonl", b'{"question": "q", "answer": "a", "answer": "b"}\n' + LINES),
        ("rows.jsonl: row 1", "key 'answer' appears twice", "data.max_bad_row_fraction"),
    ),
    "such a key inside of a turn": (
        data("rows.jsonl", b'{"messages": [{"role": "user", "role": "system"}]}'),
        ("row 1", "key 'role' appears twice", "or remove"),
    ),
    "such a key in an array": (
        data("rows.json", b'[{"question": "q", "question": "r", "answer": "a"}]'),
        ("rows.json: row 1", "key 'question' appears twice", "or remove"),
    ),
    "such a key in the JSON text of a call": (
        talk(
            said("user", "x"),
            {
                "role": "assistant",
                "tool_calls": [{"name": "f", "arguments": '{"city": "A", "city": "B"}'}],
            },
        ),
        ("row 1", "key 'city' appears twice", "or remove"),
    ),
    "repeats above the threshold": (
        lines(*GOOD[:4] * 5),
        ("16 of 20 rows", "row 5", "data.max_duplicate_fraction"),
    ),
    "prompts longer than the cut": (
        lines({"question": "q " * 900, "answer": "a"}, seq_length=64),
        ("the 1 rows", "raise data.seq_length"),
    ),
    "a single row": (lines(PAIR), ("rows.jsonl", "validation", "more rows")),
    "a named pipe": (pipe, ("data.source", "rows.jsonl: found a pipe", "to a file")),
    "a device": (
        setting("data.source=/dev/null"),
        ("data.source", "/dev/null: found a device", "to a file"),
    ),
    "a folder that mixes splits": (
        data_folder("train.jsonl", "test.jsonl"),
        ("train.jsonl", "mixes splits", "one file"),
    ),
    "a folder without data": (
        data_folder("notes.txt"),
        ("no data", "found notes.txt", "expected .jsonl"),
    ),
    "data that the system does not give": (
        unreadable,
        ("rows.jsonl", "be read", "Input/output error", "may read"),
    ),
}

MODELS: dict[str, Case] = {
    "a model that is not there": (
        setting("model.id=./nowhere"),
        ("model.id", "./nowhere", "no such"),
    ),
    "a device as the model": (
        setting("model.id=/dev/null"),
        ("model.id", "/dev/null: found a device"),
    ),
    "a model without its config": (
        without("config.json"),
        ("model", "no config.json", "checkpoint folder"),
    ),
    "a config that is cut": (
        model(lambda f: (f / "config.json").write_text('{"model_type"')),
        ("config.json", "be read", "the directory"),
    ),
    "another architecture": (
        in_json("config.json", model_type="bert"),
        ("config.json", "'bert'", "expected 'diffusion_gemma'"),
    ),
    "a vocabulary that is too small": (
        in_json("config.json", text_config={"vocab_size": 9}),
        ("config.json", "9"),
    ),
    "another model's tokenizer": (
        model(other_tokenizer),
        ("the tokenizer", "vocab_size", "unchanged checkpoint"),
    ),
    "a tokenizer that was cut": (
        model(
            lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:900])
        ),
        ("the tokenizer", "including tokenizer.json"),
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        ("model", "no tokenizer.json", "unchanged checkpoint"),
    ),
    "no chat template": (
        without("chat_template.jinja"),
        ("chat_template.jinja",),
    ),
    "a template that is not closed": (
        template("{% for m in messages %}"),
        ("model", "chat template", "unchanged checkpoint"),
    ),
    "a template that drops the answer": (
        template("{{ bos_token }}hello"),
        ("content 0 times", "unchanged checkpoint"),
    ),
    "a template with other markers": (
        template(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{%"
            " endfor %}"
        ),
        ("'<|im_end|>'", "the tokenizer", "unchanged checkpoint"),
    ),
    "an end of turn that does not stop": (
        in_json("generation_config.json", eos_token_id=[1]),
        ("eos_token_id is [1]", "stop"),
    ),
    "a generation config that is cut": (
        model(lambda f: (f / "generation_config.json").write_text("{")),
        ("generation_config.json", "the directory"),
    ),
}


CASES = RECIPES | DATA | MODELS


@pytest.mark.parametrize("case", CASES)
def test_one_message_and_nothing_half_written(
    case: str, ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = CASES[case]
    extra = spoil(ground)
    ends_well(ground, ground.command(*(extra if isinstance(extra, list) else [])), words, capsys)


PLACES: dict[str, Case] = {
    "an output that holds something": (
        output(lambda out: (out / "mine").mkdir(parents=True)),
        ("not empty", "Choose another"),
    ),
    "a file in the output's place": (
        output(lambda out: out.write_text("x")),
        ("already exists", "this one"),
    ),
    "a file where a folder of the output goes": (
        output(lambda out: out.write_text("x"), "inside"),
        ("cannot create", "a directory"),
    ),
    "an output where nothing can be made": (
        output(lambda _: None, "/proc/nowhere"),
        ("/proc/nowhere", "cannot create", "a directory"),
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    case: str, ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = PLACES[case]
    out = spoil(ground)
    ends_well(ground, ["prepare", str(ground.recipe), "--output", str(out)], words, capsys)


@pytest.mark.parametrize("room", [0, 1_000, 4_000])
def test_a_disk_that_takes_no_more_leaves_nothing_behind(
    room: int, ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond `room` bytes: what a full disk, or a quota, does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        ends_well(
            ground,
            ground.command(),
            ("out", "too large", "was removed", "disk space"),
            capsys,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_ground_is_sound(ground: Ground) -> None:
    assert main(ground.command()) == 0, "what the cases break was broken before"

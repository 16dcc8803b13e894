"""Claims about further kinds of sources: CSV, Arrow and its nested types, JSON objects, saved data
sets, index folders, addresses, and files that have to be converted.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from canvastune.config.data import DataConfig
from canvastune.config.places import is_path
from canvastune.errors import UserError
from canvastune.preparation.json_document import ReadLimits
from canvastune.preparation.readers import Row
from canvastune.preparation.sources import open_source, open_sources
from tests.unit.test_data_rows import read, refusal

ROWS = [{"prompt": f"Greet {n}.", "response": f"Hello {n}."} for n in range(8)]


def values(source: Path, **data: Any) -> list[Any]:
    found = read(source, **data)
    assert [row.problem for row in found] == [None] * len(found)
    return [row.value for row in found]


# CSV and TSV


def test_cells_are_text_and_an_empty_one_is_null(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('\ufeffprompt,response,n\n"a, ""b""\nc",d,\n\n,e,1\n', encoding="utf-8")
    assert values(file) == [
        {"prompt": 'a, "b"\nc', "response": "d", "n": None},
        {"prompt": None, "response": "e", "n": "1"},
    ]
    assert [row.origin for row in read(file)] == ["data.csv:1", "data.csv:2"]


def test_a_row_with_other_cells_than_the_header_is_a_problem_and_the_next_is_read(
    tmp_path: Path,
) -> None:
    file = tmp_path / "data.tsv.gz"
    text = 'prompt\tresponse\na\tb\nc\nd\te\tf\n"g" h\ti\n"j\nk"\tl\n'
    file.write_bytes(gzip.compress(text.encode()))
    found = read(file)
    assert [row.number for row in found] == [1, 2, 3, 4, 5]
    first, few, many, quoted, last = (row.problem for row in found)
    assert first is last is None
    for problem, line, cells in ((few, 3, 1), (many, 4, 3)):
        assert problem is not None
        assert re.match(rf"line {line}: {cells}\b.* 2\b", problem), problem
    assert quoted is not None
    assert re.match(r'line 5: .*""', quoted), quoted
    assert found[4].value == {"prompt": "j\nk", "response": "l"}


def test_a_quote_that_is_not_closed_does_not_swallow_the_rest_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('prompt,response\na,b\nc,"d\n' + "e,f\n" * 1000)
    message = refusal(file)
    assert f"{file}: row 2 (line 3): " in message
    assert "ends" in message
    file.write_text('prompt,response\na,b\nc,"d\n' + "e,f\n" * 2**18)
    tracemalloc.start()
    message = refusal(file, ReadLimits(row=2**18))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.search(rf"{re.escape(str(file))}: row 2 \(line 3\): .* MiB", message)
    assert held < 4 * 2**20, f"{held / 2**20:.1f} MiB held for a row of at most a quarter"


def test_a_cell_may_be_longer_than_the_librarys_limit(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("prompt,response\n" + "x" * 300_000 + ",y\n")
    assert len(values(file)[0]["prompt"]) == 300_000


HEADERS = {
    "repeated": (b"a,b,a\n1,2,3\n", "the header has the column 'a' twice. Rename one"),
    "semicolons": (b"a;b\n1;2\n", "one column, 'a;b', expected columns separated by a comma"),
    "tabs": (b"a\tb\n1\t2\n", "in a .csv file. Rename the file to .tsv."),
    "no rows": (b"a,b\n", "has no rows"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), "the file is UTF-16, expected UTF-8"),
    "not UTF-8": ("a,b\n1,\xe9\n".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_csv_file_that_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    data, message = HEADERS[name]
    (tmp_path / "data.csv").write_bytes(data)
    assert message in refusal(tmp_path / "data.csv")
    (tmp_path / "data.csv.gz").write_bytes(gzip.compress(data))
    assert message in refusal(tmp_path / "data.csv.gz")


def test_the_index_column_of_pandas_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(",prompt\n0,a\n")
    assert values(tmp_path / "data.csv") == [{"column 1": "0", "prompt": "a"}]


# JSON objects


@pytest.mark.parametrize("kind", ["json", "json.gz"])
@pytest.mark.parametrize("window", [3, 2**18])
def test_an_object_of_columns_and_an_object_with_the_rows_are_read(
    kind: str, window: int, tmp_path: Path
) -> None:
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    conversations = {"messages": [[{"role": "user", "content": row["prompt"]}] for row in ROWS]}
    for tree, expected in (
        (columns, ROWS),
        ({"data": ROWS}, ROWS),
        (conversations, [{"messages": each} for each in conversations["messages"]]),
        ({"id": [1], "meta": [{"a": 1}]}, [{"id": 1, "meta": {"a": 1}}]),
    ):
        text = json.dumps(tree, indent=1).encode()
        file = tmp_path / f"data.{kind}"
        file.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
        found = read(file, ReadLimits(window=window))
        assert [row.value for row in found] == expected
        assert [row.number for row in found] == list(range(1, len(expected) + 1))


OBJECTS: dict[str, tuple[str, str]] = {  # what is in the file, and a pattern of the refusal
    "columns of different lengths": ('{"a": [1, 2], "b": [3]}', r"\(a: 2, b: 1\)"),
    "rows and more": (
        '{"version": "1", "data": [{"a": 1}]}',
        r"\bkeys version, data\b.* jq -c '\.\[\"data\"\]\[\]' ",
    ),
    "two lists of rows": (
        '{"train": [{"a": 1}], "test": [{"a": 2}]}',
        r"\bkeys train, test\b.* array\b",
    ),
    "pandas": ('{"a": {"0": 1}, "b": {"0": 2}}', r"\bkeys a, b\b.*\bto_json\("),
    "one conversation": (
        '{"messages": [{"role": "user", "content": "x"}]}',
        r"\bkeys messages\b.* brackets\b",
    ),
    "one row": ('{"prompt": "a", "response": "b"}', r"\bbrackets\b"),
    "nothing": ("{}", r"\bkeys none\b"),
    "a repeated key": ('{"a": [1], "a": [2]}', r"'a'.* twice\b"),
    "no comma": ('{"a": [1] "b": [2]}', """JSON: expected ',', found '"'"""),
    "no colon": ('{"a" [1]}', r"JSON: expected ':', found '\['"),
    "no key": ("{1: [1]}", r"\bkey\b.* found 1\b"),
    "cut": ('{"a": [1], "b": [2]', r"JSON: expected ',', .*\bends\b"),
    "cut in a list": ('{"a": [1], "b": [2', r"\brow 1: expected ',' or '\]', .*\bends\b"),
    "no value": ('{"a": }', r"\bkey 'a': .*\bJSON\b"),
    "lines": ('{"a": [1]}\n{"a": [2]}', r"\.jsonl\b"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_another_object_is_refused_for_what_it_is(name: str, tmp_path: Path) -> None:
    text, pattern = OBJECTS[name]
    (tmp_path / "data.json").write_text(text)
    answer = refusal(tmp_path / "data.json")
    assert re.search(pattern, answer, re.DOTALL), answer
    assert name in ("lines", "cut in a list") or "per line" not in answer


@pytest.mark.parametrize("wrapped", [True, False])
def test_memory_does_not_grow_with_an_object(wrapped: bool, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}" + "abcdefgh" * 128, "response": "a"} for n in range(8_000)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"data": rows} if wrapped else columns))
    tracemalloc.start()
    count = sum(1 for _ in open_source(DataConfig(source=str(file))).rows())
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(rows)
    assert held < 4 * 2**20, f"{held / 2**20:.1f} MiB held while reading a file of 8 MiB"


# Arrow's types


def write_nested(path: Path, kind: pa.DataType, rows: list[Any]) -> Path:
    pq.write_table(pa.table({"value": pa.array(rows, kind)}), path)
    return path


def test_a_null_inside_a_column_is_a_key_that_was_never_there(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the same keys."""
    tools = [{"name": "a", "city": {"type": "text"}}, {"name": "b", "unit": None, "n": [1, None]}]
    file = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([{"tools": tools, "id": None}, {"tools": None}]), file)
    assert values(file) == [
        {
            "tools": [{"name": "a", "city": {"type": "text"}}, {"name": "b", "n": [1, None]}],
            "id": None,
        },
        {"tools": None, "id": None},
    ]


def test_a_map_with_text_keys_is_an_object(tmp_path: Path) -> None:
    text = pa.map_(pa.string(), pa.string())
    turns = [[("role", "user"), ("content", "x"), ("name", None)]]
    assert values(write_nested(tmp_path / "a.parquet", pa.list_(text), [turns, None])) == [
        {"value": [{"role": "user", "content": "x"}]},
        {"value": None},
    ]
    repeated = [("a", "1"), ("a", "2")]
    assert values(write_nested(tmp_path / "b.parquet", text, [repeated])) == [{"value": repeated}]
    numbers = [(1, "1")]
    by_number = pa.map_(pa.int64(), pa.string())
    assert values(write_nested(tmp_path / "c.parquet", by_number, [numbers])) == [
        {"value": numbers}
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_an_arrow_file_is_read(stream: bool, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS * 100)
    file = tmp_path / "data.arrow"
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(file), table.schema) as writer:
        writer.write_table(table)
    found = read(file)
    assert [row.value for row in found] == ROWS * 100
    assert found[-1].origin == "data.arrow:800"
    file.write_bytes(file.read_bytes()[:300])
    assert str(file) in refusal(file)


# Folders


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder), num_shards=3)
    assert values(folder) == ROWS
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    found = read(folder)
    assert [row.value for row in found] == [*ROWS[6:], *ROWS[3:6], *ROWS[:3]]
    assert found[1].origin == "saved:2"
    assert f"Set data.source={folder}." in refusal(tmp_path)
    next(folder.glob("*.arrow")).unlink()
    assert "save_to_disk" in refusal(folder)


def test_values_that_a_memory_mapped_file_holds_are_checked_before_they_are_read(
    tmp_path: Path,
) -> None:
    """Arrow itself does not check them: here text that is not UTF-8, which no reader trips over."""
    offsets = pa.py_buffer(b"".join(at.to_bytes(4, "little") for at in (0, 2)))
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    file = tmp_path / "data.arrow"
    batch = pa.record_batch([text, pa.array(["a"])], names=["prompt", "response"])
    with pa.ipc.new_stream(str(file), batch.schema) as writer:
        writer.write_batch(batch)
    reason = refusal(file)
    assert str(file) in reason
    assert "UTF8" in reason


def test_images_of_a_saved_data_set_stay_undecoded(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = [{"prompt": "x", "image": {"bytes": b"no picture", "path": None}}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert values(tmp_path / "saved") == [{"prompt": "x", "image": {"bytes": b"no picture"}}]


def test_a_split_of_a_saved_dictionary_is_read_and_a_missing_one_refused(tmp_path: Path) -> None:
    splits = {"train": ROWS[:5], "test": ROWS[5:]}
    folder = tmp_path / "saved"
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    ).save_to_disk(str(folder))
    assert values(folder) == ROWS[:5]
    assert values(folder, split="test") == ROWS[5:]
    assert read(folder, split="test")[0].origin == "saved[test]:1"
    assert re.search(r"'dev', found train, test\b.* data\.split ", refusal(folder, split="dev"))


def test_an_index_of_llama_factory_names_the_files_that_are_there(tmp_path: Path) -> None:
    index = {
        "chat": {"file_name": "chat.json", "formatting": "sharegpt"},
        "gone": {"file_name": "gone.json"},
        "hub": {"hf_hub_url": "a/b"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(index))
    assert "gone.json" not in refusal(tmp_path), "a file that is missing is offered"
    (tmp_path / "chat.json").write_text(json.dumps(ROWS))
    message = refusal(tmp_path)
    assert ": chat: chat.json. " in message, "the file that is missing is not offered"
    assert f"data.source={tmp_path / 'chat.json'}" in message
    assert values(tmp_path / "chat.json") == ROWS


def test_a_file_of_another_type_beside_data_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "b.jsonl.zst").write_bytes(b"x")
    assert values(tmp_path) == ROWS[:1]
    assert f"{tmp_path / 'b.jsonl.zst'}: " in caplog.text
    assert "zstd -d" in caplog.text


CONVERSIONS = {
    "a.ndjson": "a.jsonl",
    "a.jsonl.zst": "zstd -d ",
    "a.xlsx": "CSV",
    "a.tar.gz": "Unpack",
    "a.zip": "Unpack",
    "a.feather": "pandas.read_feather('",
    "a.txt": '{"prompt": ..., "response": ...}',
    "a.xml": "Convert",
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_file_of_another_type_says_how_to_convert_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    message = refusal(tmp_path / name)
    assert re.search(rf"{re.escape(str(tmp_path / name))}: .*\.jsonl, .*\.parquet", message)
    assert CONVERSIONS[name] in message


# Addresses

ADDRESSES = {  # and what to run or to set instead
    "hf://datasets/org/name": ("data.source=org/name.",),
    "hf://datasets/org/name@v1/data/a.parquet": (
        "data.source=org/name data.revision=v1, ",
        "hf download org/name data/a.parquet --repo-type dataset --revision v1 --local-dir .",
        "data.source=./data/a.parquet.",
    ),
    "https://huggingface.co/datasets/org/name/viewer/main/train": ("data.source=org/name.",),
    "https://huggingface.co/datasets/org/name/resolve/main/a.jsonl": (
        "hf download org/name a.jsonl",
    ),
    "https://host.org/a.jsonl?raw=1": (
        "curl -L -o a.jsonl 'https://host.org/a.jsonl?raw=1'",
        "data.source=./a.jsonl",
    ),
    "s3://bucket/a.jsonl": ("aws s3 cp s3://bucket/a.jsonl a.jsonl", "data.source=./a.jsonl"),
    "s3://bucket/rows/": ("aws s3 cp s3://bucket/rows/ rows --recursive", "data.source=./rows"),
    "gs://bucket/a.csv": ("gcloud storage cp gs://bucket/a.csv a.csv",),
    "file:///data/a%20b.csv": ("data.source=/data/a b.csv.",),
    "abfs://c@a/x.jsonl": ("mount",),
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_answered_with_what_to_do(address: str) -> None:
    message = refusal(address)
    assert message.startswith(f"data.source: {address}: ")
    assert all(command in message for command in ADDRESSES[address]), message
    assert not is_path(address)


# Several data sets


def test_a_message_names_the_key_of_the_mixture_or_the_validation(tmp_path: Path) -> None:
    here = tmp_path / "here.jsonl"
    here.write_text(json.dumps(ROWS[0]))

    def message(**data: Any) -> str:
        with pytest.raises(UserError) as raised:
            open_sources(DataConfig.model_validate(data))
        return str(raised.value)

    gone = str(tmp_path / "gone.jsonl")
    assert message(mixture=[{"source": str(here)}, {"source": gone}]).startswith(
        f"data.mixture.1: {gone}: "
    )
    assert message(source=str(here), validation=gone).startswith(f"data.validation: {gone}: ")
    assert message(source=str(here), validation="s3://b/x").startswith("data.validation: s3://b/x")
    assert message(source=str(here), validation="test").startswith("data.validation: ")
    assert "'test'" in message(source=str(here), validation="test")


def test_the_validation_is_read_first_and_rows_know_their_data_set(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "response": name}))
    opened = open_sources(
        DataConfig.model_validate(
            {
                "mixture": [
                    {"source": str(tmp_path / "a.jsonl"), "weight": 2, "format": "columns"},
                    {"source": str(tmp_path / "b.jsonl")},
                ],
                "validation": str(tmp_path / "c.jsonl"),
            }
        )
    )
    assert [(each.held_out, each.weight) for each in opened] == [(True, 0), (False, 2), (False, 1)]
    assert [each.config.format for each in opened] == ["auto", "columns", "auto"]
    rows: list[Row] = [
        row for index, each in enumerate(opened) for row in each.source.rows(source=index)
    ]
    assert [(row.origin, row.source) for row in rows] == [
        ("c.jsonl:1", 0),
        ("a.jsonl:1", 1),
        ("b.jsonl:1", 2),
    ]


def test_a_folder_in_the_hubs_layout_is_read_again_after_a_change_that_kept_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tar`, `rsync -t` and container layers keep it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.with_name("cache"))
    front = "---\nconfigs:\n- config_name: default\n  data_files: rows.jsonl\n---\n"
    (tmp_path / "README.md").write_text(front)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert values(tmp_path) == ROWS[:3]
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[3:]))
    os.utime(file, ns=times)
    assert values(tmp_path) == ROWS[3:]

"""Claims about reading a user's rows: every kind of file, where a row came from, and the error for
a broken file.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from canvastune.config.data import DataConfig
from canvastune.errors import UserError
from canvastune.preparation.json_document import ReadLimits
from canvastune.preparation.readers import Row
from canvastune.preparation.sources import open_source

ROWS = [{"question": f"q{n} é\n", "answer": f'a{n} "{n}" 漢 }}]'} for n in range(600)]


def read(source: Path | str, limits: ReadLimits | None = None, **data: Any) -> list[Row]:
    return list(open_source(DataConfig(source=str(source), **data)).rows(limits or ReadLimits()))


def refusal(source: Path | str, limits: ReadLimits | None = None, **data: Any) -> str:
    with pytest.raises(UserError) as raised:
        read(source, limits, **data)
    return f"{raised.value}. {raised.value.hint}"


def as_bytes(kind: str, values: list[Any]) -> bytes:
    """The content of a data file of this kind; `.gz` kinds are compressed."""
    if kind.endswith(".gz"):
        return gzip.compress(as_bytes(kind.removesuffix(".gz"), values))
    if kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(values), buffer, row_group_size=100)
        return buffer.getvalue()
    if kind == "json":
        return json.dumps(values, indent=1, ensure_ascii=False).encode()
    return "".join(json.dumps(value) + "\n" for value in values).encode()


KINDS = ["jsonl", "json", "parquet", "jsonl.gz", "json.gz", "parquet.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.{kind}"
    file.write_bytes(as_bytes(kind, ROWS))
    found = read(file)
    assert [row.value for row in found] == ROWS
    assert [row.origin for row in found] == [f"data.{kind}:{n}" for n in range(1, 601)]
    assert {row.file for row in found} == {str(file)}


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "deep/a.parquet", "a.json.gz"):
        (tmp_path / name).write_bytes(as_bytes(name.split(".", 1)[1], [{"name": name}]))
    for other in (".hidden.jsonl", "README.md", "notes.txt"):
        (tmp_path / other).write_text("not data")
    assert [(row.origin, row.value["name"]) for row in read(tmp_path)] == [
        ("a.json.gz:1", "a.json.gz"),
        ("b.jsonl:1", "b.jsonl"),
        ("deep/a.parquet:1", "deep/a.parquet"),
    ]


def test_a_folder_that_mixes_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    for name in ("main/train-00000.jsonl", "main/test-00000.jsonl"):
        (tmp_path / name).write_bytes(as_bytes("jsonl", ROWS[:2]))
    assert "(main/train-00000.jsonl, main/test-00000.jsonl)" in refusal(tmp_path)


def test_a_row_of_json_lines_is_numbered_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n   \r\n{"a": 2}\r\n{"a": 3}')
    assert [(row.number, row.value) for row in read(file)] == [
        (1, {"a": 1}),
        (4, {"a": 2}),
        (5, {"a": 3}),
    ]


def test_a_broken_line_is_a_row_with_a_problem_and_the_next_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    deep = b"[" * 100_000
    file.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + deep + b'\n{"a": 5}\n')
    found = {row.number: row for row in read(file)}
    assert [found[n].problem is None for n in range(1, 6)] == [True, False, False, False, True]
    assert re.match(r"not JSON\b.* line 2 column 1 \(char 7\)$", str(found[2].problem))
    assert re.match(r"not UTF-8\b.* 0xff .*\b8\b", str(found[3].problem))
    assert re.match(r"not JSON\b.* nested\b", str(found[4].problem))
    assert found[5].value == {"a": 5}


def cut(data: bytes) -> bytes:
    return data[: len(data) * 3 // 4]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", r"a\.jsonl: .*\(0 bytes\)"),
    "blank": ("a.jsonl", b"\n \n", r"a\.jsonl: .*\bno rows\b"),
    "empty array": ("a.json", b" [ ] ", r"a\.json: .*\bno rows\b"),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz: .*\bno rows\b"),
    "not gzip": (
        "a.jsonl.gz",
        b'{"a": 1}\n',
        r"a\.jsonl\.gz: .*\bgzip\b.*b'\{\"'",
    ),
    "hidden gzip": (
        "a.jsonl",
        gzip.compress(b"{}"),
        r"a\.jsonl: .*\bgzip\b.* \.gz\b.* a\.jsonl\.gz\.$",
    ),
    "truncated gzip": (
        "a.jsonl.gz",
        gzip.compress(as_bytes("jsonl", ROWS))[:-9],
        r"a\.jsonl\.gz: .*\bgzip\b.*\bend-of-stream marker\b",
    ),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(b"{}\n" * 9)[:-8] + b"damaged!",
        r"a\.jsonl\.gz: after row 9: .*\bgzip\b.*\bCRC\b",
    ),
    "UTF-16": (
        "a.jsonl",
        '{"a": 1}'.encode("utf-16"),
        r"a\.jsonl: row 1: .*\bUTF-16, expected UTF-8\b",
    ),
    "array not UTF-8": (
        "a.json",
        b'[{"a": "\xff"}]',
        r"a\.json: after row 0: not UTF-8 ",
    ),
    "array of lines": (
        "a.json",
        b'{"a": 1}\n{"a": 2}\n',
        r"a\.json: .*\barray\b.*, found an object\b.* \.jsonl\b",
    ),
    "array of nothing": (
        "a.json",
        b"   ",
        r"a\.json: .*\barray\b.*, found nothing\b",
    ),
    "array broken": (
        "a.json",
        b'[{"a": 1}, {"a": 2}, {"a" 3}]',
        r"a\.json: row 3: not JSON .*':'",
    ),
    "array truncated": (
        "a.json",
        cut(as_bytes("json", ROWS[:2])),
        r"a\.json: row 2: not JSON ",
    ),
    "array not closed": (
        "a.json",
        b'[{"a": 1}',
        r"a\.json: after row 1: .*',' or '\]', .*\bends\b",
    ),
    "array without comma": (
        "a.json",
        b'[{"a": 1} {"a": 2}]',
        r"a\.json: after row 1: .*',' or '\]', found '\{'",
    ),
    "array too deep": ("a.json", b"[" * 100_000, r"a\.json: row 1: not JSON .*\bnested\b"),
    "no Parquet": (
        "a.parquet",
        b'{"a": 1}\n' * 9,
        r"a\.parquet: .*\bParquet\b.*\bfooter\b",
    ),
    "truncated Parquet": (
        "a.parquet",
        cut(as_bytes("parquet", ROWS)),
        r"a\.parquet: .*\bParquet\b.*\bmagic bytes\b",
    ),
    "gzip of no Parquet": (
        "a.parquet.gz",
        gzip.compress(b"hello, hello"),
        r"a\.parquet\.gz: .*\bParquet\b",
    ),
    "empty Parquet": ("a.parquet", as_bytes("parquet", []), r"a\.parquet: .*\bno rows\b"),
    "unknown kind": (
        "a.txt",
        b"a,b\n",
        r"a\.txt: .* \.jsonl, \.json, \.csv, \.tsv, \.parquet\b",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_reason_and_remedy(name: str, tmp_path: Path) -> None:
    file_name, data, message = BROKEN[name]
    (tmp_path / file_name).write_bytes(data)
    answer = refusal(tmp_path / file_name)
    assert str(tmp_path / file_name) in answer
    assert re.search(message, answer)


def test_damage_inside_a_parquet_file_names_the_row_reached(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    data = bytearray(as_bytes("parquet", ROWS))
    where = len(data) // 2
    data[where : where + 200] = b"\xee" * 200
    file.write_bytes(bytes(data))
    assert f"{file}: after row " in refusal(file)


def test_a_missing_file_is_told_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    missing = tmp_path / "trian.jsonl"
    message = refusal(missing)
    assert message.startswith(f"data.source: {missing}: ")
    assert message.endswith(f" {tmp_path / 'train.jsonl'}?"), "a name like it is suggested"
    assert refusal("nowhere/at/all.jsonl").startswith("data.source: nowhere/at/all.jsonl: ")


def test_a_folder_without_data_is_told_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    message = refusal(tmp_path)
    assert f"data.source: {tmp_path}: " in message
    assert re.search(r"\bnotes\.txt, .* \.jsonl\b", message)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64])
def test_an_array_is_read_through_a_window_of_any_size(window: int, tmp_path: Path) -> None:
    values = [
        {"a": 1},
        12345,
        'text \\" ]',
        [],
        {"b": [1, {"c": "\u2028,]"}]},
        None,
        -1.5e10,
        True,
        {},
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(values) + "\n\n")
    assert [row.value for row in read(file, ReadLimits(window=window))] == values


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_row_that_never_ends_is_not_read_into_memory(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.{kind}"
    file.write_text(('[{"a": 1}, ' if kind == "json" else '{"a": 1}\n') + '{"a": "' + "x" * 2**22)
    message = refusal(file, ReadLimits(row=2**20))
    assert f"{file}: row 2: " in message
    assert " 1 MiB" in message


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    text = "abcdefgh" * 128
    file = tmp_path / f"data.{kind}"
    file.write_bytes(
        as_bytes(kind, [{"question": f"{n}{text}", "answer": "a"} for n in range(8_000)])
    )
    source = open_source(DataConfig(source=str(file)))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow = max(pa.total_allocated_bytes() - before for _ in source.rows())
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python + arrow < 4 * 2**20, (
        f"{(python + arrow) / 2**20:.1f} MiB held while reading a file of 8 MiB"
    )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set repository in the Hub's layout: two configurations with two splits each. Its cache
    is in tmp_path too.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    configs = []
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"question": f"{config} {split} {n}", "answer": "a"} for n in range(3)]
            (folder / config / f"{split}-00000-of-00001.parquet").write_bytes(
                as_bytes("parquet", rows)
            )
        configs.append(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - split: {split}\n    path: {config}/{split}-*.parquet\n"
                for split in ("train", "test")
            )
        )
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n" + "".join(configs) + "---\n# A data set\n"
    )
    return folder


def test_a_repository_in_the_hubs_layout_is_read_by_config_and_split(repository: Path) -> None:
    found = read(repository, config="socratic", split="test")
    assert [row.value["question"] for row in found] == [
        "socratic test 0",
        "socratic test 1",
        "socratic test 2",
    ]
    assert found[2].origin == f"{repository}[test]:3"


def test_a_config_or_split_that_is_not_there_is_answered_with_those_that_are(
    repository: Path,
) -> None:
    for message in (refusal(repository), refusal(repository, config="mian")):
        assert "main" in message
        assert "socratic" in message
        assert re.search(r"data\.config .*data\.split \(now 'train'\)", message)
    message = refusal(repository, config="main", split="dev")
    assert "train" in message
    assert "test" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            r".*\bnot found\b.* v1\b",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            r".*\(Couldn't reach 'a/b' on the Hub\)",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            r".*\bscript\b",
        ),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hub is reachable from a test: the library's answers are played back."""

    def answer(
        location: str,
        *,
        name: str | None,
        split: str,
        revision: str | None,
        cache_dir: str | None,
    ) -> None:
        assert cache_dir is not None
        assert Path(cache_dir).name == "revision-v1", "the library's cache is of any revision"
        assert (location, name, split, revision) == (
            "a/b",
            "main",
            "train",
            "v1",
        ), "the recipe's words do not reach the Hub"
        raise error

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert re.match(
        rf"data\.source: a/b \(config main\): {message}",
        refusal("a/b", config="main", revision="v1"),
    )


def test_rows_from_the_hub_say_where_they_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[..., datasets.Dataset] = lambda *_, **__: datasets.Dataset.from_list(ROWS)  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read("openai/gsm8k", config="main")
    assert [row.value for row in found] == ROWS
    assert found[11].origin == "openai/gsm8k[train]:12"

"""Whatever a file holds, reading it ends in rows, a config, or one UserError: no other exception
gets out.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from canvastune.config import RunConfig, load_config, parse_config, write_config
from canvastune.config.data import DataConfig
from canvastune.errors import UserError
from canvastune.preparation.conversation import InvalidRow
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.readers import Row
from canvastune.preparation.row_formats import RowFormat, RowReader
from canvastune.preparation.sources import open_source
from tests.support.data_fixtures import SPECIAL, make_model, problems, run_config, write_lines

FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same inputs on every machine
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TREES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "user", "assistant", "model", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": ROLES | TREES, "content": st.text(max_size=12) | TREES}
    ),
    max_size=4,
)
ROWS = st.dictionaries(
    st.sampled_from(["question", "answer", "prompt", "response", "messages"]), TREES | MESSAGES
)
VALID = [{"question": f"What is {n} + {n}? é", "answer": f'"{n}" #### {2 * n}'} for n in range(20)]
RECIPE = (Path(__file__).parents[2] / "pipelines" / "recipes" / "tiny_lora.yaml").read_text(
    encoding="utf-8"
)


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(VALID), buffer, row_group_size=5)
    return buffer.getvalue()


JSON = json.dumps(VALID).encode()
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in VALID)


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, VALID[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(VALID)
    return text.getvalue().encode()


def arrow() -> bytes:
    buffer = io.BytesIO()
    whole = pa.Table.from_pylist(VALID)
    with pa.ipc.new_file(buffer, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=5)
    return buffer.getvalue()


WHOLE = {
    "csv": table(","),
    "tsv.gz": gzip.compress(table("\t"), mtime=0),
    "arrow": arrow(),
    "columns.json": json.dumps({key: [row[key] for row in VALID] for key in VALID[0]}).encode(),
    "wrapped.json": json.dumps({"data": VALID}).encode(),
    "jsonl": LINES,
    "json": JSON,
    "parquet": parquet(),
    "jsonl.gz": gzip.compress(LINES, mtime=0),
    "json.gz": gzip.compress(JSON, mtime=0),
    "parquet.gz": gzip.compress(parquet(), mtime=0),
}
KINDS = pytest.mark.parametrize("kind", WHOLE)


def read(folder: Path, kind: str, data: bytes) -> list[Row] | None:
    """The rows of a file with this content; None if it is refused with an error that names the file."""
    file = folder / f"data.{kind}"
    file.write_bytes(data)
    rows, refusal = None, ""
    try:
        rows = list(open_source(DataConfig(source=str(file))).rows())
    except UserError as error:
        refusal = str(error)
    assert rows or str(file) in refusal, (
        f"a file without a row was taken, or is not named: {refusal}"
    )
    return rows


CONFIG = DataConfig(source="x", learn="all")


def conversation(value: Any, form: RowFormat) -> None:
    """Read a row as a conversation, with an answer and an id, or learn why it is none."""
    try:
        _, examples = RowReader(form, CONFIG, CONFIG).read(value)
    except InvalidRow:
        return
    for example in examples:
        learned = example.messages[-1]
        assert learned["role"] == "assistant"
        assert learned["content"].strip() or learned["tool_calls"]
        assert example.id


@st.composite
def damage(draw: st.DrawFn, whole: bytes) -> bytes:
    """The content with some bytes changed, taken out, repeated, or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["change", "insert", "remove", "cut"]))
        piece = draw(st.binary(min_size=1, max_size=8))
        if what == "change":
            data[at : at + len(piece)] = piece
        elif what == "insert":
            data[at:at] = piece
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            del data[at:]
    return bytes(data)


@KINDS
def test_the_undamaged_file_is_read(kind: str, tmp_path: Path) -> None:
    assert [row.value for row in read(tmp_path, kind, WHOLE[kind]) or []] == VALID


@KINDS
@FAST
@given(data=st.binary(max_size=200))
def test_random_bytes_are_rows_or_refused(kind: str, data: bytes, tmp_path: Path) -> None:
    read(tmp_path, kind, data)


@KINDS
@FAST
@given(data=st.data())
def test_a_damaged_file_gives_rows_or_is_refused(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    for row in read(tmp_path, kind, data.draw(damage(WHOLE[kind]))) or []:
        if row.problem is None:
            conversation(row.value, "gsm8k")


@pytest.mark.parametrize("kind", ["parquet.gz", "jsonl.gz"])
@FAST
@given(data=st.data())
def test_a_damaged_file_inside_sound_gzip_gives_rows_or_is_refused(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    read(tmp_path, kind, gzip.compress(data.draw(damage(WHOLE[kind.removesuffix(".gz")])), mtime=0))


@pytest.mark.parametrize(
    "form", ["messages", "sharegpt", "prompt_completion", "alpaca", "gsm8k", "columns"]
)
@settings(FAST, max_examples=150)
@given(value=ROWS | TREES)
def test_any_json_is_a_conversation_or_a_bad_row(form: RowFormat, value: Any) -> None:
    conversation(value, form)


@FAST
@given(values=st.lists(ROWS | TREES, min_size=1, max_size=5))
def test_json_and_json_lines_give_the_same_rows(values: list[Any], tmp_path: Path) -> None:
    lines = read(
        tmp_path, "jsonl", b"".join(json.dumps(value).encode() + b"\n" for value in values)
    )
    array = read(tmp_path, "json", json.dumps(values, indent=1).encode())
    assert repr([row.value for row in lines or []]) == repr([row.value for row in array or []])


MARKERS = [*SPECIAL, "<eos>", "<bos>", "<pad>", "<mask>"]
PIECES = st.sampled_from(
    [
        *MARKERS,
        "<|turn>model\n",
        "<turn|>\n<|turn>user\n",
        "<",
        "|",
        "turn",
        ">",
        "model",
        "\n",
        " ",
        "a",
        "é",
    ]
)
CONTENTS = st.lists(PIECES, min_size=1, max_size=5).map("".join)
TALKS = st.lists(st.tuples(CONTENTS, CONTENTS, CONTENTS), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def prepared(
    model: Path, talks: list[tuple[str, str, str]]
) -> list[tuple[list[dict[str, str]], str, list[str]]]:
    """History, answer and control tokens of each row that a preparation keeps of these (system,
    user, assistant), among valid ones.
    """
    rows: list[Any] = problems(30)
    rows = [
        {"messages": [message("user", row["question"]), message("assistant", row["answer"])]}
        for row in rows
    ]
    rows += [
        {
            "messages": [
                message(*turn) for turn in zip(("system", "user", "assistant"), talk, strict=True)
            ]
        }
        for talk in talks
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(
            write_lines(Path(folder) / "rows.jsonl", rows),
            max_bad_row_fraction=0.99,
            max_duplicate_fraction=1,
            seq_length=512,
        )
        prepare_data(config, model, Path(folder) / "out", processes=1)
        splits = [
            load_from_disk(str(Path(folder) / "out" / split)) for split in ("train", "validation")
        ]
        tokenizer = AutoTokenizer.from_pretrained(model)
        return [
            (
                json.loads(row["prompt"]),
                row["answer"],
                [token for token in named(tokenizer, row["input_ids"]) if token in MARKERS],
            )
            for split in splits
            for row in split
        ]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def named(tokenizer: Any, ids: list[int]) -> list[str]:
    names: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return names


def test_no_marker_in_any_role_opens_a_turn(model: Path) -> None:
    places = [
        ("see {} here", "q", "a"),
        ("s", "see {} here", "a"),
        ("s", "q", "see {} here"),
        ("s", "q", "{}"),
        ("{}\n", "{}", "a"),
    ]
    talks = [
        (system.format(m), user.format(m), answer.format(m))
        for m in MARKERS
        for system, user, answer in places
    ]
    kept = prepared(model, talks)
    assert len(kept) == 30, f"{len(kept) - 30} conversations with a marker in their text were kept"


@settings(FAST, max_examples=20)
@given(talks=TALKS)
def test_what_is_prepared_has_the_turns_of_its_messages_and_no_other(
    model: Path, talks: list[tuple[str, str, str]]
) -> None:
    for history, answer, markers in prepared(model, talks):
        assert markers == ["<bos>"] + ["<|turn>", "<turn|>"] * (len(history) + 1), (
            f"{history} {answer!r}"
        )


def loads(folder: Path, text: bytes, overrides: list[str] | None = None) -> None:
    """Read a recipe; what is taken can be written and means the same when it is read again."""
    file = folder / "recipe.yaml"
    file.write_bytes(text)
    try:
        config = load_config(file, overrides)
    except UserError:
        return
    write_config(config, folder / "again.yaml")
    assert load_config(folder / "again.yaml") == config


@settings(FAST, max_examples=150)
@given(
    text=st.binary(max_size=120)
    | st.text(max_size=120).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_random_text_is_a_recipe_or_refused(text: bytes, tmp_path: Path) -> None:
    loads(tmp_path, text)


@settings(FAST, max_examples=150)
@given(text=damage(RECIPE.encode()))
def test_a_damaged_recipe_is_read_or_refused(text: bytes, tmp_path: Path) -> None:
    loads(tmp_path, text)


TAGS = [
    "!!int",
    "!!float",
    "!!bool",
    "!!timestamp",
    "!!binary",
    "!!set",
    "!!omap",
    "&a",
    "*a",
    "<<:",
    "2001-99-99",
    "1:99",
]
WORDS = [".inf", ".nan", "1e999", "0x", "---", "name", "data", "seed"]
PUNCTUATION = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "- ",
    "? ",
    "|",
    ">",
    "'",
    '"',
    "#",
    "\t",
    "\n",
    " ",
    "=",
    "%",
    "9" * 5000,
]


@settings(FAST, max_examples=200)
@given(pieces=st.lists(st.sampled_from([*TAGS, *WORDS, *PUNCTUATION]), max_size=8))
def test_the_odd_corners_of_yaml_are_values_or_refused(pieces: list[str], tmp_path: Path) -> None:
    for glue in ("", " "):
        loads(tmp_path, RECIPE.encode(), [f"seed={glue.join(pieces)}"])
        loads(tmp_path, f"{RECIPE}\n{glue.join(pieces)}".encode())


@settings(FAST, max_examples=150)
@given(
    override=st.text(max_size=30)
    | st.builds(
        "{}={}".format, st.sampled_from(["lora", "lora.rank", "train.steps", "name"]), st.text()
    )
)
def test_any_override_is_applied_or_refused(override: str, tmp_path: Path) -> None:
    loads(tmp_path, RECIPE.encode(), [override])


@settings(FAST, max_examples=150)
@given(
    tree=st.dictionaries(
        st.sampled_from(list(RunConfig.model_fields)) | st.text(max_size=5), TREES, max_size=4
    )
)
def test_any_tree_is_a_config_or_refused(tree: dict[str, Any]) -> None:
    base = {"name": "fuzz", "data": {"source": "x"}}
    for form in ({**base, **tree}, json.dumps({**base, **tree})):
        with contextlib.suppress(UserError):
            parse_config(form)

"""A wrong base, data or checkpoint ends a training command in one message; no file changes."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from canvastune.checkpoint.hf_format import INDEX
from canvastune.train import main
from tests.support.data_fixtures import problems, write_lines
from tests.support.training import make_ground

SHARD = "model-00002-of-00003.safetensors"
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}  # as torchrun says it
LAST = "out/checkpoints/step-000002"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process that torchrun starts; signals are this process's own again afterwards."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(ground: Path, *settings: str) -> list[str]:
    few = (
        "train.steps=2",
        "train.checkpoint_every=1",
        "train.validate_every=2",
        "parallel.ep=1",
        "train.async_checkpoints=false",
    )
    changed = [part for each in ("model.id=./base", *few, *settings) for part in ("--set", each)]
    return [
        "-c",
        str(ground / "recipe.yaml"),
        "--data",
        str(ground / "data"),
        "--output",
        str(ground / "out"),
        *changed,
    ]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, a recipe and an unfinished run with two checkpoints; read-only."""
    ground = make_ground(tmp_path_factory.mktemp("begun"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        patch.chdir(ground)
        assert main(command(ground)) == 0
    (ground / "out" / "result.json").rename(ground / "result.json")
    return ground


@pytest.fixture
def ground(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(
        tmp_path
    )  # the recipe names the base from here: the copied run is the same run
    return tmp_path


def cut(name: str, to: int = 100) -> Callable[[Path], object]:
    return lambda ground: (ground / name).write_bytes((ground / name).read_bytes()[:to])


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda ground: (ground / name).write_bytes(content)


def gone(name: str) -> Callable[[Path], object]:
    return lambda ground: (
        shutil.rmtree(ground / name) if (ground / name).is_dir() else (ground / name).unlink()
    )


def several(*breaks: Callable[[Path], object]) -> Callable[[Path], object]:
    """Break several things, in this order."""
    return lambda ground: [each(ground) for each in breaks]


def fresh(*breaks: Callable[[Path], object]) -> Callable[[Path], object]:
    """Break these things where no run was started."""
    return several(gone("out"), *breaks)


def pickled(ground: Path) -> None:
    for file in [*(ground / "base").glob("*.safetensors"), ground / "base" / INDEX]:
        file.unlink()
    (ground / "base" / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def flipped(ground: Path) -> None:
    """One bit of every file of both checkpoints is another."""
    for file in (ground / "out" / "checkpoints").glob("step-*/*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))


def truncated(ground: Path) -> None:
    for file in (ground / "out" / "checkpoints").glob("step-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])


def unmarked(ground: Path) -> None:
    for file in (ground / "out" / "checkpoints").glob("step-*/complete.json"):
        file.write_text("{")


def other_data(ground: Path) -> None:
    shutil.rmtree(ground / "data" / "validation")
    shutil.copytree(ground / "data" / "train", ground / "data" / "validation")


def finished(ground: Path) -> None:
    (ground / "result.json").rename(ground / "out" / "result.json")


def other_architecture(ground: Path) -> None:
    config = ground / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))


Case = tuple[
    Callable[[Path], object], tuple[str, ...], tuple[str, ...]
]  # what is broken, further settings, what the message names
CASES: dict[str, Case] = {
    "a shard that is missing": (fresh(gone(f"base/{SHARD}")), (), (SHARD, "missing", INDEX)),
    "a shard that was cut": (fresh(cut(f"base/{SHARD}", 9_000)), (), (SHARD, "9000 bytes")),
    "an empty shard": (fresh(cut(f"base/{SHARD}", 0)), (), (SHARD, "0 bytes")),
    "a pickle named safetensors": (
        fresh(written(f"base/{SHARD}", pickle.dumps({"weight": [1] * 99}))),
        (),
        (SHARD,),
    ),
    "pickled weights": (fresh(pickled), (), ("base", "pytorch_model.bin")),
    "an index that was cut": (fresh(cut(f"base/{INDEX}")), (), (INDEX, "JSONDecodeError")),
    "weights that are not there": (fresh(gone("base")), (), ("model.id", "./base")),
    "a base without its config": (
        fresh(gone("base/config.json")),
        (),
        ("model.id", "base", "config.json"),
    ),
    "another architecture": (
        fresh(other_architecture),
        (),
        ("config.json", "'llama'", "expected 'diffusion_gemma'"),
    ),
    "data that were not prepared": (
        fresh(gone("data/train/dataset_info.json")),
        (),
        ("data/train",),
    ),
    "ranks that do not divide": (fresh(), ("parallel.ep=3",), ("parallel.ep: ", "3")),
    "a batch that does not divide": (
        fresh(),
        ("train.micro_batch_size=3",),
        ("train.global_batch_size: ", "8"),
    ),
    "a file in the output's place": (fresh(written("out", b"mine")), (), ("out: ",)),
    "checkpoints of another seed": (
        lambda _: None,
        ("seed=7",),
        (LAST, "seed ", " 42 ", " 7", "--output"),
    ),
    "checkpoints of other data": (
        other_data,
        (),
        (LAST, "data ", "--output"),
    ),
    "a finished run of another recipe": (
        finished,
        ("optimizer.lr=0.02", "train.log_every=1"),
        ("out: ", "finished", "optimizer.lr ", " 0.01 ", " 0.02", "--output"),
    ),
    "a finished run of other data": (
        several(finished, other_data),
        (),
        ("out: ", "finished", "data ", "--output"),
    ),
    "a finished run without checkpoints of other data": (
        several(finished, gone("out/checkpoints"), other_data),
        (),
        ("out: ", "finished", "data ", "--output"),
    ),
    "a finished run without checkpoints of another method": (
        several(finished, gone("out/checkpoints")),
        ("train.method=full",),
        ("out: ", "finished", "train.method ", "'lora'", "'full'", "--output"),
    ),
    "missing data": (gone("data/validation"), (), ("data/validation",)),
    "checkpoints with a bit flipped": (
        flipped,
        (),
        (LAST, "SHA-256", "--output"),
    ),
    "checkpoints that were cut": (truncated, (), (LAST, "bytes", "expected", "--output")),
    "checkpoints whose markers were cut": (
        unmarked,
        (),
        (LAST, "marker", "--output"),
    ),
}


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every file by its name, but not of the lock."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_the_unbroken_run_goes_on(ground: Path) -> None:
    assert main(command(ground)) == 0, "what the cases break was broken before"


@pytest.mark.parametrize("kept", ["checkpoints", "config.yaml"])
def test_a_finished_run_answers_the_same_recipe_and_data_only(
    kept: str, ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(ground)
    if kept == "config.yaml":
        shutil.rmtree(ground / "out" / "checkpoints")
    shutil.copytree(ground / "data", ground / "moved")
    before = content(ground)
    moved = [
        part if part != str(ground / "data") else str(ground / "moved") for part in command(ground)
    ]
    for line in (
        command(ground),
        command(ground, "evaluate.rows=3", "parallel.nproc_per_node=1"),
        moved,
    ):
        assert main(line) == 0
        assert "already finished" in capsys.readouterr().err
    assert main(command(ground, "train.export=last")) == 0
    assert re.search(r"already finished: .*\([^)]*: train\.export\)", capsys.readouterr().err)
    assert content(ground) == before


def test_data_prepared_below_the_output_belong_to_their_recipe_and_rows(
    ground: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ground / "tiny").symlink_to(tiny_model)
    write_lines(ground / "rows.jsonl", problems(40))
    settings = (
        "model.id=./tiny",
        "data.source=rows.jsonl",
        "data.seq_length=96",
        "data.validation_fraction=0.2",
        "train.global_batch_size=2",
    )

    def run(*more: str) -> tuple[int, str]:
        line = command(ground, *settings, *more)
        at = line.index("--data")
        code = main([*line[:at], *line[at + 2 :]])
        return code, capsys.readouterr().err

    shutil.rmtree(ground / "out")
    assert run()[0] == 0
    before = content(ground / "out")
    assert "already finished" in run()[1]
    code, said = run("data.seq_length=64")
    assert code == 1
    assert re.search(r"data\.seq_length\b.* 96 .* 64\b", said), said
    write_lines(ground / "rows.jsonl", problems(41))
    code, said = run()
    assert code == 1
    assert re.search(r"\bcontent\b.* rows\.jsonl\b", said), said
    (ground / "out" / "result.json").rename(ground / "result.json")  # the same of an unfinished run
    code, said = run()
    assert code == 1
    assert re.search(r"\bcontent\b.* rows\.jsonl\b", said), said
    (ground / "result.json").rename(ground / "out" / "result.json")
    shutil.rmtree(ground / "out" / "data")  # to free disk space
    code, said = run()
    assert (code, "already finished" in said) == (0, True), said
    assert {
        name: digest for name, digest in before.items() if not name.startswith("data/")
    } == content(ground / "out")


@pytest.mark.parametrize("case", CASES)
def test_training_refuses_in_one_message_and_keeps_what_is_there(
    case: str, ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, settings, words = CASES[case]
    spoil(ground)
    before = content(ground)
    assert main(command(ground, *settings)) == 1
    last = capsys.readouterr().err.rpartition("canvastune: error: ")[2]
    message, _, hint = last.partition("\n  hint: ")
    assert message.count("\n") + hint.count("\n") == 1, last
    assert "Traceback" not in last
    for word in words:
        assert word in last, f"the message does not name {word!r}: {last}"
    assert content(ground) == before, "something was left behind, or lost"

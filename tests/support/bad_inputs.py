"""Ways to spoil the input of a preparation, one thing at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main
from tests.support.data_fixtures import make_tokenizer, problems
from tests.unit.test_data_rows import as_bytes

GOOD = problems(40)
LINES = as_bytes("jsonl", GOOD)


@dataclass
class Ground:
    """A folder with everything a preparation needs, all of it sound: a case breaks one thing."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def write(self, **changed: Any) -> None:
        """The recipe with these keys at the top, or with `data_...` in its section `data`."""
        data = {"source": str(self.folder / "data.jsonl"), "validation_fraction": 0.2}
        data |= {
            key.removeprefix("data_"): value
            for key, value in changed.items()
            if key.startswith("data_")
        }
        tree = {"name": "bad", "model": {"id": str(self.model)}, "data": data}
        tree |= {key: value for key, value in changed.items() if not key.startswith("data_")}
        self.recipe.write_text(yaml.safe_dump(tree))

    def command(self, *extra: str) -> list[str]:
        return ["prepare", str(self.recipe), "--output", str(self.folder / "out"), *extra]

    def content(self) -> dict[str, str]:
        """Every name below the folder, with the hash of what it holds."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            held = (
                path.read_bytes()
                if path.is_file() and not path.is_symlink()
                else b"a folder or link"
            )
            found[path.relative_to(self.folder).as_posix()] = hashlib.sha256(held).hexdigest()
        return found


Break = Callable[[Ground], object]  # gives a list where the command needs further arguments
# and what the message must say: where, what was found, what to do
Case = tuple[Break, tuple[str, ...]]


def recipe(text: str | bytes) -> Break:
    """The recipe is this text."""
    return lambda ground: ground.recipe.write_bytes(
        text.encode() if isinstance(text, str) else text
    )


def added(text: str) -> Break:
    """This is appended at the recipe's end."""
    return lambda ground: ground.recipe.write_text(ground.recipe.read_text() + text)


def setting(*settings: str) -> Break:
    return lambda ground: [part for each in settings for part in ("--set", each)]


def data(name: str, content: bytes, **config: Any) -> Break:
    """The data are a file of this name and content."""

    def write(ground: Ground) -> None:
        (ground.folder / name).write_bytes(content)
        ground.write(
            data_source=str(ground.folder / name),
            **{f"data_{key}": value for key, value in config.items()},
        )

    return write


def data_folder(*names: str) -> Break:
    """The data are a folder with these files."""

    def write(ground: Ground) -> None:
        (ground.folder / "rows").mkdir()
        for name in names:
            (ground.folder / "rows" / name).write_bytes(LINES)
        ground.write(data_source=str(ground.folder / "rows"))

    return write


def pipe(ground: Ground) -> None:
    """The data are a named pipe, as `mkfifo` makes it; nothing writes to it."""
    os.mkfifo(ground.folder / "rows.jsonl")
    ground.write(data_source=str(ground.folder / "rows.jsonl"))


def unreadable(ground: Ground) -> None:
    """A file that opens and cannot be read, even by an administrator."""
    (ground.folder / "rows.jsonl").symlink_to("/proc/self/mem")
    ground.write(data_source=str(ground.folder / "rows.jsonl"))


def lines(*rows: Any, **config: Any) -> Break:
    return data("rows.jsonl", as_bytes("jsonl", list(rows)), **config)


def talk(*messages: Any) -> Break:
    """One row: a conversation."""
    return lines({"messages": list(messages)})


def said(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def model(edit: Callable[[Path], object]) -> Break:
    """The model's folder is changed."""

    def change(ground: Ground) -> None:
        edit(ground.model)

    return change


def without(*names: str) -> Break:
    """Files of the model are missing."""
    return lambda ground: (
        [(ground.model / name).rename(ground.folder / name) for name in names] and None
    )


def in_json(name: str, **changed: Any) -> Break:
    """Keys of one of the model's JSON files are changed, or taken out (None)."""

    def edit(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | changed
        (folder / name).write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return model(edit)


def output(make: Callable[[Path], object], inside: str = "") -> Break:
    """The output is a place that `make` prepares, or one inside it."""

    def prepare(ground: Ground) -> Path:
        make(ground.folder / "out")
        return ground.folder / "out" / inside

    return prepare


def template(text: str) -> Break:
    return model(lambda folder: (folder / "chat_template.jinja").write_text(text))


def other_tokenizer(folder: Path) -> None:
    make_tokenizer(words=[f"another{n}" for n in range(40)]).save_pretrained(folder)


def folder_as_recipe(ground: Ground) -> None:
    ground.recipe.unlink()
    ground.recipe.mkdir()


def ends_well(
    ground: Ground, command: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one message with these words as the only output, and nothing changed."""
    before = ground.content()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("canvastune: error: "), error
    assert error.count("canvastune: error") == 1
    assert "\n  hint: " in error, "it does not say what to do"
    assert "Traceback" not in error
    assert "site-packages" not in error
    for word in words:
        assert word in error, f"the error lacks {word!r}: {error}"
    assert ground.content() == before, "something was left behind, or lost"

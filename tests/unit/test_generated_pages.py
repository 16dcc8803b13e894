"""The pages and figures of the documentation that tools write show what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import datasets
import pytest
from transformers import AutoTokenizer

from canvastune.config.data import ColumnsConfig, DataConfig
from canvastune.config.loading import loads
from canvastune.preparation import messages, row_formats
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.prepare import prepare_data
from canvastune.tiny_model import make_tiny_model
from tests.support.data_fixtures import TOOL_SPECIAL, make_tokenizer, released_template
from tests.support.documents import (
    ROOT,
    blocks,
    spans,
)
from tools import data_page, method_figure, recipes_page

DOCS = ROOT / "docs"


def test_the_page_of_recipes_matches_the_config() -> None:
    assert recipes_page.PAGE.read_text(encoding="utf-8") == recipes_page.page(), (
        "out of date: run python -m tools.recipes_page"
    )


def test_every_shipped_recipe_is_on_the_page() -> None:
    assert set(recipes_page.RECIPES) == {
        path.stem for path in (ROOT / "pipelines" / "recipes").glob("*.yaml")
    }


def test_the_figure_of_the_method_shows_what_the_page_says(tmp_path: Path) -> None:
    what = method_figure.shown(tmp_path)
    text = " ".join((DOCS / "method.md").read_text(encoding="utf-8").split())
    assert method_figure.caption(what) in text, (
        "the example has changed: run python -m tools.method_figure and copy its last line"
    )
    assert " / ".join((method_figure.QUESTION, *method_figure.ANSWER.split("\n"))) in text
    clean, start = len(what.batch.clean), what.batch.block_starts[0]
    full, sliding = (
        method_figure.sees(what.batch, kind) for kind in ("full_attention", "sliding_attention")
    )
    assert full[:clean, :clean].equal(full[:clean, :clean].tril())
    assert full[:clean].sum() == clean * (clean + 1) // 2
    for sight, past in (
        (full, range(start)),
        (sliding, range(start - method_figure.WINDOW + 1, start)),
    ):
        for row in sight[clean:]:
            assert row.nonzero().flatten().tolist() == [
                *past,
                *range(clean, clean + method_figure.CANVAS),
            ]
    method_figure.draw(what).savefig(tmp_path / "method.png", dpi=20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder)
    return folder


def test_the_forms_of_the_data_page_match_their_rows(tiny: Path) -> None:
    text, drawn = data_page.PAGE.read_text(encoding="utf-8"), data_page.pictures(tiny)
    stored = {path.name: path.read_text(encoding="utf-8") for path in data_page.PICTURES.iterdir()}
    assert text == data_page.page(text), "out of date: run python -m tools.data_page"
    assert stored == drawn, "out of date: run python -m tools.data_page"


@pytest.mark.parametrize("form", data_page.FORMS, ids=lambda form: form.name)
def test_a_picture_is_green_where_prepared_rows_are_learned(
    form: data_page.Form, tiny: Path, tmp_path: Path
) -> None:
    """Read from the picture's boxes and from the files that `prepare_data` writes."""
    row = json.dumps(form.row)
    (tmp_path / "row.jsonl").write_text(row)
    (tmp_path / "held_out.jsonl").write_text(re.sub("2|Bonn|users", "Ulm", row))
    overrides = [
        "name=page",
        f"data.source={tmp_path / 'row.jsonl'}",
        f"data.validation={tmp_path / 'held_out.jsonl'}",
        *form.settings,
    ]
    prepare_data(loads("{}", overrides=overrides), tiny, tmp_path / "out", processes=1)
    prepared = datasets.load_from_disk(str(tmp_path / "out" / "train"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    shown = _shown((data_page.PICTURES / f"{form.name}.svg").read_text(encoding="utf-8"))
    assert len(shown) == len(prepared) > 0
    for (context, learned), example in zip(shown, prepared, strict=True):
        at = example["prefix_length"]
        assert learned == tokenizer.decode(example["input_ids"][at:])
        assert context == tokenizer.decode(example["input_ids"][:at])
        assert example["input_ids"][at:] == tokenizer.encode(learned, add_special_tokens=False)


@pytest.mark.parametrize("form", data_page.FORMS, ids=lambda form: form.name)
def test_the_released_template_writes_what_a_picture_shows(
    form: data_page.Form, tiny: Path
) -> None:
    released = make_tokenizer(released_template(), special=TOOL_SPECIAL)
    assert data_page.examples(form, ChatTokenizer.of(released)) == data_page.examples(
        form, ChatTokenizer.of(AutoTokenizer.from_pretrained(tiny))
    )


def test_the_data_page_names_every_key_that_changes_a_rows_meaning() -> None:
    keys = {
        *row_formats._MEANINGFUL,
        *messages.MARK_KEYS,
        *messages.THINKING_KEYS,
        *messages._MEDIA_KEYS,
        *messages._ROLES,
        *messages._CONTENT_KEYS,
        *get_args(row_formats.RowFormat),
        *(f"data.{name}" for name in DataConfig.model_fields),
        *(f"data.columns.{name}" for name in ColumnsConfig.model_fields),
    }
    named = {word for span in spans(data_page.PAGE) for word in re.findall(r"[\w.]+", span)}
    assert not keys - named


def test_the_example_of_a_mixture_is_prepared_as_the_data_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,), (program,) = blocks(data_page.PAGE, "yaml"), blocks(data_page.PAGE, "python")
    assert recipe.name is not None
    Path(recipe.name).write_text(recipe.text)
    exec(compile(program.text, str(program), "exec"), {"__name__": "__example__"})
    assert (tmp_path / "mixed" / "card.html").is_file()


def _shown(picture: str) -> list[tuple[str, str]]:
    """Return gray and green text of each example in a picture: what is on a box of that color."""
    tree = ElementTree.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    assert not tree.findall(f".//{space}script")
    boxes = {
        (box.attrib["x"], float(box.attrib["y"]) + 15, float(box.attrib["width"])): box.attrib[
            "class"
        ]
        for box in tree.iter(f"{space}rect")
    }
    found: list[tuple[str, str]] = []
    for text in tree.iter(f"{space}text"):
        if text.attrib["class"] == "title":
            continue
        at = (text.attrib["x"], float(text.attrib["y"]), float(text.attrib["textLength"]))
        words = (text.text or "").replace(data_page.LINE_BREAK, "\n")
        context, learned = found.pop() if found else ("", "")
        match boxes[at]:
            case "context" if learned:
                found += [(context, learned), (words, "")]
            case "context":
                found.append((context + words, ""))
            case "learned":
                found.append((context, learned + words))
    return found

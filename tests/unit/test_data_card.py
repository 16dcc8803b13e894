"""Claims about the data card: it counts what was counted, is self-contained, and shows a user's
text as text.
"""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canvastune.preparation.card import render_card
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.stats import histogram, spread
from tests.support.data_fixtures import make_model, problems, run_config, write_lines


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("card")
    rows: list[Any] = [
        {"question": "<script>alert(1)</script> & é\x07", "answer": "<b>7</b>"},
        *problems(40),
        "<i>broken</i>",
    ]
    rows += [{"question": "q", "answer": "long " * 80}]
    config = run_config(write_lines(folder / "data.jsonl", rows), max_bad_row_fraction=0.1)
    return prepare_data(config, make_model(folder / "model"), folder / "out")


class Page(HTMLParser):
    """Collects the tags, the attributes and the text of a page, and checks that its tags close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert not self._open, f"tags that are not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(card: dict[str, Any]) -> None:
    page = Page(render_card(card))
    assert page.links == []
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert "url(" not in render_card(card)
    assert page.tags["svg"] == 2


def test_a_users_text_is_shown_as_text(card: dict[str, Any]) -> None:
    page = Page(render_card(card))
    # the five figures at the top
    assert page.tags["b"] == 5, "a tag of the data became a tag of the page"
    assert page.tags["i"] == 0
    assert "<script>alert(1)</script> & é�<turn|>" in page.text
    assert "<b>7</b><turn|>" in page.text


def test_the_page_says_what_was_left_out_and_why(card: dict[str, Any]) -> None:
    text = Page(render_card(card)).text
    assert card["bad_rows"][0]["reason"] in text
    assert re.search(r"\bcut\b[^.]* 256 tokens\D+\d", text)
    assert card["content_hash"] in text
    assert card["fingerprint"] in text


def test_a_card_without_faults_says_so(card: dict[str, Any]) -> None:
    text = Page(render_card(card | {"dropped": {}, "bad": 0, "bad_rows": [], "cut": 0})).text
    assert "Nothing:" in text
    assert "Bad rows" not in text
    assert card["bad_rows"][0]["reason"] not in text


def test_a_long_sample_is_shortened_in_the_page_alone(card: dict[str, Any]) -> None:
    sample = card["samples"][0] | {"response": "A" * 5000 + "Z" * 5000}
    text = Page(render_card(card | {"samples": [sample]})).text
    assert "[... 8,500 characters ...]" in text
    assert text.count("A") < 1000


def test_many_blocks_share_bars(card: dict[str, Any], tmp_path: Path) -> None:
    page = Page(render_card(card | {"block_histogram": {"1": 3, "500": 1}}))
    assert re.search(r"\b1 to 21\b.*: 3 ", page.text)
    assert page.tags["rect"] < 60


def test_the_page_says_what_an_epoch_denoises_of_long_answers(card: dict[str, Any]) -> None:
    text = Page(render_card(card | {"block_histogram": {"1": 30, "3": 10}})).text
    shares = re.findall(r"(\d+%)\D+ objective\.blocks: (\w+)", text)
    assert shares == [("67%", "1"), ("83%", "2"), ("100%", "all")]
    text = Page(render_card(card | {"block_histogram": {"1": 30}})).text
    assert "objective.blocks" not in text, "answers of one block have nothing to choose"


@settings(max_examples=80, deadline=None, database=None)
@given(st.dictionaries(st.integers(0, 5000), st.integers(1, 9), min_size=1, max_size=40))
def test_a_histogram_counts_every_row_once(lengths: dict[int, int]) -> None:
    counted = Counter(lengths)
    bars = histogram(counted)
    edges, counts = bars["edges"], bars["counts"]
    assert sum(counts) == counted.total()
    assert len(edges) == len(counts) + 1 <= 30
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(number for length, number in lengths.items() if low <= length < high)
    assert counts[0] > 0
    assert counts[-1] > 0


@settings(max_examples=80, deadline=None, database=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_spread_is_that_of_the_sorted_list(lengths: list[int]) -> None:
    found = spread(Counter(lengths))
    ordered = sorted(lengths)
    assert (found["min"], found["max"], found["sum"]) == (ordered[0], ordered[-1], sum(ordered))
    assert found["median"] == ordered[(len(ordered) + 1) // 2 - 1]
    assert sum(length <= found["p95"] for length in ordered) >= 0.95 * len(ordered)
    assert sum(length < found["p95"] for length in ordered) < 0.95 * len(ordered)

"""docs/errors.md has every message that the code can raise, and every message says what to do."""

from __future__ import annotations

import re

import pytest

from canvastune.ranks import HUNG
from tests.errors_page import PAGE, bad_rows, messages, page, parted


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "a message has changed: run python -m tests.errors_page"


def test_every_message_says_what_to_do() -> None:
    silent = [f"{message.file}: {message.cause}" for message in messages() if not message.cure]
    assert not silent, "no cure is said: " + "\n".join(silent)


def test_messages_are_found_wherever_they_are_made() -> None:
    """In a raise, in a function that words it, in a validator of the config, and in a list of problems."""
    said = {f"{message.cause} {message.cure}" for message in messages()}
    for words in ("no such recipe file", "no known form", "must be below it", "is missing: ", "may not ‹verb›", "cannot get its image"):
        assert any(words in text for text in said), words
    rows = " ".join(text for text, _ in bad_rows())
    for words in ("unknown role", "nested too deeply", "control token", "no assistant turn"):
        assert words in rows
    assert len(said) > 150


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("a.json: not JSON. Write it again", "Write it again"),
        ("a: damaged. What stands there is kept: make room, or move it", "make room, or move it"),
        ("key 'a'; did you mean 'b'?", "did you mean 'b'?"),
        ("a: Was it given twice? Remove one", "Remove one"),
        ("a: no such file", ""),
        ("a: the name is used, and nothing is set", ""),
    ],
)
def test_a_cure_is_told_from_a_cause(text: str, cure: str) -> None:
    assert parted(text)[1] == cure


def test_exit_codes_are_those_of_the_code() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)}
    assert codes == {0, 1, 2, 3, HUNG, 130}

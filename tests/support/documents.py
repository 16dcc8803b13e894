"""The project's Markdown, parsed: pages, links, code blocks, inline code, and commands."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "findings" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "components").glob("*/README.md")),
    *(ROOT / "charts" / "canvastune" / "README.md", ROOT / "docker" / "README.md"),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_KEYWORDS = {"do", "then", "export"}  # allowed before a command


@dataclass(frozen=True)
class Block:
    """A fenced code block; `line` is the line of its fence."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str | None:
        """The file name in its first line, if there is one."""
        found = re.match(r"# ([\w./-]+\.(?:ya?ml|py))\b", self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class _Parsed(BaseException):
    """Raised to end a program once its command line is parsed."""


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, or those of one language."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language is None or block.language == language]


def links(page: Path) -> list[str]:
    """Return the targets of links and images."""
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", _prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub generates them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", _prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def spans(page: Path) -> list[str]:
    """Return the inline code of a page, each text once."""
    return sorted({" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _prose(page))})


def files(page: Path) -> dict[str, str]:
    """Return the files that a reader of the page writes: named blocks, targets of redirections."""
    shown = {block.name: block.text for block in blocks(page) if block.name}
    redirected = [
        name for block in blocks(page, "sh") for name in re.findall(r">>? *([\w./-]+)", block.text)
    ]
    return {**dict.fromkeys(redirected, ""), **shown}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block, split into words.

    Comments, assignments, redirections and input are left out.
    """
    text = re.sub(r"(<<'END'[^\n]*)\n.*?^END$", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                yield from _command(words)
                words = []
            else:
                words.append(word)


def parsed(
    main: Callable[..., Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> argparse.Namespace:
    """Parse a command line with a program's own parser, without running the program.

    Raises:
        AssertionError: the program rejects the line.
    """
    found: list[argparse.Namespace] = []
    original = argparse.ArgumentParser.parse_args

    def read(
        self: argparse.ArgumentParser, given: list[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        found.append(original(self, arguments if given is None else given, namespace))
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        try:
            main(*([arguments] if inspect.signature(main).parameters else []))
        except _Parsed:
            return found[0]
        except SystemExit as ended:
            raise AssertionError(
                f"rejected with exit code {ended.code}: {' '.join(arguments)}"
            ) from None
    raise AssertionError(f"{main} parsed no command line")


def module_main(name: str) -> Callable[..., Any] | None:
    """Return `main` of the module, if it parses a command line.

    Raises:
        AssertionError: there is no such module.
    """
    specification = importlib.util.find_spec(name)
    assert specification is not None, f"python -m {name}: no such module"
    if specification.origin is None or "argparse" not in Path(specification.origin).read_text(
        encoding="utf-8"
    ):
        return None
    found: Callable[..., Any] = importlib.import_module(name).main
    return found


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _command(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in _KEYWORDS or re.fullmatch(r"[A-Za-z_]+=.*", words[0])):
        words = words[1:]
    plain: list[str] = []
    for word in words:
        if set(word) <= set("<>"):
            break  # a file name follows
        plain.append(word)
    if plain:
        yield plain

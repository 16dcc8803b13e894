"""Parts of Markdown texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ("", "")) -> str:
    """Return a table; without names of its columns it has two."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value: object) -> str:
    """Return a person's text, which may hold Markdown, as code for a table's cell."""
    text = " ".join(str(value).split())
    quoted = repr(text) if "`" in text else f"`{text}`"
    return quoted.replace("|", "\\|")

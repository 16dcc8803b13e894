"""The table of values in the chart's README, made from the comments in values.yaml. `python -m tools.chart_table` writes it anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).parents[1] / "charts" / "canvastune"
_START, _END = "<!-- values: made by python -m tools.chart_table -->", "<!-- end of values -->"


def documented_values(text: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, default as JSON and comment of every value: the comment stands right above the key.

    Raises:
        ValueError: a value without a comment.
    """
    yield from _rows(yaml.compose(text), text.splitlines(), "")


def values_table(text: str) -> str:
    """The table, in Markdown."""
    rows = [f"| `{key}` | `{default}` | {comment} |" for key, default, comment in documented_values(text)]
    return "\n".join(["| value | default | what it does |", "|---|---|---|", *rows])


def with_table(readme: str, table: str) -> str:
    """The README with this table between its marks."""
    before, _, rest = readme.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}\n{table}\n{_END}{after}"


def _rows(node: yaml.Node | None, lines: list[str], prefix: str) -> Iterator[tuple[str, str, str]]:
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        path = prefix + key.value
        above = key.start_mark.line - 1
        comment = lines[above].strip() if above >= 0 else ""
        if comment.startswith("# "):
            yield path, json.dumps(yaml.safe_load(yaml.serialize(value))), comment.removeprefix("# ").replace("|", "\\|")
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _rows(value, lines, f"{path}.")
        else:
            raise ValueError(f"values.yaml: {path} has no comment")


def main() -> None:
    """Write the table into the README."""
    readme = CHART / "README.md"
    table = values_table((CHART / "values.yaml").read_text(encoding="utf-8"))
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()

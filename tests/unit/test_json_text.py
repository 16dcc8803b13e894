"""Files with a JSON value per line."""

from __future__ import annotations

from pathlib import Path

from canvastune.io.json_text import read_json_lines, to_json_text


def test_other_line_separators_are_part_of_a_text(tmp_path: Path) -> None:
    rows = [{"after": f"first{separator}second"} for separator in ("\u2028", "\x85", "\x0c", "\r")]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(to_json_text(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_json_lines(file) == rows

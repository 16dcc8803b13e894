"""Reading metrics.jsonl: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canvastune.errors import UserError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that a killed process left unfinished does not count.

    Raises:
        UserError: no such file, or a line that is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as metrics.jsonl: {error}. Give the metrics.jsonl of a training run") from None
    return parse_lines(text[: text.rfind("\n") + 1], str(path))


def parse_lines(text: str, where: str, first: int = 1) -> list[dict[str, Any]]:
    """The records of whole lines.

    Args:
        where, first: the file's name and the number of the first line, for the message.

    Raises:
        UserError: a line that is no record.
    """
    records = []
    for number, line in enumerate(text.splitlines(), first):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}:{number}: not a JSON object ({error}). Give the metrics.jsonl of a training run") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise UserError(
                f"{where}:{number}: found {line[:80]!r}, expected an object with `kind` and an integer `step`. "
                "Give the metrics.jsonl of a training run"
            )
        records.append(record)
    return records

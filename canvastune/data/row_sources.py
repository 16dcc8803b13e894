"""Which source of a mixture each held-out row is from; written next to the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from canvastune.errors import UserError

_FILE = "sources.json"


def write_sources(sources: Mapping[str, str], folder: Path) -> None:
    """Write the source of each row, by its id; by the name that the recipe gives the source."""
    names = list(dict.fromkeys(sources.values()))
    rows = {id: names.index(name) for id, name in sources.items()}
    text = json.dumps({"sources": names, "rows": rows}, ensure_ascii=False)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")


def read_sources(folder: Path) -> dict[str, str]:
    """Return the source of each row by its id; nothing if all rows are from one source.

    Raises:
        UserError: the file cannot be read.
    """
    file = folder / _FILE
    if not file.is_file():  # one source, or data that an earlier version prepared
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {id: found["sources"][at] for id, at in found["rows"].items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{file}: cannot be read: {error}", hint="Prepare the data again."
        ) from None

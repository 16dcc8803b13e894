"""Values of columns by which evaluation splits its figures; written next to the held-out rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from canvastune.errors import UserError, type_of

NO_VALUE = "no value"  # of a row without the column
_FILE = "columns.json"
_LONGEST = 60  # characters of a value
_TYPES = "text, a number, or true or false"


class RowColumns:
    """Collects the values of held-out rows while the rows are read."""

    def __init__(self, names: Sequence[str]) -> None:
        """Begin without rows. `names`: the columns of `evaluate.slices`."""
        self.names = tuple(names)
        self._rows: dict[str, list[str]] = {}
        self._known: set[str] = set()  # columns of the rows
        self._found: set[str] = set()  # of them, those with a value

    def add(self, id: str, value: Any, where: str) -> None:
        """Add a held-out row.

        Args:
            id: of the conversation.
            value: the row as it was read.
            where: file and row, for errors.

        Raises:
            UserError: a value by which no figures can be split.
        """
        if not self.names:
            return
        row: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        self._known.update(map(str, row))
        self._rows[id] = [self._text(name, row.get(name), where) for name in self.names]

    def write(self, ids: Sequence[str], folder: Path) -> None:
        """Write the values of the rows that are held out in the end.

        Raises:
            UserError: a column that no held-out row has.
        """
        if not self.names:
            return
        for name in self.names:
            if name not in self._found:
                raise UserError(
                    f"evaluate.slices: no held-out row has a value in a column {name!r}",
                    hint=f"The columns are {', '.join(sorted(self._known)) or 'not known'}.",
                )
        rows = {id: self._rows[id] for id in ids}
        text = json.dumps({"columns": self.names, "rows": rows}, ensure_ascii=False)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")

    def _text(self, name: str, value: Any, where: str) -> str:
        if value is None or value == "":
            return NO_VALUE
        if not isinstance(value, str | int | float):
            raise UserError(
                f"evaluate.slices: {where}: column {name!r} has {type_of(value)}, "
                f"expected {_TYPES}",
                hint="Name a column with one value per row, or leave this one out.",
            )
        self._found.add(name)
        text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def read_columns(folder: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the values of these columns for each held-out row, by its id; nothing without names.

    Raises:
        UserError: the file cannot be read, or was written for other columns.
    """
    if not names:
        return {}
    file = folder / _FILE
    hint = "Prepare the data again with this recipe."
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        columns = [found["columns"].index(name) for name in names]
        return {
            id: {name: values[at] for name, at in zip(names, columns, strict=True)}
            for id, values in found["rows"].items()
        }
    except FileNotFoundError:
        raise UserError(
            f"{folder}: found no columns of the rows, expected {', '.join(names)} "
            "(evaluate.slices)",
            hint=hint,
        ) from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read: {error}", hint=hint) from None

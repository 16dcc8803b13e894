"""Expected values in `tests/golden/`.

UPDATE_GOLDEN=1 writes them, except the losses after the old checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str, found: Any) -> Any:
    """Return the content of `tests/golden/NAME.json`, to be compared with what was found."""
    path = FOLDER / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN") and name != "losses-checkpoint":
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))

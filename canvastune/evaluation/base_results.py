"""Results of base models, kept because many runs ask the same base the same questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from canvastune.evaluation.answer_cache import hash_key
from canvastune.io.atomic import replace_text
from canvastune.io.json_text import read_json_lines

logger = logging.getLogger(__name__)


class BaseResults:
    """Answers and losses of one base, in a file that all runs of a workspace share.

    The key of a result is everything that it depends on, as in `AnswerCache`: base, question, seed,
    settings, device and versions. The file is replaced as a whole, so a reader never sees a partial
    one. If two runs end at the same moment, one may lose the other's results, which only costs time.
    """

    def __init__(self, folder: Path | None, base: str) -> None:
        """Read the results of a base, by its hash; none without a folder."""
        self.path = None if folder is None else folder / f"{base[:32]}.jsonl"
        self._results = self._read()
        self._new: dict[str, Any] = {}

    def get(self, key: Mapping[str, Any]) -> Any:
        """Return the result for a key; None if there is none."""
        return self._results.get(hash_key(key))

    def put(self, key: Mapping[str, Any], result: Any) -> None:
        """Take a result, which `save` writes."""
        if hash_key(key) not in self._results:
            self._new[hash_key(key)] = result

    def save(self) -> None:
        """Write the results for later runs; a full or read-only disk is only logged."""
        if self.path is None or not self._new:
            return
        results = self._read() | self._new
        lines = [
            json.dumps({"piece": digest, "result": result}) for digest, result in results.items()
        ]
        try:
            replace_text(self.path, "\n".join(lines) + "\n")
        except OSError as error:
            logger.warning(
                f"evaluate: {self.path}: cannot be written ({error.strerror}): later runs compute "
                "these results again"
            )

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            return {line["piece"]: line["result"] for line in read_json_lines(self.path)}
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning(
                f"evaluate: {self.path}: cannot be read ({error}): its results are computed again"
            )
            return {}

"""What an evaluation has done so far, so that one that was killed goes on: a file beside the output, a line per piece of work."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from canvastune.errors import UserError


class AnswerCache:
    """Results of pieces of work, each kept on the disk before the next is begun.

    A piece is known by everything that its result depends on: after a change of the weights, the rows or a setting it is another piece,
    and is done again. One process at a time may hold a journal.
    """

    def __init__(self, path: Path) -> None:
        """Raises: UserError, another process holds it, or a place that cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}). Give a place where you may write") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path}: another evaluation is at work here. Wait for it, or give another --output") from None
        self._done = self._read()

    def __len__(self) -> int:
        return len(self._done)

    def find(self, piece: Mapping[str, Any]) -> Any:
        """The result of a piece of work; None where it is not done."""
        return self._done.get(_digest(piece))

    def keep(self, piece: Mapping[str, Any], result: Any) -> None:
        """Write the result of a piece to the disk. Raises: UserError, the disk takes no more."""
        digest = _digest(piece)
        line = json.dumps({"piece": digest, "result": result}).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); what was done before is kept. Make room, and the same command goes on"
            ) from None
        self._done[digest] = result

    def remove(self) -> None:
        """The work is done, and stands elsewhere."""
        self.path.unlink()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self._done:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _read(self) -> dict[str, Any]:
        """The whole lines; what a killed process left of a line is cut off."""
        self._file.seek(0)
        text = self._file.read()
        end = text.rfind(b"\n") + 1
        self._file.truncate(end)
        try:
            lines = [json.loads(line) for line in text[:end].splitlines()]
            return {line["piece"]: line["result"] for line in lines}
        except (ValueError, TypeError, KeyError):
            self._file.close()
            raise UserError(f"{self.path}: damaged. Remove this file, and the evaluation begins again") from None


def _digest(piece: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(piece, sort_keys=True).encode()).hexdigest()

"""The answer cache: results of an evaluation saved as it runs, so that a killed one resumes."""

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
    """A file of results, one JSON line each, flushed to the disk before the next one is computed.

    A result is found by everything that it depends on: after a change of the weights, the rows or a
    setting it has another key, and is computed again. One process at a time may open a cache.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the cache.

        Raises:
            UserError: another process uses it, or the file cannot be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror})",
                hint="Choose a directory you can write to.",
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path}: in use by another evaluation",
                hint="Wait until it has finished, or choose another --output.",
            ) from None
        self._results = self._read()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: Mapping[str, Any]) -> Any:
        """Return the result for a key; None if there is none."""
        return self._results.get(hash_key(key))

    def put(self, key: Mapping[str, Any], result: Any) -> None:
        """Write a result to the disk. Raises: UserError, the disk is full."""
        self._write(hash_key(key), result)

    def add(self, other: AnswerCache) -> None:
        """Write all results of another cache. Raises: as `put`."""
        for digest, result in other._results.items():
            self._write(digest, result)

    def _write(self, digest: str, result: Any) -> None:
        line = json.dumps({"piece": digest, "result": result}).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); earlier results are kept",
                hint="Free some disk space and run the same command again: it resumes.",
            ) from None
        self._results[digest] = result

    def delete(self) -> None:
        """Delete the file, once the whole result is written elsewhere."""
        self.path.unlink()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._results:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _read(self) -> dict[str, Any]:
        """Read the complete lines; cut off the partial line of a killed process."""
        self._file.seek(0)
        text = self._file.read()
        end = text.rfind(b"\n") + 1
        self._file.truncate(end)
        try:
            lines = [json.loads(line) for line in text[:end].splitlines()]
            return {line["piece"]: line["result"] for line in lines}
        except (ValueError, TypeError, KeyError):
            self._file.close()
            raise UserError(
                f"{self.path}: corrupt file, expected one JSON object per line",
                hint="Delete this file; the evaluation then starts from the beginning.",
            ) from None


def hash_key(key: Mapping[str, Any]) -> str:
    """Return what a result is found by."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

"""Identify files and directories by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from canvastune.errors import UserError

# Larger files are identified by size and three samples: reading 50 GB would take minutes.
_WHOLE_FILE = 64 * 2**20  # bytes


def hash_path(path: Path, *, whole: bool = False) -> str:
    """Return the SHA-256 of a file, or of a directory's relative names and contents.

    Of a file above 64 MiB, the size and the first, middle and last MiB are hashed.
    `provenance.json` is left out: it has the time of day, and equal inputs must have equal hashes.

    Args:
        whole: read every byte of large files too, where a change of a single row must be noticed.

    Raises:
        UserError: no such file or folder.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", hint="Check the path.")
    digest = hashlib.sha256()
    if path.is_file():
        _update(digest, path, whole)
        return digest.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "provenance.json"):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        _update(digest, file, whole)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, file: Path, whole: bool) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if whole or size <= _WHOLE_FILE:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        else:
            for offset in (0, size // 2, size - 2**20):
                stream.seek(offset)
                digest.update(stream.read(2**20))

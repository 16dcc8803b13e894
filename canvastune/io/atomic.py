"""A step's output folder appears whole or not at all, and says what made it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from canvastune.errors import UserError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk that takes no more


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        UserError: `out` already holds something: nothing that was there is overwritten; a place that cannot be written, a full disk.
    """
    out = out.absolute()
    partial = _begin(out)
    try:
        yield partial
        fsync_tree(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
        fsync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            reason = os.strerror(error.errno).lower()
            raise UserError(
                f"{out}: not written ({reason}), and what was begun is gone. Make room, or give a place on another disk"
            ) from None
        raise


def check_writable(out: Path) -> None:
    """Refuse now what `atomic_directory` would refuse when long work is done. Raises: UserError, see there."""
    _begin(out.absolute()).rmdir()


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            fsync(Path(root) / name)
        fsync(Path(root))


def fsync(path: Path) -> None:
    """Flush one file, or one folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _begin(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not empty. Give another output folder, or move this one away")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.filename}: {error.strerror}). Give a place where you may write") from None
    return partial

"""Write output directories and files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from canvastune.errors import UserError

# Of a disk that accepts no more data.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block succeeds, and is removed
    otherwise.

    Raises:
        UserError: `out` is not empty (nothing is ever overwritten), cannot be written, or the disk
            is full.
    """
    out = out.absolute()
    partial = _create_partial(out)
    try:
        yield partial
        fsync_tree(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
        fsync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            reason = os.strerror(error.errno).lower()
            raise UserError(
                f"{out}: could not write ({reason}); the partial output was removed",
                hint="Free some disk space, or choose another disk.",
            ) from None
        raise


def disk_full(error: BaseException, place: object) -> UserError | None:
    """Return what a user reads of an error that says that nothing can be written; None for others.

    Args:
        place: what was written, for an error without a file.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK_FULL:
        return None
    hint = "Free some space, and run the same command again."
    return UserError(f"{error.filename or place}: {os.strerror(error.errno).lower()}", hint=hint)


def check_writable(out: Path) -> None:
    """Raise now the errors that `atomic_directory` would raise after long work."""
    _create_partial(out.absolute()).rmdir()


def replace_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file, completely or not at all, and its folder if there is none.

    Args:
        sync: flush the file to the disk first.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one number on several machines may write the same file of a shared disk.
    partial = path.with_name(f".{path.name}.partial-{os.uname().nodename}-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        if sync:
            fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


def _create_partial(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: already exists and is not empty",
            hint="Choose another output directory, or move this one.",
        )
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"{out}: cannot create ({error.filename}: {error.strerror})",
            hint="Choose a directory that you can write to.",
        ) from None
    return partial

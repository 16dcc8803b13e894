"""A step's output folder appears whole or not at all, and says what made it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from canvastune import __version__
from canvastune.config import RunConfig, write_config
from canvastune.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk that takes no more

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "mlflow", "numpy")
_WHOLE_FILE = 64 * 2**20  # bytes: files above this are identified by size and three samples, so that 50 GB take no minutes


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        UserError: `out` already holds something: nothing that was there is overwritten; a place that cannot be written, a full disk.
    """
    out = out.absolute()
    partial = _begin(out)
    try:
        yield partial
        sync_tree(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            reason = os.strerror(error.errno).lower()
            raise UserError(
                f"{out}: not written ({reason}), and what was begun is gone. Make room, or give a place on another disk"
            ) from None
        raise


def refuse_place(out: Path) -> None:
    """Refuse now what `whole_folder` would refuse when long work is done. Raises: UserError, see there."""
    _begin(out.absolute()).rmdir()


def write_provenance(folder: Path, step: str, config: RunConfig, inputs: Mapping[str, Path]) -> None:
    """Write `config.yaml` and `provenance.json` into an output folder: config, versions, seed, hashes of the inputs."""
    write_config(config, folder / "config.yaml")
    record = {
        "step": step,
        "canvastune": __version__,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "seed": config.seed,
        "inputs": {name: fingerprint(path) for name, path in inputs.items()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (folder / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents.

    A file above 64 MiB counts with its size and its first, middle and last MiB. `provenance.json` does not count: it
    holds the time of day, and the same input must have the same fingerprint.

    Raises:
        UserError: no such file or folder.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Give the path of one that exists")
    digest = hashlib.sha256()
    if path.is_file():
        _feed(digest, path)
        return digest.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "provenance.json"):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        _feed(digest, file)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
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


def _feed(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= _WHOLE_FILE:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        else:
            for offset in (0, size // 2, size - 2**20):
                stream.seek(offset)
                digest.update(stream.read(2**20))

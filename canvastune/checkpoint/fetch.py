"""Download a base model to the Hub's cache once: check the free space before, and each file after."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from canvastune.checkpoint.hub import PATTERNS, hub_reason, resolve_model
from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError
from canvastune.io.byte_size import format_bytes
from canvastune.logging import event

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0
_STALE_SECONDS = 15.0  # without a write, after which a download is not one any more


def fetch_model(config: ModelConfig) -> Path:
    """Download a model to the Hub's cache, or what it lacks there; return its verified folder.

    Raises:
        UserError: no such model, too little room, a damaged file (which is removed).
    """
    if Path(config.id).is_dir():
        return resolve_model(config)
    files = _files(config)
    missing = sum(
        file.size or 0
        for file in files
        if not isinstance(
            try_to_load_from_cache(config.id, file.rfilename, revision=config.revision), str
        )
    )
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    name = f"models--{config.id.replace('/', '--')}"
    blobs = cache / name / "blobs"
    _remove_interrupted(blobs, cache / ".locks" / name)
    free = shutil.disk_usage(cache).free
    if missing > free:
        raise UserError(
            f"{cache}: {config.id} needs another {format_bytes(missing)}, found "
            f"{format_bytes(free)} free",
            hint="Enlarge the claim (chart: workspace.size), or remove old runs.",
        )
    with _progress(blobs, sum(file.size or 0 for file in files), config.id):
        folder = resolve_model(config)
    _verify(folder, files, config.id)
    return folder


def _files(config: ModelConfig) -> list[Any]:
    """Return the files of the model's repository that runs read, with their sizes and hashes."""
    try:
        info = HfApi().model_info(config.id, revision=config.revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.id: {config.id}: the Hub does not have it or does not respond ({hub_reason(error)})",
            hint="Check the name, HF_TOKEN, and the proxy (HTTPS_PROXY).",
        ) from None
    files = info.siblings or []
    return list(
        filter_repo_objects(files, allow_patterns=list(PATTERNS), key=lambda f: f.rfilename)
    )


def _remove_interrupted(blobs: Path, locks: Path) -> None:
    """Remove the parts of files that killed downloads have left: each is downloaded as a new file,
    so that they would only fill the claim.

    A part is kept while its lock is held, or if it was just written: some file systems ignore locks.
    """
    for file in blobs.glob("*.incomplete"):
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{file.name.partition('.')[0]}.lock", timeout=0, mode=0o664)
        # A running download holds the lock, or has finished the file; or the file system has no
        # locks: then the part stays.
        with contextlib.suppress(FileNotFoundError, Timeout, NotImplementedError), lock:
            status = file.stat()
            if time.time() - status.st_mtime > _STALE_SECONDS:
                file.unlink()
                logger.info(
                    f"{file.name}: removed {format_bytes(status.st_size)} of a file whose "
                    "download was interrupted"
                )


@contextlib.contextmanager
def _progress(blobs: Path, total: int, what: str) -> Iterator[None]:
    """Log every half a minute how much is there, at what rate, and how long the rest takes."""
    done, began = threading.Event(), time.monotonic()
    first = _size(blobs)

    def report() -> None:
        while not done.wait(_REPORT_SECONDS):
            now = _size(blobs)
            rate = (now - first) / (time.monotonic() - began)
            left = f", {(total - now) / rate / 60:.0f} min left" if rate > 0 else ""
            logger.info(
                f"{what}: {format_bytes(now)} of {format_bytes(total)}, {format_bytes(rate)}/s{left}",
                extra=event("fetch", bytes=now, total=total),
            )

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _size(blobs: Path) -> int:
    total = 0
    for file in blobs.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed when it is complete
            total += file.stat().st_size
    return total


def _verify(folder: Path, files: list[Any], what: str) -> None:
    """Compare size and, of large files, SHA-256 with the Hub's; remove a file that differs."""
    total = 0
    for file in files:
        path = folder / file.rfilename
        size = path.stat().st_size
        problem = f"found {size} bytes, expected {file.size}" if size != file.size else ""
        if not problem and file.lfs is not None:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            problem = "" if digest == file.lfs.sha256 else "its SHA-256 is not the Hub's"
        if problem:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise UserError(
                f"{what}: {file.rfilename} is damaged ({problem}); it was removed",
                hint="Run the same command again: only this file is downloaded.",
            )
        total += size
    logger.info(
        f"{what}: {len(files)} files, {format_bytes(total)}, verified: {folder}",
        extra=event("fetched", files=len(files), bytes=total, folder=str(folder)),
    )

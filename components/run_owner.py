"""Who works in a run's folder: one process at a time, through the whole pipeline.

RUN/.owner is locked while `canvastune run` works there, and says who does. The kernel releases the
lock when the process ends, however it ends; a process that was killed leaves the file, unlocked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from canvastune.errors import UserError

logger = logging.getLogger(__name__)

OWNER_FILE = ".owner"
OWNER = "CANVASTUNE_OWNER"  # for the steps of a local run: the process that they end with
_LOOKS = 1.0  # seconds that a lock may be held by processes that only look who owns the run
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Owner:
    """The process that works in a run's folder."""

    host: str
    process: int
    since: float  # Unix seconds
    command: str = ""  # the one that resumes the run
    directory: str = ""  # in which it was typed

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.process} on {self.host}, started {when}"


@contextlib.contextmanager
def own_run(folder: Path, command: str = "") -> Iterator[Owner | None]:
    """Own a run's folder, created if necessary, for as long as the block takes.

    Args:
        command: the one that resumes the run, for those who find it interrupted.

    Yields:
        The owner before, if it was killed.

    Raises:
        UserError: another process owns the folder, named with host and start; it is not writable.
    """
    owner = Owner(socket.gethostname(), os.getpid(), time.time(), command, os.getcwd())
    try:
        descriptor = _lock(folder)
        try:
            before = _read(folder)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write here ({error.strerror})",
            hint="Use a workspace that you can write to and that has free space.",
        ) from None
    try:
        yield before
    finally:
        with contextlib.suppress(FileNotFoundError):  # the run was removed
            (folder / OWNER_FILE).unlink()
        with contextlib.suppress(OSError):  # of a run that has started: it is not empty
            folder.rmdir()
        os.close(descriptor)


def find_owner(folder: Path) -> Owner | None:
    """Return the process that works in a run's folder now; None if there is none."""
    try:
        descriptor = os.open(folder / OWNER_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(folder) or Owner("unknown", 0, os.fstat(descriptor).st_mtime)
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def owner_environment() -> dict[str, str]:
    """Return the variable by which the steps of a run end with this process."""
    return {OWNER: str(os.getpid())}


def owner_of_this_step(folder: Path) -> Owner | None:
    """Return the owner whose step this process is; None where no process owns the run.

    On a cluster, each step is a pod, and the file may be of an attempt on another machine.
    """
    owner = _read(folder) if OWNER in os.environ else None
    return owner if owner and str(owner.process) == os.environ[OWNER] else None


def end_with_owner(seconds: float = 1.0) -> None:
    """Interrupt this process, as Ctrl-C does, when the process that owns its run is killed.

    An owner that ends in order interrupts its steps itself. Called in the main thread.

    Args:
        seconds: between two looks.
    """
    if OWNER not in os.environ:
        return
    process, main = int(os.environ[OWNER]), threading.get_ident()
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def watch() -> None:
        while _is_alive(process):
            time.sleep(seconds)
        logger.warning("canvastune run was killed: this step ends, too")
        signal.pthread_kill(main, signal.SIGTERM)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


def _is_alive(process: int) -> bool:
    # Only by id: the start time that psutil computes moves with the clock.
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _lock(folder: Path) -> int:
    """Return the descriptor of the locked file; it is the one in the folder, not a deleted one."""
    deadline = time.monotonic() + _LOOKS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the owner before has just left an empty folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.stat(folder / OWNER_FILE)
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise _in_use(folder) from None
        except FileNotFoundError:  # the owner before has just ended
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning(
                    f"{folder}: this file system has no locks ({error.strerror}): do not start "
                    "this run twice at once"
                )
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.05)


def _in_use(folder: Path) -> UserError:
    owner = _read(folder)
    return UserError(
        f"{folder}: this run is in progress: {owner or 'by an unknown process'}",
        hint="Wait for it to end, or choose another --run-name. `canvastune runs` lists all runs.",
    )


def _read(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / OWNER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no owner, or one that is writing just now
        return None

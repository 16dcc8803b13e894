"""Start the processes of a run as ranks, and end one of them."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from canvastune.distributed.watchdog import RankRegistry
from canvastune.errors import UserError
from canvastune.logging import log_error

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_processes(select_device: Callable[[], torch.device]) -> RankRegistry:
    """Join this process to the process group that torchrun's variables describe; without them it is
    the only one.

    Args:
        select_device: returns the rank's device; may refuse it.
    """
    if "RANK" not in os.environ:  # started without torchrun: one process
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    device = select_device()
    store, rank, world_size = next(dist.rendezvous("env://"))
    # The store may outlive an attempt (torchrun --max-restarts), and the addresses in it do not.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Checkpoints use gloo in addition to NCCL; on CPU there is only gloo. The timeout is hours, as
    # rank 0 may prepare data or weights may come from a slow disk; during training a watchdog
    # observes the ranks.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(hours=2),
    )
    return RankRegistry(dist.PrefixStore("ranks", store), rank, world_size)


def log_on_rank0(error: UserError) -> None:
    """Print an error that every rank raises, once."""
    # Before the ranks are connected, every rank of a node raises it.
    name = "RANK" if dist.is_initialized() else "LOCAL_RANK"
    if os.environ.get(name, "0") == "0":
        log_error(error)


def die_with_parent() -> None:
    """Get SIGTERM when torchrun is killed.

    The rank then saves its state and exits, instead of running unnoticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_without_cleanup(code: int) -> NoReturn:
    """Exit now: an orderly exit would wait for ranks that have exited."""
    sys.stderr.flush()
    os._exit(code)

"""Run one function on several gloo ranks."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The second one is the model's, which transformers imports when the model is built.
_PRELOADED = ["canvastune.training.trainer", "transformers.models.gemma4.modeling_gemma4"]


def preload(module: str) -> None:
    """Import a module once, in the server that ranks are forked from, and not in every rank.

    It has to be called before the first ranks start.
    """
    _PRELOADED.append(module)
    _set_preload()


def _set_preload() -> None:
    # Fifteen seconds less for eight ranks on two cores.
    mp.get_context("forkserver").set_forkserver_preload(list(_PRELOADED))


_set_preload()


def run_ranks(function: Callable[..., None], world_size: int, folder: Path, *args: Any) -> None:
    """Call `function(folder, *args)` on every rank of a fresh process group and wait for all; a
    failure on any rank is raised here.
    """
    # A new name: an earlier call may have left its file, with the addresses of its ranks.
    meeting = folder / f"meeting-{uuid.uuid4().hex}"
    mp.start_processes(
        _rank,
        args=(function, world_size, str(meeting), folder, args),
        nprocs=world_size,
        start_method="forkserver",
    )


def _rank(
    rank: int,
    function: Callable[..., None],
    world_size: int,
    meeting: str,
    folder: Path,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    try:
        function(folder, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()

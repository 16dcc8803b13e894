"""The device that a rank trains on, and what of a node is refused before the first step."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from canvastune.config import RunConfig
from canvastune.errors import UserError

INFINIBAND = Path("/dev/infiniband")  # where a node has devices for RDMA
_LARGE = 1e9  # parameters of experts and embedding
# Bytes that NCCL locks for RDMA at the least: its buffers are 4 MiB for each channel and peer.
_LOCKED = 64 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_RETURNED = 4 * 2**20  # bytes of a tensor that are the system's again as soon as it is freed


def select_device() -> torch.device:
    """Return this rank's GPU, made the current device, or the CPU, whose freed memory is returned to
    the system from here on.

    Raises:
        UserError: this node has fewer GPUs than processes, on every rank of the node.
    """
    if not torch.cuda.is_available():
        _return_freed_memory()
        return torch.device("cpu")
    rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    if processes > devices:
        raise UserError(
            f"{processes} processes on this node, which has {devices} GPUs",
            hint="Set parallel.nproc_per_node, or torchrun's --nproc-per-node, to the GPUs of a node.",
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    # It takes precedence on Hopper, and compiles a plan for every new shape and stride: with
    # examples of different lengths, several in every step, for as long as a run takes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _return_freed_memory() -> None:
    """Make the C library return a large tensor's memory as soon as the tensor is freed.

    By default it raises its own threshold to 32 MiB and keeps what is smaller: for one long example
    several times what its tensors take. Each new tensor then costs page faults, few of them with
    pages of 2 MiB (see `canvastune`).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, _RETURNED)
        mallopt(_M_TRIM_THRESHOLD, 64 * _RETURNED)


def refuse_silent_cpu(config: RunConfig, device: torch.device, text: PreTrainedConfig) -> None:
    """Refuse to train a large model on the CPU, unless the recipe says so: a step takes minutes.

    Raises:
        UserError: torch finds no CUDA device, and `hardware.accelerator` is not cpu.
    """
    wanted = config.hardware.accelerator
    experts = 3 * text.num_hidden_layers * text.num_experts * text.moe_intermediate_size
    large = (experts + text.vocab_size) * text.hidden_size > _LARGE
    if large and device.type == "cpu" and wanted.lower() != "cpu":
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
        raise UserError(
            f"hardware.accelerator: found {wanted!r}, but torch {torch.__version__} (a build "
            f"{build}) finds no GPU on this node",
            hint=(
                "`canvastune doctor` and nvidia-smi show what is missing, usually a newer driver; "
                "--set hardware.accelerator=cpu trains on the CPU."
            ),
        )


def refuse_locked_memory(device: torch.device, world_size: int) -> None:
    """Refuse to train over RDMA where a process may not lock memory: NCCL would end the job at its
    first transfer between nodes, with "Cannot allocate memory".

    Raises:
        UserError: several nodes with devices for RDMA, and a limit below what NCCL locks.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    without = os.environ.get("NCCL_IB_DISABLE") == "1" or not INFINIBAND.exists()
    if device.type != "cuda" or world_size <= local or without:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= _LOCKED:
        return
    raise UserError(
        f"RLIMIT_MEMLOCK: found {limit} bytes of memory that a process may lock, expected no limit:"
        f" this node has {INFINIBAND}, and NCCL locks its buffers for RDMA",
        hint=(
            "Set LimitMEMLOCK=infinity for the nodes' container runtime and restart it; or set "
            "NCCL_IB_DISABLE=1 in cluster.env to use TCP, which is slower."
        ),
    )

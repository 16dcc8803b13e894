"""A rank's device, and what waits for a disk."""

from __future__ import annotations

import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from canvastune.checkpoint.load import read_model_config
from canvastune.checkpoint.resume import wait_for
from canvastune.config import parse_config
from canvastune.errors import UserError
from canvastune.planner.planner import SHIPPED_CONFIG
from canvastune.training import devices
from canvastune.training.devices import refuse_locked_memory, refuse_silent_cpu, select_device
from tests.support.small import model_config


def test_more_processes_than_gpus_are_refused_on_every_rank_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for rank in ("0", "7"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(UserError, match=r"\b8 processes\b.* 4 GPUs\b"):
            select_device()


@pytest.mark.parametrize("limit", [8 * 2**20, resource.RLIM_INFINITY])
def test_nodes_with_rdma_must_let_a_process_lock_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    refuse_locked_memory(cuda, 8)  # one node: nothing crosses a network
    refuse_locked_memory(torch.device("cpu"), 16)
    if limit == resource.RLIM_INFINITY:
        refuse_locked_memory(cuda, 16)
        return
    with pytest.raises(UserError, match="RLIMIT_MEMLOCK: found 8388608 bytes") as refused:
        refuse_locked_memory(cuda, 16)
    assert "LimitMEMLOCK=infinity" in str(refused.value.hint)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    refuse_locked_memory(cuda, 16)
    monkeypatch.delenv("NCCL_IB_DISABLE")
    monkeypatch.setattr(devices, "INFINIBAND", tmp_path / "none")
    refuse_locked_memory(cuda, 16)


def test_a_slow_disk_is_progress_to_the_watchdog() -> None:
    written = threading.Event()
    beats = 0

    def waiting() -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            written.set()

    with ThreadPoolExecutor(1) as thread:
        wait_for(thread.submit(written.wait, 60), waiting, every=0.01)
    assert beats == 3


def test_what_a_thread_raises_is_raised() -> None:
    def fail() -> None:
        raise TimeoutError("the disk")

    with ThreadPoolExecutor(1) as thread, pytest.raises(TimeoutError, match="the disk"):
        wait_for(thread.submit(fail), str, every=0.01)


def test_a_large_model_is_refused_where_torch_finds_no_gpu_unless_the_recipe_says_cpu() -> None:
    tree = {"name": "x", "model": {"id": "x"}, "data": {"source": "x"}, "train": {"steps": 1}}
    config, cpu = parse_config(tree), torch.device("cpu")
    released = read_model_config(SHIPPED_CONFIG).text_config
    with pytest.raises(
        UserError, match=r"hardware\.accelerator.*'h100'.* torch .*\bno GPU\b"
    ) as refused:
        refuse_silent_cpu(config, cpu, released)
    assert "hardware.accelerator=cpu" in str(refused.value.hint)
    refuse_silent_cpu(config, torch.device("cuda"), released)
    refuse_silent_cpu(parse_config({**tree, "hardware": {"accelerator": "cpu"}}), cpu, released)
    refuse_silent_cpu(config, cpu, model_config().text_config)

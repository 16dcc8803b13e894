"""A rank's device, and what waits for a disk."""

from __future__ import annotations

import functools
import resource
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from canvastune.checkpoint.load import read_model_config
from canvastune.checkpoint.resume import wait_for
from canvastune.checkpoint.staging import HostStager
from canvastune.config import parse_config
from canvastune.distributed import processes
from canvastune.errors import UserError
from canvastune.evaluation import model_run
from canvastune.merge import device_with_memory
from canvastune.model import grouped_matmul
from canvastune.planner.planner import SHIPPED_CONFIG
from canvastune.training import devices, run, trainer
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


@pytest.mark.parametrize("found", ["cpu", "cuda"])
def test_training_asks_before_it_builds_a_model(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released model without a GPU; two nodes with RDMA and little memory to lock."""

    def here(call: Any) -> Any:
        return call()

    tree = {"name": "x", "model": {"id": "x"}, "data": {"source": "x"}, "train": {"steps": 1}}
    stand_ins = {
        "run_on_rank0": here,
        "run_on_all_ranks": here,
        "select_device": lambda: torch.device(found),
        "resolve_model": lambda _: SHIPPED_CONFIG,
        "build_model": lambda *_: pytest.fail("a model is built"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(run, name, stand_in)
    monkeypatch.setattr(run.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(devices, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**20, 2**20))
    key = {"cpu": r"hardware\.accelerator", "cuda": "RLIMIT_MEMLOCK"}[found]
    with pytest.raises(UserError, match=key):
        run.train(parse_config(tree), tmp_path, tmp_path / "out")


def test_a_waiting_checkpoint_is_a_heartbeat_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Read(Exception):
        pass

    def stop(*_: object) -> None:
        raise Read

    beats: list[str] = []
    checkpoints: Any = SimpleNamespace(waiting=None)
    monkeypatch.setattr(trainer.dist, "get_rank", stop)  # the next thing that it does
    made = object.__new__(trainer.Trainer)
    with pytest.raises(Read):
        made.__init__(*(None,) * 3, checkpoints, None, None)  # type: ignore[misc]
    made.progress, made.heartbeat = SimpleNamespace(step=7), beats.append  # type: ignore[assignment]
    checkpoints.waiting()
    assert len(beats) == 1


@pytest.mark.parametrize(
    ("capability", "leaves"), [((8, 0), False), ((9, 0), False), ((10, 0), True), ((12, 0), True)]
)
def test_the_grouped_matmul_of_blackwell_is_known(
    capability: tuple[int, int], leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    grouped_matmul.leaves_empty_groups.cache_clear()
    assert grouped_matmul.leaves_empty_groups(torch.device("cuda", 0)) == leaves
    grouped_matmul.leaves_empty_groups.cache_clear()
    assert not grouped_matmul.leaves_empty_groups(torch.device("cpu"))


def test_evaluation_and_merging_take_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8, 80))
    assert model_run.find_device() == torch.device("cuda", 3)
    assert device_with_memory(7) == torch.device("cuda")
    assert device_with_memory(8) == torch.device("cpu"), "the GPU has no more than that free"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_run.find_device() == torch.device("cpu")
    assert device_with_memory(7) == torch.device("cpu")


def test_ranks_with_gpus_also_have_gloo_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(processes.dist, "rendezvous", lambda _: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(
        processes.dist, "init_process_group", lambda backend, **_: given.append(backend)
    )
    for device in (torch.device("cuda"), torch.device("cpu")):
        processes.start_processes(functools.partial(torch.device, device))
    assert given == ["cpu:gloo,cuda:nccl", "gloo"]


def test_peak_memory_is_the_allocators_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7)
    assert trainer._peak_memory(torch.device("cuda")) == 7
    assert trainer._peak_memory(torch.device("cpu")) > 2**20


@pytest.mark.parametrize("cuda", [True, False])
def test_a_checkpoint_is_copied_into_pinned_memory_once_the_last_update_is_done(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Stager:
        def __init__(self, options: Any) -> None:
            events.append((options.use_pinned_memory, options.use_non_blocking_copy))

        def stage(self, _: Any) -> Future[Any]:
            events.append("copied")
            return Future()

    stream = SimpleNamespace(synchronize=lambda: events.append("updated"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    stager = HostStager(Stager)
    state: Any = {"a": SimpleNamespace(is_cuda=cuda)}
    for _ in range(2):
        stager.start(state)
    copy = ["updated", "copied"] if cuda else ["copied"]
    assert events == [(cuda, cuda), *copy, *copy], "pinned once, for all checkpoints"

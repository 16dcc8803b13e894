"""One rank's step in one process: what it holds, tensor by tensor, and what it would receive from
other ranks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from transformers import DiffusionGemmaConfig

from benchmarks.engine import sharded_model
from canvastune.config import RunConfig
from canvastune.data.packing import PackedBatch
from canvastune.distributed.parallelize import local_tensor
from canvastune.model import scratch
from canvastune.objective import losses
from canvastune.perf_model.memory import StepShape


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive, and the bytes that collectives bring from other ranks."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[int, weakref.ref]] = {}
        self.now = self.peak = 0
        self.received: Counter[str] = Counter()
        for tensor in held:
            self._see(tensor)
        self.held = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "allgather_base" in str(func):
            self.received["all-gather"] += args[0].nbytes - args[1].nbytes
        elif "reduce_scatter_base" in str(func):
            self.received["reduce-scatter"] += args[1].nbytes - args[0].nbytes
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                self._see(value)
        self.peak = max(self.peak, self.now)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count until the end of the block, also storages that FSDP frees and allocates again."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._resized(storage)

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_), self:
            yield

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            size, reference = self.sizes[storage._cdata]
            self.sizes[storage._cdata] = storage.nbytes(), reference
            self.now += storage.nbytes() - size
            self.peak = max(self.peak, self.now)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._drop(key))
            self.now += storage.nbytes()

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)[0]


@contextmanager
def lone_rank(world_size: int) -> Iterator[None]:
    """Rank 0 of a world whose other ranks do not exist: collectives take and give memory, and bring
    nothing.
    """
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(config: RunConfig, model_config: DiffusionGemmaConfig, step: StepShape) -> LiveBytes:
    """Run the forwards and backwards of one optimizer step, with the optimizer state allocated; the
    values are arbitrary.
    """
    received: Counter[str] = Counter()

    def echo(output: torch.Tensor, rows: torch.Tensor, *_: object, **__: object) -> None:
        """Return the rows as if every other rank sent what it receives: the experts get as many
        rows as the rank has.
        """
        output.copy_(rows)
        if rows.is_floating_point():
            received["all-to-all"] += rows.nbytes * (step.ep - 1) // step.ep

    batch = batch_of(step, model_config.text_config.vocab_size)
    with (
        lone_rank(step.world_size),
        mock.patch.object(dist, "all_to_all_single", echo),
        mock.patch.object(scratch, "KEPT_BYTES", 0),  # as on a GPU
    ):
        model = sharded_model(config, model_config, step.world_size).to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            local_tensor(tensor.detach()).fill_(0.01)
        parameters = [local_tensor(parameter.detach()) for parameter in model.parameters()]
        trained = [
            local_tensor(parameter.detach())
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        states = [torch.zeros_like(tensor) for tensor in trained for _ in ("exp_avg", "exp_avg_sq")]
        live = LiveBytes([*parameters, *states])
        with live.watching():
            for _ in range(step.micro_steps):
                any_self_conditioned = step.self_conditioning > 0
                loss, _, _ = model.run_under_fsdp(
                    losses,
                    batch,
                    (1.0, 1.0),
                    any_self_conditioned=any_self_conditioned,
                    checkpointing=step.checkpointing,
                )
                loss.backward()
                del loss
    live.received += received
    return live


def batch_of(step: StepShape, vocabulary: int) -> PackedBatch:
    """Examples of one length, all denoised twice if self-conditioning is on; the last blocks are
    the chosen ones.
    """
    examples, clean, canvas, blocks = step.micro_batch, step.clean, step.canvas, step.blocks
    canvases = examples * blocks
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(examples * clean).view(examples, clean)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(2, vocabulary, (count,), generator=generator)

    return PackedBatch(
        clean=tokens(examples * clean),
        clean_positions=torch.arange(clean).repeat(examples),
        canvas=tokens(canvases * canvas),
        canvas_positions=torch.arange(clean - blocks * canvas, clean).repeat(examples),
        canvas_targets=tokens(canvases * canvas),
        next_rows=rows[:, :-1].flatten(),
        next_targets=tokens(examples * (clean - 1)),
        clean_lengths=(clean,) * examples,
        canvas_lengths=(canvas,) * canvases,
        canvas_examples=tuple(at for at in range(examples) for _ in range(blocks)),
        block_starts=step.pasts * examples,
        self_conditioned=(step.self_conditioning > 0,) * canvases,
        row_keys=torch.arange(step.tokens),
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _grouped(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """[R, k] by [E, k, n], each row by one expert; or [m, R] by [R, n], summed over each expert's
    rows.
    """
    return 2 * first[0] * first[1] * second[-1]


def _added(_: Any, first: Any, second: Any, *__: Any, **___: Any) -> int:
    return 2 * first[0] * first[1] * second[1]


# What torch counts no FLOPs for: its CPU attention, the grouped matmul, and a product that is added
# in place.
CPU_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten.addmm_: _added,
}

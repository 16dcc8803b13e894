"""What collectives bring a rank from other ranks, counted at c10d as a step runs, with what is
alive meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.utils.hooks import RemovableHandle

from benchmarks.instruments.live_bytes import LiveBytes
from canvastune.perf_model.flops import (
    EXCHANGE,
    EXPERTS_GATHER,
    EXPERTS_REDUCE,
    LAYERS_GATHER,
    REDUCE,
    ROOT_GATHER,
)

SMALL = "counts, losses, norm"
KINDS = (LAYERS_GATHER, ROOT_GATHER, REDUCE, EXPERTS_GATHER, EXPERTS_REDUCE, EXCHANGE, SMALL)


class Traffic(LiveBytes):
    """What is alive, and what each collective brings from other ranks; a collective that it does
    not know is an error.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__(held)
        self.received_by_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.gathers: Counter[str] = Counter()  # of FSDP groups, by their first parameter
        self.needed = 0  # rows that have to cross to or from other ranks' experts
        self._kind = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            kind, count = self._brought(func.__name__.split(".")[0], args)
            self.received_by_kind[kind] += count
        return out

    def watch_routing(self, experts: Any, has_coin: bool) -> RemovableHandle:
        """Count at a layer's router the rows that need another rank's experts: there and back, and
        the gradients in a forward pass.
        """
        group: dist.ProcessGroup = experts.ep_group

        def before(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            away = int((inputs[1] // (experts.num_experts // group.size()) != group.rank()).sum())
            in_backward = torch._C._current_graph_task_id() >= 0  # recomputed
            forward = 4 if torch.is_grad_enabled() else 2 * has_coin
            self.needed += away * (2 if in_backward else forward)

        handle: RemovableHandle = experts.register_forward_pre_hook(before)
        return handle

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count until the end of the block, by part of the model."""
        gathers = EXPERTS_GATHER, LAYERS_GATHER, ROOT_GATHER
        reductions = EXPERTS_REDUCE, REDUCE, REDUCE
        with (
            mock.patch.object(
                fsdp, "foreach_all_gather", self._told(fsdp.foreach_all_gather, gathers)
            ),
            mock.patch.object(fsdp, "foreach_reduce", self._told(fsdp.foreach_reduce, reductions)),
            super().watching(),
        ):
            yield

    def _told(
        self, function: Callable[..., Any], kinds: tuple[str, str, str]
    ) -> Callable[..., Any]:
        def told(parameters: list[Any], *args: Any, **kwargs: Any) -> Any:
            names = [parameter._param_fqn for parameter in parameters]
            experts, layers, root = kinds
            self._kind = layers if ".layers." in names[0] else root
            if all(".experts." in name for name in names):
                self._kind = experts
            if "gather" in self._kind:
                self.gathers[names[0]] += 1
            return function(parameters, *args, **kwargs)

        return told

    def _brought(self, operation: str, args: tuple) -> tuple[str, float]:
        """Return the kind of a collective, and the bytes it receives by definition, whatever its
        algorithm.
        """
        if operation == "allreduce_":
            others = 1 - 1 / dist.ProcessGroup.unbox(args[1]).size()
            return SMALL, sum(tensor.nbytes for tensor in args[0]) * 2 * others
        output, given = args[:2]
        group = dist.ProcessGroup.unbox(args[2])
        if operation in ("_allgather_base_", "_reduce_scatter_base_"):
            return self._kind, abs(output.nbytes - given.nbytes)
        if operation == "alltoall_base_":
            whole = args[3] or [len(output) // group.size()] * group.size()
            received = (sum(whole) - whole[group.rank()]) * output[:1].nbytes
            return EXCHANGE if output.is_floating_point() else SMALL, received
        raise RuntimeError(f"{operation}: a collective that the benchmark cannot count")

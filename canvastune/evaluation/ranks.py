"""The ranks of an evaluation: one queue of work for all, and experts that are divided over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from canvastune.checkpoint.hf_inference import load_expert_share, load_stock
from canvastune.distributed.processes import exit_without_cleanup
from canvastune.distributed.sync import gather_results, run_on_all_ranks, run_on_rank0
from canvastune.errors import UserError
from canvastune.evaluation.answer_cache import AnswerCache
from canvastune.logging import log_error

_QUEUES = itertools.count()  # of this process; all ranks make the same ones

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """Only this process, or all ranks of a process group.

    `ep` neighboring ranks share the experts of one model; each such group has the whole model. Every
    rank answers other questions.
    """

    def __init__(self, ep: int | None = None) -> None:
        """Take the ranks of the default process group, each of which makes this call.

        Args:
            ep: None: only this process.
        """
        self.ep = ep or 1
        self.rank, self.count = (0, 1) if ep is None else (dist.get_rank(), dist.get_world_size())
        self._passes: SharedPasses | None = None
        self._group: dist.ProcessGroup | None = None
        if self.ep > 1:
            firsts = range(0, self.count, self.ep)
            members = [range(first, first + self.ep) for first in firsts]
            groups = [dist.new_group(list(ranks)) for ranks in members]
            self._group = groups[self.rank // self.ep]

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the result."""
        return self.rank == 0

    def load(self, checkpoint: Path, device: torch.device) -> Any:
        """Load a stock model, or this rank's share of it."""
        if self._group is None:
            return load_stock(checkpoint, device)
        self._passes = None  # it holds the experts of the model before
        model = load_expert_share(checkpoint, device, self._group)
        self._passes = SharedPasses(model, self._group)
        return model

    def open_cache(self, path: Path) -> AnswerCache:
        """Open the file that saves partial results: a rank's own, which the first rank reads where
        an earlier attempt left it.

        Raises:
            UserError: as `AnswerCache`, on every rank.
        """
        opened: list[AnswerCache] = []

        def open_first() -> None:
            cache = AnswerCache(path)
            opened.append(cache)
            for other in sorted(path.parent.glob(f"{path.name}.rank-*")):
                with AnswerCache(other) as found:
                    cache.add(found)
                    found.delete()

        self.on_first(open_first)
        if self.count > 1:
            own = path.with_name(f"{path.name}.rank-{self.rank}")
            run_on_all_ranks(lambda: None if self.is_first else opened.append(AnswerCache(own)))
        return opened[0]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first rank; return its result, or raise its UserError, on all."""
        return function() if self.count == 1 else run_on_rank0(function)

    def share_out(
        self,
        items: Sequence[Item],
        work: Callable[[Iterator[Item]], Iterable[Result]],
        ended: Callable[[Result, int], None],
    ) -> list[Result]:
        """Have all ranks take items from one queue; return the results of all, on every rank.

        Args:
            work: gets the items that this rank takes, one whenever it is ready for one, and yields
                what comes of each.
            ended: called with each of this rank's results, and with the number of all ranks' since
                the one before.

        Raises:
            UserError: the first that a rank raised, on every rank.
        """
        if self.count == 1:
            results = []
            for result in work(iter(items)):
                ended(result, 1)
                results.append(result)
            return results
        # Counters that all ranks share: who asks first gets the next item.
        store = dist.PrefixStore(
            f"queue-{next(_QUEUES)}", dist.distributed_c10d._get_default_store()
        )

        def take() -> Iterator[Item]:
            while (place := store.add("taken", 1) - 1) < len(items):
                yield items[place]

        def own() -> list[Result]:
            results, known = [], 0
            try:
                for result in work(take()):
                    total = store.add("ended", 1)
                    ended(result, total - known)
                    results.append(result)
                    known = total
            except UserError as error:
                if self.ep == 1:  # the others answer what they have taken
                    raise
                # They wait for this rank in the middle of a layer: torchrun has to end them.
                log_error(error)
                exit_without_cleanup(1)
            if self._passes is not None:
                self._passes.finish()
            return results

        return [result for results in gather_results(own) for result in results]


class SharedPasses:
    """Passes through layers whose experts are divided over the ranks of a group.

    Each layer exchanges rows between all ranks. Hence every pass of a rank, through the encoder or
    the decoder, is one of all: a rank that has nothing left to do serves its experts to the others.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup) -> None:
        self._group = group
        # Not the layers: the first one holds the hook below, and so this object.
        self._routed = [(layer.router, layer.experts) for layer in model.model.decoder.layers]
        for stack in (model.model.encoder.language_model, model.model.decoder):
            stack.layers[0].register_forward_pre_hook(self._begin)

    @torch.no_grad()
    def finish(self) -> None:
        """Serve this rank's experts until all ranks of the group have finished."""
        while self._announce(0.0):
            for router, experts in self._routed:
                weight = router.proj.weight
                row = weight.new_zeros(1, weight.shape[1])  # its result is not used
                _, weights, chosen = router(row)
                experts(row, chosen, weights)

    def _begin(self, *_: object) -> None:
        self._announce(1.0)

    def _announce(self, passing: float) -> bool:
        """Return whether any rank runs a pass now."""
        device = self._routed[0][0].proj.weight.device
        some = torch.tensor(passing, device=device)
        dist.all_reduce(some, dist.ReduceOp.MAX, group=self._group)
        return bool(some)

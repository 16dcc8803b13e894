"""What the ranks of a run tell each other beside tensors: one rank's result for all, what each found, and who hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from canvastune.errors import UserError

Result = TypeVar("Result")


def run_on_rank0(function: Callable[[], Result]) -> Result:
    """Call on rank 0 and give every rank its result, or its UserError: no rank waits for one that has failed."""
    outcome: Result | None = None
    problem: UserError | None = None
    if dist.get_rank() == 0:
        try:
            outcome = function()
        except UserError as error:
            problem = error
    shared: list[Any] = [outcome, problem]
    dist.broadcast_object_list(shared)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


def gather_results(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Call on every rank and give all of them all results, or the first rank's UserError."""
    outcome: Result | None = None
    problem: UserError | None = None
    try:
        outcome = function()
    except UserError as error:
        problem = error
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (outcome, problem), group=group)
    for _, found in gathered:
        if found is not None:
            raise found
    return [result for result, _ in gathered]


def run_on_all_ranks(function: Callable[[], Result]) -> Result:
    """Call on every rank and give each its own result; where one is refused, all of them get the first rank's UserError."""
    results: list[Result] = []
    gather_results(lambda: results.append(function()))
    return results[0]

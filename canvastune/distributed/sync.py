"""Share Python results, and the errors of one rank, with all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from canvastune.errors import UserError

Result = TypeVar("Result")


def run_on_rank0(function: Callable[[], Result]) -> Result:
    """Call a function on rank 0 and return its result, or raise its UserError, on every rank.

    No rank waits for a rank that has failed.
    """
    shared: list[Any] = [*_attempt(function)] if dist.get_rank() == 0 else [None, None]
    dist.broadcast_object_list(shared)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


def gather_results(
    function: Callable[[], Result], group: dist.ProcessGroup | None = None
) -> list[Result]:
    """Call a function on every rank and return all results, by rank, on every rank.

    Raises:
        UserError: that of the lowest rank that raised one, on every rank.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, _attempt(function), group=group)
    for _, found in gathered:
        if found is not None:
            raise found
    return [each for each, _ in gathered]


def run_on_all_ranks(function: Callable[[], Result]) -> Result:
    """Call a function on every rank and return each rank's own result.

    Unlike `gather_results`, the result need not be serializable.

    Raises:
        UserError: that of the lowest rank that raised one, on every rank.
    """
    results: list[Result] = []
    gather_results(lambda: results.append(function()))
    return results[0]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error

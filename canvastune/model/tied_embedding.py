"""The embedding table, which a step uses in three ways, with its gradient summed in one buffer.

With plain autograd, each use (lookups, soft embedding, head) allocates a full [V, H] gradient, of
which a lookup fills a few rows, and all of them are kept until they are added. Here each use adds
to one buffer, and the last use returns it.

Shape letters: V vocabulary, H hidden size, R rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Variable
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaTextScaledWordEmbedding,
)


class SharedGradBuffer:
    """The gradient buffer of one forward and backward pass.

    Each use is registered in the forward pass and released in the backward pass.
    """

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None  # [V, H] in the table's dtype
        self._pending = 0

    def register_use(self) -> None:
        """Expect one more release."""
        self._pending += 1

    def release(self) -> torch.Tensor | None:
        """Return the gradient that a use, having added its part, gives autograd: the sum for the
        last use, else None.
        """
        if not self._pending:
            raise RuntimeError(
                "the table's gradient was already returned: a second backward pass through one step"
            )
        Variable._execution_engine.queue_callback(self._check)
        self._pending -= 1
        if self._pending:
            return None
        total, self.sum = self.sum, None
        return total

    def _check(self) -> None:
        """Check at the end of the backward pass that no use withheld the others' gradient."""
        if self._pending:
            raise RuntimeError(
                f"{self._pending} uses of the embedding table took no part in the backward pass:"
                " its gradient is lost"
            )


_CURRENT: ContextVar[SharedGradBuffer | None] = ContextVar("table_gradient", default=None)


@contextlib.contextmanager
def accumulate_gradients(gradient: SharedGradBuffer | None) -> Iterator[None]:
    """Make lookups inside the block add their gradient to this buffer; None: leave it to autograd."""
    token = _CURRENT.set(gradient)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class SharedEmbedding(DiffusionGemmaTextScaledWordEmbedding):
    """The stock table and lookup; inside `accumulate_gradients`, the lookup's gradient goes to the
    buffer.
    """

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids int64[...] -> [..., H]."""
        gradient = _CURRENT.get()
        if gradient is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input_ids)
        return _Lookup.apply(
            self.weight, input_ids, self.padding_idx, gradient
        ) * self.embed_scale.to(self.weight.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: torch.Tensor,
        ids: torch.Tensor,
        padding: int | None,
        gradient: SharedGradBuffer,
    ) -> torch.Tensor:
        gradient.register_use()
        ctx.save_for_backward(ids)
        ctx.table, ctx.padding, ctx.gradient = (table.shape, table.dtype), padding, gradient
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (ids,) = ctx.saved_tensors
        gradient: SharedGradBuffer = ctx.gradient
        if gradient.sum is None:
            gradient.sum = upstream.new_zeros(ctx.table[0], dtype=ctx.table[1])
        _add_rows(gradient.sum, ids.flatten(), upstream.flatten(0, -2), ctx.padding)
        return gradient.release(), None, None, None


def _add_rows(
    table: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, padding: int | None
) -> None:
    """Add rows to table[ids], except for the padding id; deterministic on every device, without
    synchronization.

    Rows of the same id are summed first, so that the addition to the table writes no row twice.
    """
    ids, order = ids.sort(stable=True)
    number = torch.zeros_like(ids)  # index of each row's id among the distinct ids
    number[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    # [R, H]: one sum per distinct id, then zeros.
    sums = torch.ops.aten.embedding_dense_backward(rows[order], number, len(ids), -1, False)
    targets = torch.zeros_like(ids).scatter_(0, number, ids)
    if padding is not None:
        sums.masked_fill_((targets == padding)[:, None], 0)
    table.index_add_(0, targets, sums.to(table.dtype))

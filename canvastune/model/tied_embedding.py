"""The embedding table, which a step uses in three ways, and its gradient, summed in one buffer.

Left to autograd, each use (the lookups, the soft embedding, the head) makes a whole [V, H] gradient of its own, of which a lookup
fills a few rows, and all are kept until they are added. Here each use adds to one buffer, and the last one to come hands it over.

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
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextScaledWordEmbedding


class SharedGradBuffer:
    """The buffer of one forward and backward pass: every use is announced in the forward pass and comes back in the backward pass."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None  # [V, H] in the table's dtype
        self._awaited = 0

    def register_use(self) -> None:
        """One use more will come back."""
        self._awaited += 1

    def release(self) -> torch.Tensor | None:
        """A use has come back and added its part -> its gradient for autograd: the sum for the last one, nothing for the others."""
        if not self._awaited:
            raise RuntimeError("the table's gradient was handed over before: a second backward pass through one step")
        Variable._execution_engine.queue_callback(self._check)
        self._awaited -= 1
        if self._awaited:
            return None
        whole, self.sum = self.sum, None
        return whole

    def _check(self) -> None:
        """At the end of the backward pass: a use that never came back would have kept the others' gradient."""
        if self._awaited:
            raise RuntimeError(f"{self._awaited} uses of the embedding table took no part in the backward pass: its gradient is lost")


_CURRENT: ContextVar[SharedGradBuffer | None] = ContextVar("table_gradient", default=None)


@contextlib.contextmanager
def accumulate_gradients(gradient: SharedGradBuffer | None) -> Iterator[None]:
    """Lookups inside add to this buffer; None: autograd's own way."""
    token = _CURRENT.set(gradient)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class SharedEmbedding(DiffusionGemmaTextScaledWordEmbedding):
    """The stock table with its stock lookup; inside `collecting`, the lookup's gradient goes to the buffer."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64[...] -> [..., H]."""
        gradient = _CURRENT.get()
        if gradient is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input_ids)
        return _Lookup.apply(self.weight, input_ids, self.padding_idx, gradient) * self.embed_scale.to(self.weight.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, ids: torch.Tensor, padding: int | None, gradient: SharedGradBuffer) -> torch.Tensor:
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


def _add_rows(table: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, padding: int | None) -> None:
    """table[ids] += rows, but for the padding id; deterministic on every device, and without waiting for it.

    Rows of one id are summed first, so that no id is written twice by the addition to the table.
    """
    ids, order = ids.sort(stable=True)
    number = torch.zeros_like(ids)  # of each row's id among the different ones
    number[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    # [R, H]: as many sums as there are different ids, then zeros.
    sums = torch.ops.aten.embedding_dense_backward(rows[order], number, len(ids), -1, False)
    targets = torch.zeros_like(ids).scatter_(0, number, ids)
    if padding is not None:
        sums.masked_fill_((targets == padding)[:, None], 0)
    table.index_add_(0, targets, sums.to(table.dtype))

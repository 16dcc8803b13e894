"""The bytes that the operators of a run read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VIEWS: tuple[str, ...] = (
    *("view", "expand", "slice", "select", "split", "transpose", "permute", "detach", "alias"),
    *("unsqueeze", "squeeze", "unbind", "as_strided", "t", "diagonal", "chunk", "_reshape_alias"),
    *("split_with_sizes", "_unsafe_view"),
)
_LOOKUPS = ("embedding", "index_select", "index", "gather")  # read of a table what they return


class OperatorBytes(TorchDispatchMode):
    """Counts the bytes of all operators' inputs and outputs, each as often as an operator reads or
    writes it: the traffic of a device whose caches hold no whole tensor.
    """

    def __init__(self, counting: Callable[[], bool] = lambda: True) -> None:
        """
        Args:
            counting: whether to count the operators that run now.
        """
        super().__init__()
        self.bytes = 0
        self._counting = counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._counting() and name not in _VIEWS:
            moved = (out, out) if name in _LOOKUPS else (args, kwargs, out)
            for leaf in tree_leaves(moved):
                if isinstance(leaf, torch.Tensor):
                    self.bytes += leaf.numel() * leaf.element_size()
        return out

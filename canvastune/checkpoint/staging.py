"""Copy a training state to host memory, while the next step computes its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from canvastune.distributed.parallelize import local_tensor

State = dict[str, torch.Tensor]


class HostStager:
    """The copy of a state in host memory; on CUDA it is pinned, which takes longer than the copy.

    The memory is kept for the next state, whose tensors have to be the same ones.
    """

    def __init__(self, make_stager: Callable[[StagingOptions], Any] = DefaultStager) -> None:
        self._make_stager = make_stager
        self._stager: Any = None

    def start(self, state: Mapping[str, torch.Tensor]) -> Future[State]:
        """Copy in a separate thread, on CUDA on a separate stream.

        The state may not change before the future is done.
        """
        cuda = any(local_tensor(tensor).is_cuda for tensor in state.values())
        if self._stager is None:
            self._stager = self._make_stager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=True,
                    use_non_blocking_copy=cuda,
                )
            )
        if cuda:  # the copying stream does not wait for the last update
            torch.cuda.current_stream().synchronize()
        staging = self._stager.stage(state)
        assert isinstance(staging, Future)
        return staging

    def close(self) -> None:
        """Free the memory."""
        if self._stager is not None:
            self._stager.close()

"""Write a rank's part of a checkpoint without holding up the training thread."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a rank's shard as safetensors files that `HuggingFaceStorageReader` reads.

    torch 2.13's own writer serializes a whole file into memory first, which holds the interpreter
    lock all the while: the training thread could launch nothing. `save_file` copies nothing and
    releases the lock.
    """

    def __init__(self, folder: Path, files: dict[str, int]) -> None:
        """
        Args:
            files: the file of each tensor, numbered from 1.
        """
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self._folder, self._files = folder, files

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's tensors; those on a device are copied to the host file by file."""
        files: dict[int, list[WriteItem]] = {}
        for item in plan.items:
            files.setdefault(self._files[item.index.fqn], []).append(item)
        shard, last = plan.storage_data["shard_index"], max(self._files.values())
        results = []
        for number, items in files.items():
            tensors, offsets = {}, {}
            for item in items:
                assert item.tensor_data is not None  # only tensors are saved
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                name = item.index.fqn
                tensors[name] = tensor.detach().cpu().contiguous()
                offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
                results.append(WriteResult(item.index, tensor.nbytes, storage_data=None))
            file = f"shard-{shard:05d}-model-{number:05d}-of-{last:05d}.safetensors"
            # The reader's key for which part of a tensor the shard holds. It is the only
            # one: safetensors writes several in random order, and equal states would differ.
            save_file(tensors, self._folder / file, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(results)
        return written

"""Resume checkpoints: trained weights and optimiser state as sharded safetensors, readable at any number of ranks.

A checkpoint is a folder `step-NNNNNN`; it counts only when its `complete.json` stands, which is written last.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.outputs import sync_tree

_MARKER = "complete.json"
# Sections and keys that may change between two attempts at one run: none of them changes a weight.
_MAY_CHANGE = (
    "parallel.",
    "tracking.",
    "evaluate.",
    "hardware.",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.log_every",
    "train.validate",
    "train.validation",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


class Checkpoints:
    """The checkpoints of one training run."""

    def __init__(self, folder: Path, config: RunConfig, data_fingerprint: str) -> None:
        self._folder = folder
        self._keep = config.train.keep_checkpoints
        self._identity = {**_flat(config.model_dump(mode="json")), "data": data_fingerprint}

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None.

        Raises:
            UserError: the checkpoint belongs to another run; names the first difference.
        """
        steps = self._complete_steps()
        if not steps:
            return None
        marker = json.loads((self._path(steps[-1]) / _MARKER).read_text(encoding="utf-8"))
        for key, now in self._identity.items():
            then = marker["identity"].get(key)
            if then != now and not key.startswith(_MAY_CHANGE):
                raise UserError(
                    f"{self._path(steps[-1])}: checkpoint of another run: {key} was {then!r} and is now {now!r}. "
                    "Give another --output, or the recipe and data it was started with"
                )
        return steps[-1]

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Path:
        """Write the state after `step` steps, on all ranks together; older checkpoints beyond `keep_checkpoints` go."""
        path = self._path(step)
        if _rank() == 0:
            shutil.rmtree(path, ignore_errors=True)  # an earlier attempt's, without its marker
            path.mkdir(parents=True)
        _barrier()
        dcp.save(_state(parameters, optimizer), storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
        if _rank() == 0:
            sync_tree(path)
            marker = {"step": step, "time": time.time(), "identity": self._identity}
            partial = path / f".{_MARKER}"
            partial.write_text(json.dumps(marker), encoding="utf-8")
            partial.rename(path / _MARKER)
            sync_tree(path)
            for old in self._complete_steps()[: -self._keep]:
                shutil.rmtree(self._path(old))
        _barrier()
        return path

    def load(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Read the state after `step` steps into the parameters and the optimiser, however many ranks wrote it."""
        _create_state(optimizer)
        state = _state(parameters, optimizer)
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(self._path(step))))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _complete_steps(self) -> list[int]:
        return sorted(int(marker.parent.name.removeprefix("step-")) for marker in self._folder.glob(f"step-*/{_MARKER}"))


def _state(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flat names to the very tensors in use, so that loading fills them in place. Contains tensors alone: nothing is pickled."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        state[f"model.{name}"] = parameter.data
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    # A step at rate zero on zero gradients makes AdamW's moments and changes no weight; loading then overwrites them.
    for group in optimizer.param_groups:
        group["lr"], before = 0.0, group["lr"]
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        group["before"] = before
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["lr"] = group.pop("before")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

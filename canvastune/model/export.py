"""Write what was trained, tensor by tensor: a complete checkpoint in the Hub's layout, or an adapter in PEFT's."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from canvastune.config import RunConfig
from canvastune.model.adapter import write_adapter
from canvastune.model.checkpoint_files import CheckpointReader, CheckpointWriter, copy_side_files
from canvastune.model.lora import base_name, factors
from canvastune.model.shared import SharedModel
from canvastune.outputs import whole_folder


def export_model(model: SharedModel, config: RunConfig, base: Path, out: Path) -> None:
    """Write the whole model to `out`, on all ranks together; each holds its shard and one whole tensor at a time.

    Every tensor of the base checkpoint appears, under its name, shape and dtype: trained ones with their new values, the
    vision tower and the layer scalars as they were. Configuration, tokenizer and generation config are the base's own files.
    """
    checkpoint = CheckpointReader(base)
    trained = {base_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if dist.get_rank() != 0:
        for name in checkpoint.names():
            if name in trained:
                _whole(trained[name])
        dist.barrier()
        return
    with whole_folder(out) as partial:
        copy_side_files(base, partial)
        with CheckpointWriter(partial, {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()}) as writer:
            for name in checkpoint.names():
                tensor = _whole(trained[name]) if name in trained else checkpoint.get(name)
                writer.write(name, tensor.to("cpu", checkpoint.dtype(name)))
    dist.barrier()


def export_adapter(model: SharedModel, config: RunConfig, base: Path, out: Path) -> None:
    """Write the adapter to `out`, on all ranks together, so that stock PEFT loads it."""
    whole = {name: (_whole(a).cpu(), _whole(b).cpu()) for name, a, b in factors(model)}
    if dist.get_rank() == 0:
        with whole_folder(out) as partial:
            write_adapter(partial, whole, config, base)
    dist.barrier()


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data

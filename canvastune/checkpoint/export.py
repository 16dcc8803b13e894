"""Write trained weights, tensor by tensor.

A complete checkpoint in the Hub's layout, or an adapter in PEFT's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from canvastune.checkpoint.generation_config import write_generation_file
from canvastune.checkpoint.hf_format import CheckpointReader, CheckpointWriter
from canvastune.checkpoint.hub import SIDE_FILES, copy_files
from canvastune.checkpoint.model_card import data_figures, write_model_card
from canvastune.checkpoint.peft_adapter import write_adapter
from canvastune.config import RunConfig, write_config
from canvastune.io.atomic import atomic_directory
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.lora import lora_factors
from canvastune.model.parameter_names import base_name


def export_model(
    model: WeightTiedDiffusionGemma,
    config: RunConfig,
    base: Path,
    out: Path,
    prepared: Path | None = None,
) -> None:
    """Write the whole model to `out`; a collective call.

    In addition to its shard, rank 0 holds one whole tensor, others none.

    Every tensor of the base checkpoint is written with its name, shape and dtype: trained ones with
    their new values, the vision tower and the layer scalars unchanged. Configuration, tokenizer and
    generation config are the base's own files.

    Args:
        prepared: the data set, whose figures the model card shows.
    """
    checkpoint = CheckpointReader(base)
    trained = {
        base_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if dist.get_rank() != 0:
        for name in checkpoint.names():
            if name in trained:
                _whole(trained[name], checkpoint.dtype(name))
        dist.barrier()
        return
    with atomic_directory(out) as partial:
        copy_files(base, partial, SIDE_FILES)
        write_generation_file(base, partial)
        write_config(config, partial / "config.yaml")
        write_model_card(partial, "full", config, base, data_figures(prepared))
        with CheckpointWriter(partial, checkpoint.specs()) as writer:
            for name in checkpoint.names():
                # No variable holds the tensor, so that the last one is freed before the next one is
                # gathered.
                writer.write(
                    name,
                    _whole(trained[name], checkpoint.dtype(name))
                    if name in trained
                    else checkpoint.get(name),
                )
    dist.barrier()


def export_adapter(
    model: WeightTiedDiffusionGemma,
    config: RunConfig,
    base: Path,
    out: Path,
    prepared: Path | None = None,
) -> None:
    """Write the adapter to `out` so that stock PEFT loads it; a collective call.

    Rank 0 holds all of it.

    Args:
        prepared: the data set, whose figures the model card shows.
    """
    whole = {name: (_whole(a, a.dtype), _whole(b, b.dtype)) for name, a, b in lora_factors(model)}
    if dist.get_rank() == 0:
        with atomic_directory(out) as partial:
            data = data_figures(prepared)
            write_adapter(partial, whole, config, base, data)
            write_config(config, partial / "config.yaml")  # `canvastune merge` needs nothing else
            write_model_card(partial, "adapter", config, base, data)
    dist.barrier()


def _whole(parameter: torch.nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """Gather a parameter in `dtype` on rank 0's CPU.

    Other ranks get only its shape (the meta device).

    Part by part, from rank to rank. `full_tensor()` would need memory for the whole and for the
    collective's copies of it on every rank.
    """
    data = parameter.detach()
    if not isinstance(data, DTensor):
        return data.to("cpu", dtype)
    own = dist.get_rank()
    whole = torch.empty(data.shape, dtype=dtype, device="cpu" if own == 0 else "meta")
    mesh = data.device_mesh
    for rank in mesh.mesh.flatten().tolist():
        coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
        shape, offset = _compute_local_shape_and_global_offset(
            data.shape, mesh.shape, coordinate, data.placements
        )
        if not math.prod(shape):
            continue
        if own == 0:
            part = data.to_local()
            if rank != 0:
                part = torch.empty(shape, dtype=dtype, device=data.device)
                dist.recv(part, rank)
            whole[
                tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            ] = part.cpu()
        elif rank == own:
            dist.send(data.to_local().to(dtype).contiguous(), 0)
    return whole

"""Load a checkpoint into the stock transformers model, as any user does.

For generation and for the merge's proof.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaTextRotaryEmbedding,
)
from transformers.utils import logging

from canvastune.checkpoint.generation_config import read_generation_file
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import DECODER_SCALAR, ENCODER_SCALAR, read_model_config
from canvastune.errors import UserError
from canvastune.model import moe


def load_stock(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> DiffusionGemmaForBlockDiffusion:
    """Load a checkpoint for inference.

    Args:
        dtype: of the weights in memory; None: as stored.

    Raises:
        UserError: a checkpoint that is broken, or one that lacks a value the model needs.
    """
    CheckpointReader(folder)  # names a broken file, which transformers does not
    with _quiet():
        loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map=device,
            local_files_only=True,
            # Stock refuses to load a model for one unknown key of this file.
            generation_config=read_generation_file(folder).stock(),
            output_loading_info=True,
        )
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:
            first = sorted(str(key) for key in report[kind])[0]
            raise UserError(
                f"{folder}: {len(report[kind])} {kind.replace('_', ' ')}, the first is {first}",
                hint="Use a complete checkpoint.",
            )
    return model.eval()


def load_expert_share(folder: Path, device: torch.device, group: dist.ProcessGroup) -> Any:
    """Load a checkpoint whose experts are divided over the ranks of a group, for text.

    Everything but the experts is on each rank; the vision tower stays on the meta device. Rows
    travel to the rank of their expert and back, so every rank has to run each pass through the
    layers when the others do.

    Raises:
        UserError: as `load_stock`; experts that do not divide over the ranks.
    """
    reader, config = CheckpointReader(folder), read_model_config(folder)
    ranks, rank = group.size(), group.rank()
    experts = config.text_config.num_experts
    if experts % ranks:
        raise UserError(
            f"evaluate.gpus: {experts} experts do not divide over {ranks} GPUs",
            hint="Choose another number of GPUs.",
        )
    own = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
    config._experts_implementation = moe.NAME
    with torch.device("meta"):
        model: Any = DiffusionGemmaForBlockDiffusion(config)
    decoder, encoder = model.model.decoder, model.model.encoder.language_model
    dtype = reader.dtype("model.decoder.embed_tokens.weight")
    for name, _ in list(decoder.named_parameters()):
        part = (own,) if ".experts." in name else ()
        tensor = reader.get_slice(f"model.decoder.{name}", part).to(device, dtype, copy=True)
        shared = nn.Parameter(tensor, requires_grad=False)
        _set_parameter(decoder, name, shared)
        if not name.startswith("self_conditioning."):
            _set_parameter(encoder, name, shared)
    model.lm_head.weight = decoder.embed_tokens.weight
    for stack, form in ((decoder, DECODER_SCALAR), (encoder, ENCODER_SCALAR)):
        for index, layer in enumerate(stack.layers):
            layer.layer_scalar = reader.get(form.format(index)).to(device, dtype, copy=True)
            layer.experts.ep_group = group
        stack.rotary_emb = DiffusionGemmaTextRotaryEmbedding(config.text_config, device=device)
        stack.embed_tokens.embed_scale = torch.tensor(
            stack.embed_tokens.scalar_embed_scale, device=device
        )
    return model.eval()


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def load_stock_with_adapter(
    base: Path, adapter: Path, device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """Load the stock model with an adapter, as stock PEFT does.

    Return the model itself, whose adapted layers are PEFT's.

    Args:
        dtype: see `load_stock`.
    """
    model: Any = load_stock(base, device, dtype)
    with _quiet():
        return PeftModel.from_pretrained(model, str(adapter)).base_model.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and the libraries' FutureWarnings about each other.

    A step logs its own progress.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()

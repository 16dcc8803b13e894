"""Build the shared model without memory, and stream a checkpoint's tensors into whatever shards of it this rank holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import DiffusionGemmaConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.model.checkpoint_files import CheckpointReader
from canvastune.model.lora import add_adapters, base_name, initial_factor, is_adapter
from canvastune.model.shared import SharedModel

ENCODER_SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"
DECODER_SCALAR = "model.decoder.layers.{}.layer_scalar"
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_FROZEN = ("router.proj.weight", "router.scale", "router.per_expert_scale")


def read_model_config(folder: Path) -> DiffusionGemmaConfig:
    """The configuration of a checkpoint folder.

    Raises:
        UserError: not a DiffusionGemma.
    """
    try:
        config = DiffusionGemmaConfig.get_config_dict(folder, local_files_only=True)[0]
    except OSError as error:
        raise UserError(f"{folder}/config.json: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if config.get("model_type") != "diffusion_gemma":
        raise UserError(
            f"{folder}/config.json: model_type is {config.get('model_type')!r}, expected 'diffusion_gemma'. Give such a checkpoint"
        )
    return DiffusionGemmaConfig.from_dict(config)


def build_model(config: RunConfig, model_config: DiffusionGemmaConfig) -> SharedModel:
    """The shared model on the meta device, with adapters if `train.method` is lora, and its trained parameters marked.

    Trained: the adapters alone, or everything but the router (`proj`, `scale`, `per_expert_scale`).
    """
    with torch.device("meta"):
        model = SharedModel(model_config)
    lora = config.train.method == "lora"
    if lora:
        add_adapters(model, config.lora)
    compute = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) if lora else not name.endswith(_FROZEN))
        # Trained parameters are float32 masters; frozen ones need no more than the dtype they are computed in.
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute)
    model.train()
    return model


def load_weights(model: SharedModel, checkpoint: CheckpointReader, device: torch.device, seed: int) -> None:
    """Give a meta-device model, sharded or not, its memory and its values; each rank reads only the slices it holds.

    Adapters start as LoRA does (A uniform in +-1/sqrt(in), B zero), from the seed and the parameter's name alone.

    Raises:
        UserError: a tensor is missing, has another shape, is unknown, or the encoder's layer scalars differ from the decoder's.
    """
    model.to_empty(device=device)
    model.lm_head.weight = model.model.decoder.embed_tokens.weight  # to_empty makes two of one
    names = set(checkpoint.names())
    known = {base_name(name) for name, _ in model.named_parameters() if not is_adapter(name)}
    scalars = {form.format(i) for i in range(model.config.text_config.num_hidden_layers) for form in (DECODER_SCALAR, ENCODER_SCALAR)}
    unknown = sorted(name for name in names - known - scalars - {"lm_head.weight"} if not name.startswith(VISION))
    if unknown:
        raise UserError(
            f"{checkpoint.folder}: tensor {unknown[0]!r} is not part of a DiffusionGemma ({len(unknown)} such). Is it another model?"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, base_name(name), checkpoint, seed, adapter=is_adapter(name))
        _fill_buffers(model, checkpoint, device)


def _fill(parameter: nn.Parameter, name: str, checkpoint: CheckpointReader, seed: int, *, adapter: bool) -> None:
    shape = tuple(parameter.shape)
    slices = tuple(slice(0, size) for size in shape)
    local: torch.Tensor = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local_shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        slices = tuple(slice(start, start + size) for start, size in zip(offset, local_shape, strict=True))
    if adapter:
        local.copy_(initial_factor(name, shape, seed)[slices])
        return
    if checkpoint.shape(name) != shape:
        raise UserError(
            f"{checkpoint.folder}: tensor {name!r} has shape {list(checkpoint.shape(name))}, config.json asks for {list(shape)}"
        )
    if local.numel():
        local.copy_(checkpoint.get_slice(name, slices))


def _fill_buffers(model: SharedModel, checkpoint: CheckpointReader, device: torch.device) -> None:
    decoder = model.model.decoder
    for index, layer in enumerate(decoder.layers):
        scalar, twin = (checkpoint.get(form.format(index)) for form in (DECODER_SCALAR, ENCODER_SCALAR))
        if not torch.equal(scalar, twin):
            raise UserError(
                f"{checkpoint.folder}: layer {index}: the encoder's layer_scalar {twin.item():.6g} differs from "
                f"the decoder's {scalar.item():.6g}; one shared stack cannot hold both"
            )
        layer.layer_scalar.copy_(scalar)
    decoder.embed_tokens.embed_scale.fill_(decoder.embed_tokens.scalar_embed_scale)
    # Not in any checkpoint: recomputed, in float32 whatever the compute dtype.
    fresh = DiffusionGemmaTextRotaryEmbedding(model.config.text_config, device=device)
    for name, buffer in fresh.named_buffers():
        getattr(decoder.rotary_emb, name).copy_(buffer)

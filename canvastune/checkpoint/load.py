"""Build the model on the meta device, and stream a checkpoint into this rank's shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import DiffusionGemmaConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaTextRotaryEmbedding,
)

from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.truncation import DOWNLOAD_AGAIN
from canvastune.config import RunConfig
from canvastune.errors import UserError, one_line
from canvastune.model import kernels
from canvastune.model.attention import PACKINGS
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.lora import add_adapters, initial_factor
from canvastune.model.parameter_names import VISION, base_name, is_adapter, is_trained

ENCODER_SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"
DECODER_SCALAR = "model.decoder.layers.{}.layer_scalar"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def read_model_config(folder: Path) -> DiffusionGemmaConfig:
    """Read the configuration of a checkpoint folder, or a configuration file.

    Raises:
        UserError: not JSON, not a DiffusionGemma, or an invalid value.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot read the file: {one_line(error)}", hint=DOWNLOAD_AGAIN
        ) from None
    if model_type != "diffusion_gemma":
        raise UserError(
            f"{path}: found model_type {model_type!r}, expected 'diffusion_gemma'",
            hint="Use a DiffusionGemma checkpoint.",
        )
    try:
        found = DiffusionGemmaConfig.from_dict(config)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the configuration of a DiffusionGemma: {one_line(error)}",
            hint=DOWNLOAD_AGAIN,
        ) from None
    for key in (
        "num_experts",
        "top_k_experts",
        "moe_intermediate_size",
    ):  # the library accepts a model without experts too
        if getattr(found.text_config, key) is None:
            raise UserError(
                f"{path}: text_config.{key} is missing, but a DiffusionGemma has experts",
                hint=DOWNLOAD_AGAIN,
            )
    return found


def build_model(config: RunConfig, model_config: DiffusionGemmaConfig) -> WeightTiedDiffusionGemma:
    """Build the model on the meta device, with adapters for LoRA; mark its trained parameters.

    Trained: only the adapters, or everything but the router (`proj`, `scale`, `per_expert_scale`).

    Raises:
        UserError: a `lora.rank` that the experts' adapters cannot have.
    """
    kernels.allow(config.train.triton_kernels)
    with torch.device("meta"):
        model = WeightTiedDiffusionGemma(model_config, PACKINGS[config.train.attention])
    lora = config.train.method == "lora"
    compute = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    if lora:
        add_adapters(model, config.lora, compute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, lora=lora))
        # Trained parameters are float32 masters; frozen ones need no more than the dtype they are
        # computed in.
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute)
    model.train()
    return model


def load_weights(
    model: WeightTiedDiffusionGemma, checkpoint: CheckpointReader, device: torch.device, seed: int
) -> None:
    """Allocate a meta-device model, sharded or not, and load its values.

    Each rank reads only the slices it holds.

    Adapters are initialized as in LoRA (A uniform in +-1/sqrt(in), B zero), only from the seed and
    the parameter's name.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or not of a floating-point dtype;
            all found before memory is allocated.
    """
    _check(model, checkpoint)
    model.to_empty(device=device)
    model.lm_head.weight = model.model.decoder.embed_tokens.weight  # to_empty unties them
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, base_name(name), checkpoint, seed, adapter=is_adapter(name))
        _fill_buffers(model, checkpoint, device)


def _check(model: WeightTiedDiffusionGemma, checkpoint: CheckpointReader) -> None:
    """Check that a checkpoint has exactly the model's tensors.

    Any tensors of the vision tower are accepted.
    """
    expected = {
        base_name(name): tuple(p.shape)
        for name, p in model.named_parameters()
        if not is_adapter(name)
    }
    layers = range(model.config.text_config.num_hidden_layers)
    expected |= {
        form.format(index): (1,) for index in layers for form in (DECODER_SCALAR, ENCODER_SCALAR)
    }
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        raise UserError(
            f"{checkpoint.folder}: no tensor {missing[0]!r}, expected one of shape "
            f"{list(expected[missing[0]])} by config.json "
            f"({len(missing)} missing tensors)",
            hint="Download the checkpoint again, or use the config.json that belongs to it.",
        )
    unknown = sorted(
        name
        for name in checkpoint.names()
        if name not in {*expected, "lm_head.weight"} and not name.startswith(VISION)
    )
    if unknown:
        raise UserError(
            f"{checkpoint.path(unknown[0])}: tensor {unknown[0]!r} is not part of the "
            "DiffusionGemma that config.json describes "
            f"({len(unknown)} unknown tensors)",
            hint="Use the model as it was released: this may be another model, or a quantized one.",
        )
    for name, shape in expected.items():
        found, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        if found != shape:
            raise UserError(
                f"{checkpoint.path(name)}: tensor {name!r}: found shape {list(found)}, expected "
                f"{list(shape)} by config.json",
                hint="Use the config.json that belongs to these weights.",
            )
        if dtype not in _DTYPES:
            expected_dtypes = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
            raise UserError(
                f"{checkpoint.path(name)}: tensor {name!r}: found dtype "
                f"{str(dtype).removeprefix('torch.')}, expected one of "
                f"{expected_dtypes}",
                hint="Use an unquantized checkpoint.",
            )


def _fill(
    parameter: nn.Parameter, name: str, checkpoint: CheckpointReader, seed: int, *, adapter: bool
) -> None:
    shape = tuple(parameter.shape)
    slices = tuple(slice(0, size) for size in shape)
    local: torch.Tensor = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local_shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        slices = tuple(
            slice(start, start + size) for start, size in zip(offset, local_shape, strict=True)
        )
    if adapter:
        local.copy_(initial_factor(name, shape, seed)[slices])
        return
    if local.numel():
        local.copy_(checkpoint.get_slice(name, slices))


def _fill_buffers(
    model: WeightTiedDiffusionGemma, checkpoint: CheckpointReader, device: torch.device
) -> None:
    decoder = model.model.decoder
    for index, layer in enumerate(decoder.layers):
        scalar, twin = (
            checkpoint.get(form.format(index)) for form in (DECODER_SCALAR, ENCODER_SCALAR)
        )
        layer.layer_scalar.copy_(scalar)
        if not torch.equal(scalar, twin):
            layer.encoder_scalar = twin.to(layer.layer_scalar)  # its device and dtype
    decoder.embed_tokens.embed_scale.fill_(decoder.embed_tokens.scalar_embed_scale)
    # Not in any checkpoint: recomputed, in float32 whatever the compute dtype.
    fresh = DiffusionGemmaTextRotaryEmbedding(model.config.text_config, device=device)
    for name, buffer in fresh.named_buffers():
        getattr(decoder.rotary_emb, name).copy_(buffer)

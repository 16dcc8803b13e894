"""Read and write an adapter in PEFT's layout, so that stock PEFT loads it on the stock model.

We train one adapter per shared weight. The stock model has two modules for that weight, the
encoder's and the decoder's, and PEFT wraps both: each adapter is written twice, under both names,
and read back once.

For a module's 3-D parameters (PEFT's `target_parameters`) PEFT nests a wrapper per parameter around
the module, the module's first parameter innermost, and stacks the experts' factors: A [E * r, in],
expert by expert, and B [out, r * E], rank by rank.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig

from canvastune.checkpoint.hf_format import CheckpointReader, SafetensorsFile, SafetensorsWriter
from canvastune.config import RunConfig
from canvastune.config.schema import LoraConfig
from canvastune.errors import UserError, type_of
from canvastune.io.json_text import write_json
from canvastune.model.parameter_names import EXPERT_WEIGHTS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = "canvastune.json"  # the base's fingerprint, for which PEFT's file has no key

_DECODER, _ENCODER = "model.decoder.layers.", "model.encoder.language_model.layers."
# Full names: bare ones would also hit the vision tower and the self-conditioning block.
_TARGETS = r"model\.(decoder|encoder\.language_model)\.layers\.\d+\."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_WRAPPED_EXPERTS = re.compile(r"(?P<experts>.+\.experts)(?P<wrappers>(\.base_layer)*)")
# Keys of adapter_config.json that do not change what the adapter computes, or that are read
# separately.
_FREE = {
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "target_parameters",
    "base_model_name_or_path",
    "revision",
}
_FREE |= {
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "peft_version",
    "peft_type",
    "task_type",
    "auto_mapping",
    "runtime_config",
}

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Adapter:
    """One pair of factors per shared weight.

    The adapted weight is `W + scale * B @ A`, expert by expert where W is 3-D.
    """

    # the weight's name in the checkpoint (the decoder's) -> A [(E,) r, in], B [(E,) out, r]
    factors: Factors
    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Scaling factor: alpha / rank, or alpha / sqrt(rank) of a rank-stabilized LoRA."""
        return LoraConfig(rank=self.rank, alpha=self.alpha, rslora=self.rslora).scale


def each_expert(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Iterate over the matrices of weights and factors that belong together.

    One set, or one per expert of 3-D ones.
    """
    return zip(*(tensor if tensor.dim() == 3 else tensor[None] for tensor in tensors), strict=True)


def write_adapter(
    folder: Path,
    factors: Factors,
    config: RunConfig,
    base: Path,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `canvastune.json`.

    Args:
        factors: the shared weight's name, as `model.decoder.layers.0.self_attn.q_proj.weight` or
            `model.decoder.layers.0.experts.down_proj` -> A [(E,) r, in], B [(E,) out, r].
        base: the checkpoint that the adapter was trained on; its fingerprint is kept.
        data: figures of the data card, for the card of the merged model; None: not known.

    Raises:
        ValueError: the factors are not those of every layer, for the kinds of weights that they
            name: no pattern of `target_modules` or `target_parameters` would then match exactly
            them.
    """
    checkpoint = CheckpointReader(base)
    kinds = sorted({re.sub(r".*\.layers\.\d+\.", "", name) for name in factors})
    modules = (
        _TARGETS
        + "("
        + "|".join(
            re.escape(kind.removesuffix(".weight")) for kind in kinds if kind.endswith(".weight")
        )
        + ")"
    )
    parameters = [kind for kind in kinds if not kind.endswith(".weight")]
    hit = {
        name
        for name in checkpoint.names()
        if re.fullmatch(modules + r"\.weight", name)
        or any(name.endswith(f".{parameter}") for parameter in parameters)
    }
    if hit != set(factors):
        raise ValueError(
            f"target_modules {modules!r} and target_parameters match other weights than were "
            f"trained: {sorted(hit ^ set(factors))[:3]}"
        )
    peft_config = PeftLoraConfig(
        r=config.lora.rank,
        # An int in PEFT's own files; PEFT divides it by the rank, so a float is as good.
        lora_alpha=int(config.lora.alpha) if config.lora.alpha.is_integer() else config.lora.alpha,
        use_rslora=config.lora.rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        base_model_name_or_path=config.model.id,
        revision=config.model.revision,
        inference_mode=True,
    )
    peft_config.save_pretrained(str(folder))
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in factors.items():
        module = _module_of(name, _adapted_experts(parameters))
        stacked_a, stacked_b = (
            (a, b) if a.dim() == 2 else (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))
        )
        for copy in (module.replace(_DECODER, _ENCODER, 1), module):
            tensors |= {_key(copy, "A"): stacked_a, _key(copy, "B"): stacked_b}
    writer = SafetensorsWriter(
        folder / WEIGHTS,
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()},
    )
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.close()
    origin = {
        "base_id": config.model.id,
        "base_revision": config.model.revision,
        "base_fingerprint": checkpoint.fingerprint(),
        "data": data,
    }
    write_json(folder / ORIGIN, origin)


def read_data_figures(folder: Path) -> dict[str, Any] | None:
    """Return the figures of the data that an adapter was trained on, if it names them.

    Raises:
        UserError: the file that names them is not a JSON object.
    """
    origin = folder / ORIGIN
    found = _read_json(origin).get("data") if origin.is_file() else None
    return found if isinstance(found, dict) else None


def read_adapter(folder: Path, base: CheckpointReader, base_id: str) -> Adapter:
    """Read an adapter that belongs to `base`; every factor is in memory once, in its stored dtype.

    Args:
        base_id: the base's Hub id or folder, as the recipe names it: the only thing to compare for
            an adapter that another tool wrote.

    Raises:
        UserError: not an adapter, or not a plain LoRA of linear layers and experts; of another
            base; shapes that are not the base's; encoder and decoder copies that differ; values
            that are not finite.
    """
    settings = _read_settings(folder)
    _refuse_other_base(folder, settings, base, base_id)
    rank = settings["r"]
    file = SafetensorsFile(folder / WEIGHTS)
    modules: dict[str, set[str]] = {}
    for key in file.specs:
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{file.path}: tensor {key!r} is not a LoRA factor",
                hint="Use an adapter that Canvastune trained.",
            )
        modules.setdefault(match["module"], set()).add(match["factor"])
    shared = {module.replace(_ENCODER, _DECODER, 1) for module in modules}
    if not shared:
        raise UserError(f"{file.path}: found no tensors", hint="Use a trained adapter.")
    factors, adapted = {}, _adapted_experts(settings.get("target_parameters") or [])
    for module in sorted(shared):
        for name in (module, module.replace(_DECODER, _ENCODER, 1)):
            if modules.get(name) != {"A", "B"}:
                raise UserError(
                    f"{file.path}: found factors {sorted(modules.get(name, ()))} for {name!r}, "
                    "expected A and B: the adapter covers "
                    "only the encoder or the decoder, and merging needs both",
                    hint="Train an adapter for both, as Canvastune does.",
                )
        weight = _weight_of(module, adapted)
        factors[weight] = _read_factors(file, module, weight, base, rank)
    return Adapter(factors, rank, settings["lora_alpha"], bool(settings.get("use_rslora")))


def _read_factors(
    file: SafetensorsFile, module: str, weight: str, base: CheckpointReader, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if weight not in base:
        raise UserError(
            f"{file.path}: found factors for {module!r}, which {base.folder} does not have",
            hint="Use the base it was trained on.",
        )
    *experts, out_features, in_features = base.shape(weight)
    stacked = rank * math.prod(experts)
    twin = module.replace(_DECODER, _ENCODER, 1)
    found = []
    for factor, expected in (("A", (stacked, in_features)), ("B", (out_features, stacked))):
        key = _key(module, factor)
        tensor = file.get(key)
        if tuple(tensor.shape) != expected:
            shape = list(base.shape(weight))
            where = f"{weight!r} of {base.folder} has shape {shape} and the rank is {rank}"
            raise UserError(
                f"{file.path}: tensor {key!r}: found shape {list(tensor.shape)}, expected "
                f"{list(expected)}: {where}",
                hint="Use the base it was trained on.",
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{file.path}: tensor {key!r}: found values that are not finite",
                hint="Use the adapter of an earlier checkpoint.",
            )
        if not torch.equal(tensor, file.get(_key(twin, factor))):
            raise UserError(
                f"{file.path}: the encoder's and the decoder's copies of {key!r} differ, but they "
                "adapt one shared weight",
                hint="Train one adapter per shared weight, as Canvastune does.",
            )
        found.append(tensor)
    a, b = found
    # Views, so that the experts' factors are in memory once.
    return (
        (a.view(*experts, rank, in_features), b.view(out_features, rank, *experts).permute(2, 0, 1))
        if experts
        else (a, b)
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder}: not an adapter, expected {CONFIG} and {WEIGHTS}",
            hint="Use the folder `adapter` of a training run.",
        )
    settings = _read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: found peft_type {settings.get('peft_type')!r}, expected 'LORA'",
            hint="Use a LoRA adapter.",
        )
    plain = PeftLoraConfig().to_dict()
    for key, value in settings.items():
        # Any other feature (DoRA, rank patterns, trained biases ...) computes more than W + alpha /
        # r * B A.
        if key not in _FREE and value and value != plain.get(key):
            raise UserError(
                f"{path}: found {key} = {value!r}: only a plain LoRA can be merged",
                hint=f"Train without {key}.",
            )
    for parameter in settings.get("target_parameters") or []:
        if parameter.rpartition(".")[2] not in EXPERT_WEIGHTS:
            expected = " and ".join(EXPERT_WEIGHTS)
            raise UserError(
                f"{path}: found {parameter!r} in target_parameters, expected the experts' "
                f"{expected}",
                hint="Train only those.",
            )
    if (
        not isinstance(settings.get("r"), int)
        or not isinstance(settings.get("lora_alpha"), int | float)
        or settings["r"] < 1
    ):
        raise UserError(
            f"{path}: found r = {settings.get('r')!r} and lora_alpha = "
            f"{settings.get('lora_alpha')!r}, expected two positive numbers",
            hint="Use an unchanged adapter.",
        )
    return settings


def _refuse_other_base(
    folder: Path, settings: dict[str, Any], base: CheckpointReader, base_id: str
) -> None:
    origin = folder / ORIGIN
    if origin.is_file():
        kept, found = _read_json(origin), base.fingerprint()
        if kept.get("base_fingerprint") != found:
            raise UserError(
                f"{folder}: the adapter belongs to another base: expected {kept.get('base_id')} "
                "with fingerprint "
                f"{str(kept.get('base_fingerprint'))[:12]}, found {base.folder} with {found[:12]}",
                hint="Use the base it was trained on.",
            )
    elif settings.get("base_model_name_or_path") != base_id:
        named = settings.get("base_model_name_or_path")
        raise UserError(
            f"{folder / CONFIG}: the adapter belongs to {named!r}, found base {base_id!r}",
            hint="Use the base it was trained on.",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: invalid JSON: {error}",
            hint="The adapter file is incomplete; use one from a finished run.",
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: found {type_of(tree)}, expected a JSON object",
            hint="Use an unchanged adapter.",
        )
    return tree


def _key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _adapted_experts(target_parameters: Iterable[str]) -> list[str]:
    """List the experts' weights that have an adapter, as PEFT wraps them: innermost first."""
    named = {parameter.rpartition(".")[2] for parameter in target_parameters}
    return [name for name in EXPERT_WEIGHTS if name in named]


def _module_of(weight: str, adapted: list[str]) -> str:
    """Return the module that holds a weight's factors in PEFT's file.

    The linear layer, or a wrapper around the experts.
    """
    module, _, leaf = weight.rpartition(".")
    return (
        module
        if leaf == "weight"
        else module + ".base_layer" * (len(adapted) - 1 - adapted.index(leaf))
    )


def _weight_of(module: str, adapted: list[str]) -> str:
    """Invert `_module_of`; for an unknown module, return a name that no checkpoint has."""
    wrapped = _WRAPPED_EXPERTS.fullmatch(module)
    depth = wrapped["wrappers"].count(".") if wrapped else 0
    if wrapped is None or depth >= len(adapted):
        return f"{module}.weight"
    return f"{wrapped['experts']}.{adapted[-1 - depth]}"

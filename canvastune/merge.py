"""Merge an adapter into its base, tensor by tensor, and verify the merged checkpoint."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from canvastune.checkpoint.generation_config import write_generation_file
from canvastune.checkpoint.hf_format import (
    CheckpointReader,
    CheckpointWriter,
)
from canvastune.checkpoint.hf_inference import load_stock, load_stock_with_adapter
from canvastune.checkpoint.hub import SIDE_FILES, copy_files, resolve_model
from canvastune.checkpoint.model_card import write_model_card
from canvastune.checkpoint.peft_adapter import (
    CONFIG,
    Adapter,
    each_expert,
    read_adapter,
    read_data_figures,
)
from canvastune.checkpoint.truncation import DOWNLOAD_AGAIN
from canvastune.config import RunConfig, load_config
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from canvastune.io.byte_size import format_bytes
from canvastune.io.json_text import write_json
from canvastune.io.provenance import write_provenance

logger = logging.getLogger(__name__)

FindDevice = Callable[[int], torch.device | None]

_PROMPTS, _PROMPT_TOKENS = 4, 32
# Memory of a loaded model over its float32 weights: activations, logits and the loader's buffers.
_MEMORY_MARGIN = 1.25
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TOLERANCE = 1e-4  # of max |logit|: only the order of float32 sums differs
_PROGRESS_SECONDS = 10.0


def merge_lora(
    config: RunConfig,
    base: Path,
    adapter: Path,
    out: Path,
    *,
    find_device: FindDevice | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint into `out` and return its proof.

    `out` gets the base's configuration, tokenizer and tensors, adapted weights being `W + scale * B
    @ A` (expert by expert, summed in float32, stored in the base's dtype), and `merge_proof.json`,
    `config.yaml`, `provenance.json` and a model card. It is written completely or not at all. Memory is the
    adapter and a few times the largest tensor; the proof loads the model if it fits.

    Args:
        find_device: as for `verify_merge`.

    Raises:
        UserError: a base or an adapter that cannot be read, values that are not finite, an adapter
            of another base, an `out` that is not empty, a full disk.
        RuntimeError: the proof failed.
    """
    started = time.monotonic()
    with atomic_directory(out) as folder:
        checkpoint = CheckpointReader(base)
        trained = read_adapter(adapter, checkpoint, config.model.id)
        copy_files(base, folder, SIDE_FILES)
        write_generation_file(base, folder)
        write_model_card(folder, "merged", config, base, read_data_figures(adapter))
        with CheckpointWriter(folder, checkpoint.specs()) as writer:
            written = 0
            for name in checkpoint.names():
                factors = trained.factors.get(name)
                # No variable holds the tensor, so that the last one is freed before the next one is
                # read.
                shard = writer.write(
                    name,
                    merge_weight(_read_finite(checkpoint, name), *factors, trained.scale)
                    if factors
                    else _read_finite(checkpoint, name),
                )
                if shard is not None:
                    written += 1
                    logger.info(
                        f"merge: shard {written} of {writer.shards} written: {shard}, "
                        f"{time.monotonic() - started:.1f} s"
                    )
        proof = verify_merge(
            checkpoint, adapter, trained, folder, config.seed, find_device=find_device
        )
        if not proof["passed"]:
            raise RuntimeError(
                f"{out}: not written: the merged model differs from base and adapter: "
                f"{json.dumps(proof)}"
            )
        proof["merge_seconds"] = time.monotonic() - started
        write_json(folder / "merge_proof.json", proof)
        write_provenance(folder, "merge_lora", config, {"base": base, "adapter": adapter})
    logger.info(
        f"merge: {len(trained.factors)} weights merged and verified by {proof['method']} in "
        f"{proof['merge_seconds']:.1f} s: {out}"
    )
    return proof


def _read_finite(checkpoint: CheckpointReader, name: str) -> torch.Tensor:
    tensor = checkpoint.get(name)
    # The extremes, as isfinite() would allocate as much memory again.
    ends = tensor.aminmax() if tensor.numel() and tensor.dtype in _CHECKED else ()
    if not all(math.isfinite(float(end)) for end in ends):  # both are NaN where one value is
        raise UserError(
            f"{checkpoint.path(name)}: tensor {name!r}: found values that are not finite",
            hint=DOWNLOAD_AGAIN,
        )
    return tensor


def merge_folder(adapter: Path, out: Path, base: str | None = None) -> dict[str, Any]:
    """Merge an adapter's folder as `merge_lora` does, by the recipe that it holds.

    Args:
        base: id or folder of the base; None: the one that the recipe names.

    Raises:
        UserError: as `merge_lora`; a folder without a recipe; a base that cannot be found.
    """
    config = load_config(_recipe_of(adapter))
    if base is not None:
        config = config.with_values("model", id=base, revision=None)
    return merge_lora(config, resolve_model(config.model), adapter, out)


def _recipe_of(adapter: Path) -> Path:
    """Return the recipe of an adapter; earlier versions wrote it next to its folder."""
    if not (adapter / CONFIG).is_file():
        raise UserError(
            f"{adapter}: not an adapter, expected {CONFIG} in it",
            hint="Use the folder `train/adapter` of a run.",
        )
    for folder in (adapter, adapter.absolute().parent):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise UserError(
        f"{adapter}: no config.yaml, expected the recipe of the adapter's run",
        hint="Copy config.yaml from the run's folder `train` into it.",
    )


def merge_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Add scale * B [(E,) out, r] @ A [(E,) r, in] to W [(E,) out, in] in place, in its dtype."""
    for one, one_a, one_b in each_expert(weight, a, b):
        one.copy_(torch.addmm(one.float(), one_b.float(), one_a.float(), alpha=scale))
    return weight


def verify_merge(
    base: CheckpointReader,
    adapter_folder: Path,
    adapter: Adapter,
    merged_folder: Path,
    seed: int,
    *,
    find_device: FindDevice | None = None,
) -> dict[str, Any]:
    """Compare a merged checkpoint with base and adapter.

    Return the content of merge_proof.json, with `passed`.

    The logits may differ by 1e-4 of the largest |logit|. For weights that are stored in less than
    float32, the rounding itself changes the logits by far more (a token near a tie changes its
    expert), so no tolerance could tell it from a fault. There the comparison excludes the rounding:
    the base under PEFT's adapters gets what the merged weights lost to it. The effect of the
    rounding on the logits is reported as `rounding_effect` (root mean squares, relative).

    Args:
        find_device: returns a device with that many bytes free, None if there is none: the weights
            are then compared one by one. Default: the GPU, or the CPU, by their free memory.
    """
    weights = _compare_weights(base, adapter, CheckpointReader(merged_folder))
    proof: dict[str, Any] = {"passed": weights["passed"], "weights": weights}
    need = int(
        sum(torch.Size(shape).numel() for shape, _ in base.specs().values()) * 4 * _MEMORY_MARGIN
    )
    device = (find_device or device_with_memory)(need)
    if device is None:
        reason = (
            f"the model in float32 needs {format_bytes(need)}, more than is free: compared weight "
            "by weight"
        )
        return proof | {
            "method": "weights",
            "reason": reason,
            "prompts": 0,
            "max_abs_difference": weights["max_abs_difference"],
            "max_abs_logit": None,
        }
    logits = _compare_logits(base, adapter_folder, adapter, merged_folder, seed=seed, device=device)
    return (
        proof
        | logits
        | {"method": "logits and weights", "passed": weights["passed"] and logits["passed"]}
    )


def _compare_weights(
    base: CheckpointReader, adapter: Adapter, merged: CheckpointReader
) -> dict[str, Any]:
    names = base.names()
    alike = merged.specs() == base.specs()
    changed = [] if alike else sorted(set(names) ^ set(merged.names())) or ["shapes or dtypes"]
    unchanged, errors = 0, []
    shown = time.monotonic()
    for count, name in enumerate(names if alike else []):
        if name in adapter.factors:
            errors.append(_compare_merged(base.get(name), merged.get(name), adapter, name))
        elif _same_bytes(base.get(name), merged.get(name)):
            unchanged += 1
        else:
            changed.append(name)
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            logger.info(f"merge: compared {count + 1} of {len(names)} tensors with the base's")
    difference, over_bound, over_update = (
        (max(column) for column in zip(*errors, strict=True)) if errors else (0.0, 0.0, 0.0)
    )
    return {
        "adapted": len(errors),
        "unchanged": unchanged,
        "changed": changed,
        "max_abs_difference": difference,
        "error_over_bound": over_bound,
        "rounding_over_update": over_update,
        "passed": not changed and over_bound <= 1 and len(errors) == len(adapter.factors),
    }


def _compare_merged(
    weight: torch.Tensor, result: torch.Tensor, adapter: Adapter, name: str
) -> tuple[float, float, float]:
    """Return the worst error of a merged weight over its experts: absolute; relative to rounding.

    Its norm relative to the update's.
    """
    errors = []
    for one, found, *factors in each_expert(weight, result, *adapter.factors[name]):
        a, b = (factor.double() for factor in factors)
        update = adapter.scale * (b @ a)
        exact = one.double() + update
        error = (found.double() - exact).abs()
        bound = _rounding(one, exact, adapter.scale * (b.abs() @ a.abs()), adapter.rank)
        # An untrained B is zero: no update.
        over_update = float(error.norm() / update.norm()) if update.any() else 0.0
        errors.append(
            (float(error.max()), float((error / bound).nan_to_num(torch.inf).max()), over_update)
        )
    difference, over_bound, over_update = (max(column) for column in zip(*errors, strict=True))
    return difference, over_bound, over_update


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _rounding(
    weight: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, rank: int
) -> torch.Tensor:
    """Bound the rounding error of each element of a merged weight, float64[out, in].

    A sum in float32, rounded to the stored dtype.
    """
    stored, summed = torch.finfo(weight.dtype), torch.finfo(torch.float32)
    float32_error = (rank + 4) * summed.eps / 2 * (weight.double().abs() + magnitude)
    return float32_error + stored.eps / 2 * (exact.abs() + float32_error) + stored.tiny * stored.eps


def _compare_logits(
    base: CheckpointReader,
    adapter_folder: Path,
    adapter: Adapter,
    merged: Path,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    started = time.monotonic()
    model = load_stock_with_adapter(base.folder, adapter_folder, device, torch.float32)
    plain = expected = _logits(model, seed)
    if any(base.dtype(name) != torch.float32 for name in adapter.factors):
        _take_rounding(model, adapter, CheckpointReader(merged))
        expected = _logits(model, seed)
    del model  # one model in memory at a time
    found = _logits(load_stock(merged, device, torch.float32), seed)
    largest, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return {
        "prompts": _PROMPTS,
        "max_abs_difference": largest,
        "max_abs_logit": scale,
        "tolerance": _TOLERANCE * scale,
        "rounding_effect": float(
            (found - plain).square().mean().sqrt() / plain.square().mean().sqrt()
        ),
        "passed": largest <= _TOLERANCE * scale,  # false where either is not a number
        "device": device.type,
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def _take_rounding(model: Any, adapter: Adapter, merged: CheckpointReader) -> None:
    """Add what the merged weights lost to rounding to the base weights under PEFT's adapters."""
    for name, factors in adapter.factors.items():
        module, _, leaf = name.rpartition(".")
        weight = getattr(model.get_submodule(module).get_base_layer(), leaf)
        for one, stored, a, b in each_expert(weight, merged.get(name), *factors):
            one.copy_(stored.double() - adapter.scale * (b.double() @ a.double()))


@torch.no_grad()
def _logits(model: Any, seed: int) -> torch.Tensor:
    """Return logits of seeded random prompts, float32[prompts, canvas + prompt tokens, V], CPU."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, device = model.config.text_config.vocab_size, model.lm_head.weight.device
    prompts = torch.randint(0, vocabulary, (_PROMPTS, _PROMPT_TOKENS), generator=generator)
    prompts[prompts == model.config.image_token_id] = 0  # an image token asks for an image
    canvases = torch.randint(
        0, vocabulary, (_PROMPTS, model.config.canvas_length), generator=generator
    )
    output = model(input_ids=prompts.to(device), decoder_input_ids=canvases.to(device))
    cap = model.final_logit_softcapping
    encoder = torch.tanh(model.lm_head(output.encoder_last_hidden_state).float() / cap) * cap
    return torch.cat([output.logits.float(), encoder], dim=1).cpu()


def device_with_memory(need: int) -> torch.device | None:
    """Return a device that has `need` bytes free, preferably the GPU; None if there is none."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > need:
        return torch.device("cuda")
    return torch.device("cpu") if _free_memory() > need else None


def _free_memory() -> int:
    """Return the bytes that this process can still allocate.

    The machine's, or the container's if fewer.
    """
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The file cache is reclaimed on demand.
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return free
    return min(free, limit - used)

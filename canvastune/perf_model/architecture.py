"""The model as the planner counts it: every weight as the engine will hold it, read from the meta
device.

Letters: H hidden size, V vocabulary, E experts, K experts per token, A query heads, G key and value
heads, D head size.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from canvastune.checkpoint.load import VISION, build_model, read_model_config
from canvastune.config import RunConfig, parse_config
from canvastune.config.schema import LoraConfig
from canvastune.distributed.parallel_dims import expert_shard_dim
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.lora import is_adapter

VISION_KIND = "vision tower (not in memory)"
EXPERT_KINDS = ("experts", "expert adapters")
KINDS = (
    "experts",
    "attention",
    "embedding",
    "dense MLP",
    "self-conditioning",
    "router",
    "norms",
    "adapters",
    EXPERT_KINDS[1],
    VISION_KIND,
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Weight:
    """One parameter of the engine's model."""

    name: str
    kind: str  # one of KINDS
    shape: tuple[int, ...]
    itemsize: int  # bytes per element as held between steps
    trained: bool
    layer: int | None  # None: the root's weights (embedding, last norm, self-conditioning)

    @property
    def expert(self) -> bool:
        return self.kind in EXPERT_KINDS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard(self, ranks: int, ep: int) -> int:
        """Return the number of elements of the largest shard.

        FSDP gives each rank ceil(size / ranks) slices, the last ranks fewer; experts are divided
        over ep first.
        """
        divided = self.expert and ep > 1
        dim = expert_shard_dim(self.name) if divided else 0
        slices = -(-self.shape[dim] // (ranks // ep if divided else ranks))
        return self.numel // self.shape[dim] * slices // (ep if divided else 1)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer's attention."""

    sliding: bool
    query_width: int  # A * D
    key_width: int  # G * D
    head_dim: int  # D
    own_values: bool  # False: keys are used as values (full layers have no v_proj)


@dataclass(frozen=True, eq=False)  # hashed by identity: a thousand weights make a slow key
class Architecture:
    """A model under one training method."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    layers: tuple[LayerShape, ...]
    experts: int
    experts_per_token: int
    expert_size: int
    window: int
    canvas: int
    longest: int  # tokens, from max_position_embeddings
    full: bool  # all weights but the frozen ones are trained; otherwise only adapters
    rank: int  # of the adapters; 0 without
    expert_rank: int  # of the experts' adapters; 0 without
    dropout: bool  # of the adapters' inputs
    compute_bytes: int  # 2 for bfloat16, 4 for float32
    weights: tuple[Weight, ...]
    vision: int  # parameters of the vision tower and its projection


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one kind."""

    total: int
    active: int  # used for one text token
    trained: int


def read_architecture(config: RunConfig, model: Path) -> Architecture:
    """Build the engine's model on the meta device from `config.json` (a folder's, or the file
    itself) and list its weights.

    Raises:
        UserError: the file cannot be read, or is not that of a DiffusionGemma.
    """
    text = read_model_config(model).to_json_string()
    return _architecture(text, config.train.method, config.lora, config.train.precision)


def count_parameters(architecture: Architecture) -> dict[str, ParameterCount]:
    """Count parameters by kind, in the order of KINDS, and their `total`; kinds without parameters
    are left out.
    """
    counts = {}
    for kind in KINDS:
        weights = [weight for weight in architecture.weights if weight.kind == kind]
        total = (
            architecture.vision if kind == VISION_KIND else sum(weight.numel for weight in weights)
        )
        active = total
        if kind == VISION_KIND:
            active = 0
        elif kind in EXPERT_KINDS:
            active = total * architecture.experts_per_token // architecture.experts
        if total:
            counts[kind] = ParameterCount(
                total, active, sum(weight.numel for weight in weights if weight.trained)
            )
    values = list(counts.values())
    counts["total"] = ParameterCount(
        sum(c.total for c in values), sum(c.active for c in values), sum(c.trained for c in values)
    )
    return counts


@functools.lru_cache(
    maxsize=8
)  # the search for a change that fits asks for the same few repeatedly
def _architecture(model_config: str, method: str, lora: LoraConfig, precision: str) -> Architecture:
    described = DiffusionGemmaConfig.from_dict(json.loads(model_config))
    run = parse_config(
        {
            "name": "plan",
            "data": {"source": "-"},
            "train": {"method": method, "precision": precision},
            "lora": lora.model_dump(),
        }
    )
    return describe(build_model(run, described), run, _vision_parameters(described))


def describe(model: WeightTiedDiffusionGemma, config: RunConfig, vision: int = 0) -> Architecture:
    """Describe the engine's model, sharded or not, for the planner.

    Args:
        vision: parameters of the vision tower, which the engine leaves out.
    """
    lora, adapted = config.lora, config.train.method == "lora"
    text = model.config.text_config
    weights = tuple(
        Weight(
            name=name,
            kind=_kind(name),
            shape=tuple(parameter.shape),
            itemsize=parameter.element_size(),
            trained=parameter.requires_grad,
            layer=int(found[1]) if (found := _LAYER.search(name)) else None,
        )
        for name, parameter in model.named_parameters()
    )
    layers = []
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        groups = attention.num_key_value_groups
        layers.append(
            LayerShape(
                sliding=attention.is_sliding,
                query_width=text.num_attention_heads * attention.head_dim,
                key_width=text.num_attention_heads // groups * attention.head_dim,
                head_dim=attention.head_dim,
                own_values=attention.v_proj is not None,
            )
        )
    return Architecture(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        heads=text.num_attention_heads,
        layers=tuple(layers),
        experts=text.num_experts,
        experts_per_token=text.top_k_experts,
        expert_size=text.moe_intermediate_size,
        window=text.sliding_window,
        canvas=model.config.canvas_length,
        longest=text.max_position_embeddings,
        full=not adapted,
        rank=lora.rank if adapted else 0,
        expert_rank=lora.rank if adapted and lora.experts else 0,
        dropout=adapted and lora.dropout > 0,
        compute_bytes=2 if config.train.precision == "bfloat16" else 4,
        weights=weights,
        vision=vision,
    )


def _vision_parameters(described: DiffusionGemmaConfig) -> int:
    """Count the parameters of the vision tower, which is in the checkpoint but not in the engine's
    model.
    """
    with torch.device("meta"):
        stock = DiffusionGemmaForBlockDiffusion(described)
    return sum(
        parameter.numel() for name, parameter in stock.named_parameters() if name.startswith(VISION)
    )


def _kind(name: str) -> str:
    if is_adapter(name):
        return "expert adapters" if ".experts." in name else "adapters"
    for part, kind in (
        (".experts.", "experts"),
        (".router.", "router"),
        ("norm", "norms"),
        (".self_conditioning.", "self-conditioning"),
        (".self_attn.", "attention"),
        (".mlp.", "dense MLP"),
        ("embed_tokens", "embedding"),
    ):
        if part in name:
            return kind
    raise ValueError(f"{name}: unknown kind of weight: the planner does not support this model")

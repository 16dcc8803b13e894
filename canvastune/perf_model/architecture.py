"""The model as the planner counts it: every weight as the engine will hold it, listed from its sizes.

Where only transformers can read config.json, the engine's model is built on the meta device instead.

Letters: H hidden size, V vocabulary, E experts, K experts per token, A query heads, G key and value
heads, D head size.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.config import RunConfig, parse_config
from canvastune.config.model_sizes import LayerShape, ModelSizes, read_sizes, token_ids
from canvastune.config.schema import LoraConfig
from canvastune.distributed.parallel_dims import expert_shard_dim
from canvastune.model.parameter_names import (
    ADAPTER,
    EXPERT_WEIGHTS,
    TARGETS,
    VISION,
    check_expert_rank,
    is_adapter,
    is_trained,
)

if TYPE_CHECKING:  # they take seconds to import, and only a file in another form needs them
    from transformers import DiffusionGemmaConfig

    from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma

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
FLOAT = 4  # bytes of float32
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


@dataclass(frozen=True, eq=False)  # hashed by identity: a thousand weights make a slow key
class Architecture(ModelSizes):
    """A model under one training method."""

    full: bool  # all weights but the frozen ones are trained; otherwise only adapters
    rank: int  # of the adapters; 0 without
    expert_rank: int  # of the experts' adapters; 0 without
    dropout: bool  # of the adapters' inputs
    compute_bytes: int  # 2 for bfloat16, 4 for float32
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one kind."""

    total: int
    active: int  # used for one text token
    trained: int


def read_architecture(config: RunConfig, model: Path) -> Architecture:
    """List the weights of the engine's model from `config.json` (a folder's, or the file itself).

    Raises:
        UserError: the file cannot be read, or is not that of a DiffusionGemma; a `lora.rank` that
            the experts' adapters cannot have.
    """
    method, precision = config.train.method, config.train.precision
    sizes = read_sizes(model)
    if sizes is not None:
        return _listed(sizes, method, config.lora, precision)
    from canvastune.checkpoint.load import read_model_config

    text = read_model_config(model).to_json_string()
    return _built(text, method, config.lora, precision)


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


@functools.lru_cache(maxsize=8)  # the search for a change that fits asks for the same few
def _listed(sizes: ModelSizes, method: str, lora: LoraConfig, precision: str) -> Architecture:
    if method == "lora" and lora.experts:
        check_expert_rank(lora.rank, precision, _compute_bytes(precision))
    weights = tuple(
        Weight(
            name=name,
            kind=_kind(name),
            shape=shape,
            itemsize=FLOAT if trained else _compute_bytes(precision),
            trained=trained,
            layer=_layer_of(name),
        )
        for name, shape in _parameters(sizes, lora if method == "lora" else None)
        for trained in [is_trained(name, lora=method == "lora")]
    )
    return _architecture(sizes, method, lora, precision, weights)


@functools.lru_cache(maxsize=8)
def _built(model_config: str, method: str, lora: LoraConfig, precision: str) -> Architecture:
    from transformers import DiffusionGemmaConfig

    from canvastune.checkpoint.load import build_model

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
    text = model.config.text_config
    weights = tuple(
        Weight(
            name=name,
            kind=_kind(name),
            shape=tuple(parameter.shape),
            itemsize=parameter.element_size(),
            trained=parameter.requires_grad,
            layer=_layer_of(name),
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
    sizes = ModelSizes(
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
        vision=vision,
        token_ids=token_ids(text.to_dict()),
    )
    return _architecture(sizes, config.train.method, config.lora, config.train.precision, weights)


def _architecture(
    sizes: ModelSizes, method: str, lora: LoraConfig, precision: str, weights: tuple[Weight, ...]
) -> Architecture:
    adapted = method == "lora"
    return Architecture(
        **vars(sizes),
        full=not adapted,
        rank=lora.rank if adapted else 0,
        expert_rank=lora.rank if adapted and lora.experts else 0,
        dropout=adapted and lora.dropout > 0,
        compute_bytes=_compute_bytes(precision),
        weights=weights,
    )


def _parameters(
    sizes: ModelSizes, lora: LoraConfig | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the engine's parameters, in the order of its modules.

    Args:
        lora: None: without adapters.
    """
    hidden, decoder = sizes.hidden, "model.decoder"
    yield f"{decoder}.embed_tokens.weight", (sizes.vocabulary, hidden)
    for index, shape in enumerate(sizes.layers):
        layer = f"{decoder}.layers.{index}"
        yield from _layer_parameters(layer, shape, sizes, lora)
    yield f"{decoder}.norm.weight", (hidden,)
    block = f"{decoder}.self_conditioning"
    yield f"{block}.pre_norm.weight", (hidden,)
    yield from _mlp_parameters(block, sizes, None)


def _layer_parameters(
    layer: str, shape: LayerShape, sizes: ModelSizes, lora: LoraConfig | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, experts = sizes.hidden, sizes.experts
    attention = f"{layer}.self_attn"
    yield from _linear_parameters(f"{attention}.q_proj", shape.query_width, hidden, lora)
    yield from _linear_parameters(f"{attention}.k_proj", shape.key_width, hidden, lora)
    if shape.own_values:
        yield from _linear_parameters(f"{attention}.v_proj", shape.key_width, hidden, lora)
    yield from _linear_parameters(f"{attention}.o_proj", hidden, shape.query_width, lora)
    yield f"{attention}.q_norm.weight", (shape.head_dim,)
    yield f"{attention}.k_norm.weight", (shape.head_dim,)
    yield from _mlp_parameters(f"{layer}.mlp", sizes, lora)
    yield f"{layer}.input_layernorm.weight", (hidden,)
    yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield f"{layer}.pre_feedforward_layernorm.weight", (hidden,)
    yield f"{layer}.post_feedforward_layernorm.weight", (hidden,)
    yield f"{layer}.router.scale", (hidden,)
    yield f"{layer}.router.per_expert_scale", (experts,)
    yield f"{layer}.router.proj.weight", (experts, hidden)
    shapes = (2 * sizes.expert_size, hidden), (hidden, sizes.expert_size)
    weights = dict(zip(EXPERT_WEIGHTS, shapes, strict=True))
    for name, (rows, columns) in weights.items():
        yield f"{layer}.experts.{name}", (experts, rows, columns)
    if lora is not None and lora.experts:
        for name, (_, columns) in weights.items():
            yield f"{layer}.experts.lora_A.{ADAPTER}.{name}", (experts, lora.rank, columns)
        for name, (rows, _) in weights.items():
            yield f"{layer}.experts.lora_B.{ADAPTER}.{name}", (experts, rows, lora.rank)
    yield f"{layer}.post_feedforward_layernorm_1.weight", (hidden,)
    yield f"{layer}.post_feedforward_layernorm_2.weight", (hidden,)
    yield f"{layer}.pre_feedforward_layernorm_2.weight", (hidden,)


def _mlp_parameters(
    name: str, sizes: ModelSizes, lora: LoraConfig | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = sizes.hidden, sizes.intermediate
    yield from _linear_parameters(f"{name}.gate_proj", width, hidden, lora)
    yield from _linear_parameters(f"{name}.up_proj", width, hidden, lora)
    yield from _linear_parameters(f"{name}.down_proj", hidden, width, lora)


def _linear_parameters(
    name: str, rows: int, columns: int, lora: LoraConfig | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the weight of a linear layer and, where it is adapted, PEFT's factors of it."""
    if lora is None or not re.fullmatch(TARGETS, name):
        yield f"{name}.weight", (rows, columns)
        return
    yield f"{name}.base_layer.weight", (rows, columns)
    yield f"{name}.lora_A.{ADAPTER}.weight", (lora.rank, columns)
    yield f"{name}.lora_B.{ADAPTER}.weight", (rows, lora.rank)


def _vision_parameters(described: DiffusionGemmaConfig) -> int:
    """Count the parameters of the vision tower, which is in the checkpoint but not in the engine's
    model.
    """
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    with torch.device("meta"):
        stock = DiffusionGemmaForBlockDiffusion(described)
    return sum(
        parameter.numel() for name, parameter in stock.named_parameters() if name.startswith(VISION)
    )


def _compute_bytes(precision: str) -> int:
    return 2 if precision == "bfloat16" else FLOAT


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


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

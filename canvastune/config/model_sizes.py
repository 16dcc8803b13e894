"""The sizes of a DiffusionGemma from its config.json, read without PyTorch and transformers.

Only what needs no judgment is read here: a file in the Hub's form, every key known, every value of
its type. Of any other one, transformers says what it means or why it is refused; a test holds both
readings to each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Check = Callable[[Any], bool]
TokenIds = Mapping[str, int | list[int]]  # of the tokens "pad", "bos" and "eos", if they have any
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_PATCH_SIZE, _POSITIONS = 16, 10 * 1024  # of the vision tower, where config.json does not say
_TOKEN_IDS = {"pad": 0, "bos": 2, "eos": 1}  # where config.json does not say


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer's attention."""

    sliding: bool
    query_width: int  # A * D
    key_width: int  # G * D
    head_dim: int  # D
    own_values: bool  # False: keys are used as values (full layers have no v_proj)


@dataclass(frozen=True, eq=False)  # the subclass with weights would inherit the comparison
class ModelSizes:
    """What config.json says of the model."""

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
    vision: int  # parameters of the vision tower and its projection
    token_ids: TokenIds


def read_sizes(model: Path) -> ModelSizes | None:
    """Return the sizes of the model in a checkpoint's folder, or in a config.json; None: ask
    transformers.
    """
    path = model / "config.json" if model.is_dir() else model
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not _known(tree, _MODEL, needed=("model_type", "text_config", "vision_config")):
        return None
    text, vision = tree["text_config"], tree["vision_config"]
    if not _known(text, _TEXT, needed=_TEXT_SIZES) or not _known(vision, _VISION, _VISION_SIZES):
        return None
    kinds = text["layer_types"]
    ids = token_ids(text)
    if (
        len(kinds) != text["num_hidden_layers"]
        or kinds[-1] != "full_attention"
        or not all(
            each < text["vocab_size"]
            for value in ids.values()
            for each in (value if isinstance(value, list) else [value])
        )
        or text["num_attention_heads"] % text["num_key_value_heads"]
        or text["num_attention_heads"] % text["num_global_key_value_heads"]
    ):
        return None
    return ModelSizes(
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        heads=text["num_attention_heads"],
        layers=tuple(_layer(text, kind == "sliding_attention") for kind in kinds),
        experts=text["num_experts"],
        experts_per_token=text["top_k_experts"],
        expert_size=text["moe_intermediate_size"],
        window=text["sliding_window"],
        canvas=tree.get("canvas_length", 256),
        longest=text["max_position_embeddings"],
        vision=_vision_parameters(vision, text["hidden_size"]),
        token_ids=ids,
    )


def token_ids(text: Mapping[str, Any]) -> TokenIds:
    """Return the ids of the special tokens in a text configuration, its defaults filled in."""
    found = {name: text.get(f"{name}_token_id", own) for name, own in _TOKEN_IDS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _layer(text: Mapping[str, Any], sliding: bool) -> LayerShape:
    heads = text["num_attention_heads"]
    head_dim = text["head_dim" if sliding else "global_head_dim"]
    groups = heads // text["num_key_value_heads" if sliding else "num_global_key_value_heads"]
    return LayerShape(sliding, heads * head_dim, heads // groups * head_dim, head_dim, sliding)


def _vision_parameters(vision: Mapping[str, Any], hidden: int) -> int:
    """Count the parameters of the vision tower and of its projection to the hidden size."""
    width, heads, head_dim = (
        vision[key] for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    patches = 3 * vision.get("patch_size", _PATCH_SIZE) ** 2
    positions = 2 * vision.get("position_embedding_size", _POSITIONS)
    keys = vision["num_key_value_heads"] * head_dim
    attention = width * (2 * heads * head_dim + 2 * keys) + 2 * head_dim  # two norms of heads
    mlp = 3 * width * vision["intermediate_size"]
    layer = attention + mlp + 4 * width  # four norms
    return width * (patches + positions + hidden) + vision["num_hidden_layers"] * layer


def _known(tree: Any, checks: Mapping[str, Check], needed: tuple[str, ...]) -> bool:
    return (
        isinstance(tree, dict)
        and set(needed) <= tree.keys() <= checks.keys()
        and all(checks[key](value) for key, value in tree.items())
    )


def _one_of(*values: Any) -> Check:
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def _size(value: Any) -> bool:
    return type(value) is int and value > 0


def _token(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _tokens(value: Any) -> bool:
    many = isinstance(value, list) and all(each is not None and _token(each) for each in value)
    return many or _token(value)


def _float(value: Any) -> bool:
    return type(value) is float and value > 0


def _rate(value: Any) -> bool:
    return type(value) is float and 0 <= value < 1


def _boolean(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str


def _rotary(value: Any, *types: str) -> bool:
    names = ("rope_type", "rope_theta", "partial_rotary_factor")
    return (
        isinstance(value, dict)
        and {"rope_type", "rope_theta"} <= value.keys() <= set(names)
        and value["rope_type"] in types
        and type(value["rope_theta"]) in (int, float)
        and value["rope_theta"] > 0
        and type(value.get("partial_rotary_factor", 1.0)) is float
        and 0 < value.get("partial_rotary_factor", 1.0) <= 1
    )


def _text_rotary(value: Any) -> bool:
    kinds = {"sliding_attention": "default", "full_attention": "proportional"}
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(_rotary(value[kind], name) for kind, name in kinds.items())
    )


def _layer_types(value: Any) -> bool:
    kinds = ("sliding_attention", "full_attention")
    return isinstance(value, list) and bool(value) and all(each in kinds for each in value)


_ANY_CONFIG: dict[str, Check] = {
    "architectures": lambda value: isinstance(value, list) and all(map(_text, value)),
    "dtype": _one_of(*_DTYPES),
    "transformers_version": _text,
    "initializer_range": _float,
}
_TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "layer_types",
    "sliding_window",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_global_key_value_heads",
    "global_head_dim",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "max_position_embeddings",
)
_VISION_SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_MODEL: dict[str, Check] = {
    **_ANY_CONFIG,
    "model_type": _one_of("diffusion_gemma"),
    "canvas_length": _size,
    "text_config": lambda value: isinstance(value, dict),
    "vision_config": lambda value: isinstance(value, dict),
    "tie_word_embeddings": _one_of(True),
    **dict.fromkeys(("boi_token_id", "eoi_token_id", "image_token_id"), _token),
    "eos_token_id": _tokens,
}
_TEXT: dict[str, Check] = {
    **_ANY_CONFIG,
    **dict.fromkeys(_TEXT_SIZES, _size),
    # Half of a head is rotated against the other half.
    **dict.fromkeys(("head_dim", "global_head_dim"), lambda value: _size(value) and value % 2 == 0),
    "model_type": _one_of("diffusion_gemma_text"),
    "layer_types": _layer_types,
    "attention_k_eq_v": _one_of(True),
    "attention_bias": _one_of(False),
    "attention_dropout": _rate,
    "final_logit_softcapping": _float,
    "hidden_activation": _one_of("gelu_pytorch_tanh"),
    "use_bidirectional_attention": _one_of("vision", None),
    "use_cache": _boolean,
    "rms_norm_eps": _float,
    "tie_word_embeddings": _one_of(True),
    "rope_parameters": _text_rotary,
    "pad_token_id": _token,
    "bos_token_id": _token,
    "eos_token_id": _tokens,
}
_VISION: dict[str, Check] = {
    **_ANY_CONFIG,
    **dict.fromkeys(_VISION_SIZES, _size),
    **dict.fromkeys(("patch_size", "position_embedding_size", "pooling_kernel_size"), _size),
    "head_dim": lambda value: _size(value) and value % 4 == 0,  # rotated in two axes
    "max_position_embeddings": _size,
    "model_type": _one_of("gemma4_vision"),
    "attention_bias": _one_of(False),
    "attention_dropout": _rate,
    "hidden_activation": _one_of("gelu_pytorch_tanh"),
    "rms_norm_eps": _float,
    "rope_parameters": lambda value: _rotary(value, "default", "axial"),
    "standardize": _boolean,
    "use_clipped_linears": _boolean,
}

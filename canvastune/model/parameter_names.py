"""What the names of the engine's parameters say: an adapter's factor, a frozen weight, the vision
tower. The planner reads them without PyTorch.
"""

from __future__ import annotations

from canvastune.errors import UserError

ADAPTER = "default"  # PEFT's name for the only adapter
# Full names: bare ones would also match the vision tower and the self-conditioning block.
TARGETS = r"model\.decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # [E, out, in] each, in stock's order
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_FROZEN = ("router.proj.weight", "router.scale", "router.per_expert_scale")
# bytes: the grouped matmul needs strides that are multiples of it, and a row of B has r elements
_STRIDE = 16


def is_adapter(name: str) -> bool:
    """Return whether a parameter's name is that of an adapter factor."""
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name


def base_name(name: str) -> str:
    """Return a parameter's name in the checkpoint, without PEFT's wrappers."""
    return name.replace(".base_layer.", ".")


def is_trained(name: str, *, lora: bool) -> bool:
    """Return whether a parameter is trained: only the adapters, or everything but the router."""
    return is_adapter(name) if lora else not name.endswith(_FROZEN)


def check_expert_rank(rank: int, precision: str, itemsize: int) -> None:
    """Check that the grouped matmul can multiply with experts' adapters of this rank.

    Args:
        precision: name of the dtype in which the factors are multiplied.
        itemsize: its bytes.

    Raises:
        UserError: it cannot.
    """
    multiple = _STRIDE // itemsize
    if rank % multiple:
        next_rank = -(-rank // multiple) * multiple
        raise UserError(
            f"lora.rank: found {rank}, expected a multiple of {multiple} with lora.experts"
            f" in {precision}, since the grouped matmul of the experts needs aligned rows",
            hint=f"Try --set lora.rank={next_rank}.",
        )

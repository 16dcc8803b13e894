"""Whether ranks can share a run at all: asked by the planner before anything is reserved, and by the trainer before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from canvastune.config import RunConfig
from canvastune.errors import UserError


def check_layout(config: RunConfig, world_size: int, *, experts: int, hidden: int, expert_size: int) -> None:
    """Let a recipe pass whose experts and global batch divide over the ranks.

    Args:
        experts: the model's number of experts.
        hidden: the model's hidden size.
        expert_size: width of an expert's feed-forward layer.

    Raises:
        UserError: names the sizes that do not divide, and a choice that does.
    """
    ep, batch, micro = config.parallel.ep, config.train.global_batch_size, config.train.micro_batch_size or 1
    for what, count in (("the number of ranks", world_size), ("the model's number of experts", experts)):
        if count % ep:
            divisors = [d for d in range(1, world_size + 1) if world_size % d == 0 and experts % d == 0]
            raise UserError(
                f"parallel.ep: {ep} does not divide {what}, {count}. Choose one of {', '.join(map(str, divisors))} for {world_size} ranks "
                f"and {experts} experts"
            )
    efsdp = world_size // ep
    adapted = config.train.method == "lora" and config.lora.experts
    widths = (hidden, expert_size if adapted else 2 * expert_size)
    for width in widths:
        if ep > 1 and width % efsdp:
            raise UserError(
                f"parallel.ep: {world_size} ranks with ep {ep} shard each expert over {efsdp}, which does not divide its width {width}. "
                f"Choose an ep so that {world_size} / ep divides {widths[1]} and {widths[0]}"
            )
    if batch % (world_size * micro):
        nearest = max(1, round(batch / (world_size * micro))) * world_size * micro
        raise UserError(
            f"train.global_batch_size: {batch} does not divide over {world_size} ranks x {micro} examples per forward. "
            f"Try --set train.global_batch_size={nearest}, or another number of ranks"
        )


def expert_shard_dim(name: str) -> int:
    """The dimension of an expert parameter that is cut over efsdp; the first one is the experts', cut over ep.

    Weights [E, out, in] and factors B [E, out, r] are cut along their output, factors A [E, r, in] along their input: efsdp
    need not divide the rank.
    """
    return 2 if ".lora_A." in f".{name}" else 1


@dataclass(frozen=True)
class ParallelDims:
    """world = efsdp x ep. Experts live on both dimensions; everything else is sharded over all ranks, `fsdp`."""

    efsdp: DeviceMesh
    ep: DeviceMesh
    fsdp: DeviceMesh


def build_meshes(world_size: int, ep: int, device_type: str) -> ParallelDims:
    """Lay the ranks out, for an `ep` that `canvastune.distributed.parallel_dims` has let pass."""
    mesh = init_device_mesh(device_type, (world_size // ep, ep), mesh_dim_names=("efsdp", "ep"))
    return ParallelDims(efsdp=mesh["efsdp"], ep=mesh["ep"], fsdp=mesh._flatten("fsdp"))

"""How the ranks of a run divide into mesh dimensions, and whether a model and a batch divide over
them.

The planner asks before anything is reserved, the trainer before it builds the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from canvastune.config import RunConfig
from canvastune.errors import UserError

if TYPE_CHECKING:  # a plan asks for the dimensions, and needs no PyTorch
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class DeviceMeshes:
    """Experts use both dimensions of the mesh; everything else is sharded over all ranks, `fsdp`."""

    efsdp: DeviceMesh
    ep: DeviceMesh
    fsdp: DeviceMesh


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of the two mesh dimensions: world size = efsdp x ep."""

    efsdp: int  # ranks that share the shards of one expert
    ep: int  # ranks that the experts are divided over

    @classmethod
    def of(
        cls, config: RunConfig, world_size: int, *, experts: int, hidden: int, expert_size: int
    ) -> ParallelDims:
        """Return the degrees that a recipe gives a number of ranks.

        Args:
            experts: the model's number of experts.
            hidden: the model's hidden size.
            expert_size: width of an expert's feed-forward layer.

        Raises:
            UserError: experts, their widths or the global batch do not divide over the ranks; names
                the sizes, and a choice that divides.
        """
        ep, batch = config.parallel.ep, config.train.global_batch_size
        micro = config.train.micro_batch_size or 1
        for name, count in (
            ("the number of ranks", world_size),
            ("the model's number of experts", experts),
        ):
            if count % ep:
                divisors = [
                    d for d in range(1, world_size + 1) if world_size % d == 0 and experts % d == 0
                ]
                raise UserError(
                    f"parallel.ep: found {ep}, which does not divide {name}, {count}",
                    hint=(
                        f"Choose one of {', '.join(map(str, divisors))} for {world_size} ranks and"
                        f" {experts} experts."
                    ),
                )
        dims = cls(efsdp=world_size // ep, ep=ep)
        has_expert_adapters = config.train.method == "lora" and config.lora.experts
        widths = (hidden, expert_size if has_expert_adapters else 2 * expert_size)
        for width in widths:
            if ep > 1 and width % dims.efsdp:
                raise UserError(
                    f"parallel.ep: found {ep}, which makes {world_size} ranks shard each expert"
                    f" over {dims.efsdp}; that does not divide the expert's width {width}",
                    hint=(
                        f"Choose an ep such that {world_size} / ep divides {widths[1]} and"
                        f" {widths[0]}."
                    ),
                )
        if batch % (world_size * micro):
            nearest = max(1, round(batch / (world_size * micro))) * world_size * micro
            raise UserError(
                f"train.global_batch_size: found {batch}, which does not divide over {world_size}"
                f" ranks x {micro} examples per forward",
                hint=f"Try --set train.global_batch_size={nearest}, or another number of ranks.",
            )
        return dims

    def build_meshes(self, device_type: str) -> DeviceMeshes:
        """Build the device meshes; every rank of the process group makes this call."""
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device_type, (self.efsdp, self.ep), mesh_dim_names=("efsdp", "ep"))
        return DeviceMeshes(efsdp=mesh["efsdp"], ep=mesh["ep"], fsdp=mesh._flatten("fsdp"))


def expert_shard_dim(name: str) -> int:
    """Return the dimension of an expert parameter that is sharded over efsdp; dimension 0 is ep's.

    Weights [E, out, in] and factors B [E, out, r] are sharded along their output, factors A
    [E, r, in] along their input, so that efsdp need not divide the rank of the adapter.
    """
    return 2 if ".lora_A." in f".{name}" else 1

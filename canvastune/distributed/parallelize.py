"""Shard the model: mesh (efsdp, ep), FSDP2 for all, experts divided over ep; gradients are sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard, distribute_tensor

from canvastune.config import RunConfig
from canvastune.distributed.parallel_dims import DeviceMeshes, expert_shard_dim
from canvastune.model import fused
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.moe import local_tensor


def shard_model(model: WeightTiedDiffusionGemma, meshes: DeviceMeshes, config: RunConfig) -> None:
    """Shard a meta-device model in place: experts over ep then efsdp, layers and root over all."""
    compute = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    # cast_forward_inputs would round the routing weights.
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ignored: set[nn.Parameter] = set()
    for layer in model.model.decoder.layers:
        if meshes.ep.size() > 1:
            _apply_expert_parallel(layer.experts, meshes.ep)
            # Frozen experts then need neither a gather nor a reduction.
            if meshes.efsdp.size() == 1:
                ignored.update(p for p in layer.experts.parameters() if not p.requires_grad)
            if not ignored.issuperset(layer.experts.parameters()):
                fully_shard(
                    layer.experts,
                    mesh=meshes.efsdp,
                    mp_policy=precision,
                    shard_placement_fn=_shard_placement(layer.experts),
                    ignored_params=ignored,
                )
        fully_shard(layer, mesh=meshes.fsdp, mp_policy=precision, ignored_params=ignored)
    _skip_last_layer_reshard(model.model.decoder.layers)
    # The lookup, the head and the soft embedding use the root's embedding: gather it once per pass.
    fully_shard(
        model,
        mesh=meshes.fsdp,
        mp_policy=precision,
        reshard_after_forward=False,
        ignored_params=ignored,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are already divided by global counts, so all gradients are sums, the experts'
            # included.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "run_under_fsdp")
    register_fsdp_forward_method(model, "generate")


def _skip_last_layer_reshard(layers: Any) -> None:
    """Keep the last layer gathered, and prefetch nothing before the first layer's backward pass.

    The last layer is used last in one pass and first in the next. Before the first layer's backward
    pass FSDP would prefetch what ran before it in the forward pass: the last layer of the
    self-conditioning pass, which is not needed.
    """
    layers[-1].set_reshard_after_forward(False, recurse=True)
    for module in layers[0].modules():
        if isinstance(module, FSDPModule):
            module.set_modules_to_backward_prefetch([module])


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; return the norm before
    scaling, [] float32.

    Every trained parameter is sharded over all ranks, on one mesh or another, so the squared global
    norm is the sum of the local squares over the world.
    """
    gradients = [
        local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None
    ]
    if gradients and fused.few_launches(gradients[0]):
        squares = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
    else:
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
    if dist.is_initialized():
        dist.all_reduce(squares)
    norm = squares.sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _apply_expert_parallel(experts: Any, mesh: DeviceMesh) -> None:
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.data, mesh, [Shard(0)])
            module.register_parameter(
                name, nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            )
    experts.ep_group = mesh.get_group()


def _shard_placement(experts: nn.Module) -> Callable[[nn.Parameter], Shard]:
    dims = {parameter: expert_shard_dim(name) for name, parameter in experts.named_parameters()}
    return lambda parameter: Shard(dims[parameter])

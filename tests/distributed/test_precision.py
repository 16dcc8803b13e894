"""bfloat16 compute with float32 masters, reduction and optimizer: ranks compute what one process
with the same casts does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.func import functional_call

from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.data.packing import pack
from canvastune.distributed import parallelize as parallel
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import shard_model
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.parameter_names import is_adapter
from canvastune.objective import losses
from canvastune.training.optimizer import build_optimizer
from tests.distributed.test_parallel import whole
from tests.support.small import (
    counts,
    examples_and_draws,
    run_config,
    shared_model,
    worst_difference,
)

FORWARDS = 2  # of each rank: gradients of several micro-batches are summed, too
# Sums of at most eight float32 numbers, in whatever order the ranks take them.
FLOAT32_SUMS = 1e-6
# Under expert parallelism an expert sees the rows of all ranks at once and its gradient is rounded
# to bfloat16 (half an ulp: 2^-9
# of the value) once; in one process each part's gradient is rounded before the parts are added. Two
# roundings lie between them.
BFLOAT16_ROUNDINGS = 2**-8
LAYOUTS = {1: (1,), 2: (1, 2), 4: (2,)}  # ranks -> expert-parallel degrees
FAULTS: dict[str, dict[str, Any]] = {
    "a bfloat16 reduction": {"reduce_dtype": torch.bfloat16},
    "routing weights rounded on their way into the experts": {"cast_forward_inputs": True},
}


class Casts(nn.Module):
    """The plain statement of mixed precision: parameters are rounded to the compute dtype once per
    forward, buffers never.
    """

    def __init__(self, model: WeightTiedDiffusionGemma) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> torch.Tensor:
        return losses(self.model, *args, any_self_conditioned=True, checkpointing=False)[0]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def adapters_that_act(model: nn.Module) -> None:
    """B is zero at first, which would hide A's gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.02)


def cut(parts: int) -> list[slice]:
    size = 8 // parts
    return [slice(start, start + size) for start in range(0, 8, size)]


@functools.cache
def one_process(
    checkpoint: Path, method: str, parts: int, precision: str = "bfloat16"
) -> dict[str, Any]:
    """Loss and float32 gradients of the global batch, cut into as many parts as the ranks make
    forwards.
    """
    model = shared_model(checkpoint, run_config(method, precision=precision))
    adapters_that_act(model)
    examples, draws = examples_and_draws()
    canvas_rows, pairs = counts(examples, draws)
    casts, total = Casts(model), torch.zeros([], dtype=torch.float64)
    for part in cut(parts):
        rounded = {
            name: parameter.to(getattr(torch, precision))
            for name, parameter in casts.named_parameters()
        }
        loss = functional_call(
            casts, rounded, (pack(examples[part], draws[part]), (1 / canvas_rows, 1 / pairs))
        )
        # the part's gradients arrive in the compute dtype, and are summed in the masters' float32
        loss.backward()
        total += loss.detach()
    return {
        "loss": float(total),
        "gradients": {name: parameter.grad for name, parameter in trained(model).items()},
    }


def sharded_step(checkpoint: Path, method: str, ep: int) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    examples, draws = examples_and_draws()
    canvas_rows, pairs = counts(examples, draws)
    config = run_config(method, ep, precision="bfloat16")
    model = build_model(config, read_model_config(checkpoint))
    shard_model(model, ParallelDims(world_size // ep, ep).build_meshes("cpu"), config)
    load_weights(model, CheckpointReader(checkpoint), torch.device("cpu"), config.seed)
    adapters_that_act(model)
    total = torch.zeros([], dtype=torch.float64)
    for part in cut(FORWARDS * world_size)[FORWARDS * rank : FORWARDS * (rank + 1)]:
        batch = pack(examples[part], draws[part])
        loss, _, _ = model.run_under_fsdp(
            losses,
            batch,
            (1 / canvas_rows, 1 / pairs),
            any_self_conditioned=True,
            checkpointing=True,
        )
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    gradients = {name: whole(parameter.grad) for name, parameter in trained(model).items()}
    optimizer = build_optimizer(list(trained(model).values()), config.optimizer)
    optimizer.step()
    return {
        "loss": float(total),
        "gradients": gradients,
        "parameters": {name: str(parameter.dtype) for name, parameter in model.named_parameters()},
        "buffers": {name: str(buffer.dtype) for name, buffer in model.named_buffers()},
        "optimizer": [
            str(value.dtype) for state in optimizer.state.values() for value in state.values()
        ],
    }


def sharded(folder: Path, checkpoint: Path) -> None:
    results = {
        (method, ep): sharded_step(checkpoint, method, ep)
        for method in ("full", "lora")
        for ep in LAYOUTS[dist.get_world_size()]
    }
    faulty = {}
    for fault, changed in FAULTS.items() if dist.get_world_size() == 2 else ():

        def policy(changed: dict[str, Any] = changed, **asked: Any) -> MixedPrecisionPolicy:
            return MixedPrecisionPolicy(**(asked | changed))

        with mock.patch.object(parallel, "MixedPrecisionPolicy", policy):
            faulty[fault] = sharded_step(checkpoint, "full", 2)
    if dist.get_rank() == 0:
        torch.save((results, faulty), folder / f"{dist.get_world_size()}.pt")


Results = dict[int, tuple[dict[tuple[str, int], dict[str, Any]], dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in LAYOUTS:
        run_ranks(sharded, world_size, folder, checkpoint)
    return {
        world_size: torch.load(folder / f"{world_size}.pt", weights_only=True)
        for world_size in LAYOUTS
    }


def differences(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, spread_experts: bool
) -> dict[str, float]:
    """The worst relative difference of gradients among the spread experts', and among all others."""
    apart = {name for name in expected if spread_experts and ".experts." in name}
    kinds = {"others": expected.keys() - apart, "spread experts": apart}
    return {
        kind: worst_difference({n: found[n] for n in names}, {n: expected[n] for n in names})[0]
        for kind, names in kinds.items()
        if names
    }


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_ranks_in_bfloat16_compute_what_one_process_with_the_same_casts_does(
    ranks: Results, checkpoint: Path, method: str, world_size: int
) -> None:
    expected = one_process(checkpoint, method, FORWARDS * world_size)
    for ep in LAYOUTS[world_size]:
        found, where = ranks[world_size][0][method, ep], f"{method}, {world_size} ranks, EP {ep}"
        assert found["loss"] == pytest.approx(expected["loss"], rel=FLOAT32_SUMS), (
            f"{where}: another loss"
        )
        assert all(gradient.dtype == torch.float32 for gradient in found["gradients"].values()), (
            where
        )
        off = differences(found["gradients"], expected["gradients"], spread_experts=ep > 1)
        assert off["others"] < FLOAT32_SUMS, f"{where}: gradients are off by {off}"
        assert off.get("spread experts", 0) < BFLOAT16_ROUNDINGS, (
            f"{where}: gradients are off by {off}"
        )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_on_one_rank_the_casts_are_the_same_to_the_last_bit(
    ranks: Results, checkpoint: Path, method: str
) -> None:
    expected, found = one_process(checkpoint, method, FORWARDS), ranks[1][0][method, 1]
    assert found["loss"] == expected["loss"]
    for name, gradient in expected["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), (
            f"the gradient of {name} has other bits"
        )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rounding_that_does_not_belong_there_is_far_outside_the_bound(
    ranks: Results, checkpoint: Path, fault: str
) -> None:
    expected, found = one_process(checkpoint, "full", FORWARDS * 2), ranks[2][1][fault]
    off = differences(found["gradients"], expected["gradients"], spread_experts=True)
    assert off["others"] > 100 * FLOAT32_SUMS, f"{fault} would not be noticed: {off}"


def test_masters_and_optimizer_are_float32_and_what_is_frozen_is_bfloat16(ranks: Results) -> None:
    for world_size, (results, _) in ranks.items():
        for (method, ep), found in results.items():
            for name, dtype in found["parameters"].items():
                learns = is_adapter(name) if method == "lora" else ".router." not in name
                expected = "torch.float32" if learns else "torch.bfloat16"
                assert dtype == expected, (
                    f"{method}, {world_size} ranks, EP {ep}: {name} is held in {dtype}"
                )
            state = set(found["optimizer"])
            assert state == {"torch.float32"}, f"{method}: the optimizer's state is {state}"
            odd = {
                name: dtype for name, dtype in found["buffers"].items() if dtype != "torch.float32"
            }
            assert not odd, f"rotary frequencies and scalars stay in float32: {odd}"


def test_bfloat16_costs_the_loss_no_more_than_its_rounding(checkpoint: Path) -> None:
    for method in ("full", "lora"):
        rounded, exact = (
            one_process(checkpoint, method, 1, precision)["loss"]
            for precision in ("bfloat16", "float32")
        )
        assert rounded == pytest.approx(exact, rel=2**-8), (
            f"{method}: {rounded} in bfloat16, {exact} in float32"
        )

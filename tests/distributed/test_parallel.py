"""The same loss, gradients, weights and answers on any number of ranks and any expert-parallel
degree (float32, gloo).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.config import parse_config
from canvastune.data.packing import pack
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import clip_gradients, local_tensor, shard_model
from canvastune.errors import UserError
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.parameter_names import base_name
from canvastune.objective import losses
from canvastune.training.optimizer import build_optimizer, learning_rate
from tests.support.small import (
    CANVAS,
    VOCABULARY,
    counts,
    examples_and_draws,
    run_config,
    shared_model,
    worst_difference,
)

STEPS = 2
LORA_WITH_ALL: dict[str, object] = {"experts": True, "rslora": True, "alpha": 8.0, "dropout": 0.25}
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "lora with experts, rslora and dropout": ("lora", LORA_WITH_ALL),
}
Runs = tuple[tuple[str, int], ...]  # methods and expert-parallel degrees
SIZES = {"experts": 8, "hidden": 32, "expert_size": 16}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def some_steps(
    model: WeightTiedDiffusionGemma, rank: int, world_size: int, steps: int = STEPS
) -> dict[str, Any]:
    """Run optimizer steps on this rank's share: losses, first gradients, norms and final trained
    weights, whole.
    """
    examples, draws = examples_and_draws()
    canvas_rows, pairs = counts(examples, draws)
    share = len(examples) // world_size
    mine = slice(rank * share, (rank + 1) * share)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_B." in name:  # zero at first, which would hide A's gradient
                parameter.fill_(0.02)
    optimizer = build_optimizer(list(trained.values()), run_config().optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    totals, norms = [], []
    first: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        loss, _, _ = model.run_under_fsdp(
            losses,
            pack(examples[mine], draws[mine]),
            (1 / canvas_rows, 1 / pairs),
            any_self_conditioned=True,
            checkpointing=True,
        )
        loss.backward()
        total = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        totals.append(float(total))
        first = first or {name: whole(p.grad).clone() for name, p in trained.items()}
        norms.append(float(clip_gradients(list(trained.values()), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": totals,
        "norms": norms,
        "gradients": first,
        "weights": {n: whole(p.detach()).clone() for n, p in trained.items()},
    }


def answer(model: WeightTiedDiffusionGemma) -> torch.Tensor:
    prompt = torch.randint(5, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    # On a GPU it marks a step; here it imports a compiler, which takes each rank seconds.
    unmarked = mock.patch.object(torch.compiler, "cudagraph_mark_step_begin")
    with unmarked, torch.no_grad():
        return model.generate(
            prompt,
            max_new_tokens=2 * CANVAS,
            max_denoising_steps=3,
            eos_token_id=VOCABULARY,
            pad_token_id=0,
        ).sequences


def sharded_steps(folder: Path, checkpoint: Path, runs: Runs, steps: int) -> None:
    for name, ep in runs:
        method, lora = METHODS[name]
        config = run_config(method, ep, lora)
        model = build_model(config, read_model_config(checkpoint))
        shard_model(
            model, ParallelDims(dist.get_world_size() // ep, ep).build_meshes("cpu"), config
        )
        load_weights(model, CheckpointReader(checkpoint), torch.device("cpu"), config.seed)
        result = some_steps(model, dist.get_rank(), dist.get_world_size(), steps)
        parts = dict(model.model.decoder.layers[0].experts.named_parameters())
        result["held"] = {
            part: local_tensor(expert).numel() / expert.numel() for part, expert in parts.items()
        }
        if steps == STEPS:
            result["answer"] = answer(model)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}-{ep}.pt")


@pytest.fixture(scope="module")
def one_process(checkpoint: Path) -> dict[str, dict]:
    results = {}
    for name, (method, lora) in METHODS.items():
        model = shared_model(checkpoint, run_config(method, lora=lora))
        results[name] = {**some_steps(model, 0, 1), "answer": answer(model)}
    return results


def every(*degrees: int) -> Runs:
    return tuple((method, ep) for method in METHODS for ep in degrees)


# Two ranks are covered by tests/unit/test_curves.py, over twenty steps. The full grid is slow.
@pytest.mark.parametrize(
    ("world_size", "runs", "steps"),
    [
        pytest.param(
            4,
            (
                ("full", 1),
                ("full", 2),
                ("full", 4),
                ("lora", 2),
                ("lora with experts, rslora and dropout", 1),
                ("lora with experts, rslora and dropout", 2),
            ),
            STEPS,
            id="4",
        ),
        pytest.param(
            8,
            (
                ("full", 1),
                ("full", 8),
                ("lora", 2),
                ("lora with experts, rslora and dropout", 4),
            ),
            1,
            id="8",
        ),
        pytest.param(2, every(1, 2), STEPS, marks=pytest.mark.slow, id="2, all"),
        pytest.param(4, every(1, 2, 4), STEPS, marks=pytest.mark.slow, id="4, all"),
        pytest.param(8, every(1, 2, 4, 8), 1, marks=pytest.mark.slow, id="8, all"),
    ],
)
def test_loss_gradients_norm_and_weights_do_not_depend_on_the_ranks(
    one_process: dict[str, dict],
    checkpoint: Path,
    tmp_path: Path,
    world_size: int,
    runs: Runs,
    steps: int,
) -> None:
    run_ranks(sharded_steps, world_size, tmp_path, checkpoint, runs, steps)
    for method, ep in runs:
        expected = one_process[method]
        found = torch.load(tmp_path / f"{method}-{ep}.pt", weights_only=True)
        where = f"{method}, {world_size} ranks, EP {ep}"
        assert found["losses"] == pytest.approx(expected["losses"][:steps], rel=1e-5), (
            f"{where}: other losses"
        )
        assert found["norms"] == pytest.approx(expected["norms"][:steps], rel=1e-5), (
            f"{where}: another gradient norm"
        )
        worst, name = worst_difference(found["gradients"], expected["gradients"])
        assert worst < 1e-5, f"{where}: gradient of {name} is off by {worst:.1e}"
        assert set(found["held"].values()) == {1 / world_size}, (
            f"{where}: a rank holds {found['held']} of its experts' parameters"
        )
        if steps < STEPS:
            continue
        worst, name = worst_difference(found["weights"], expected["weights"])
        assert worst < 1e-4, f"{where}: after {STEPS} steps {name} is off by {worst:.1e}"
        assert torch.equal(found["answer"], expected["answer"]), (
            f"{where}: generate() on the sharded model answers differently"
        )


def watched_step(folder: Path, checkpoint: Path) -> None:
    """Two ranks, one pass: what the last layer's dense part and its rows' travel did, in their
    order.
    """
    config = run_config(ep=2)
    model = build_model(config, read_model_config(checkpoint))
    shard_model(model, ParallelDims(1, 2).build_meshes("cpu"), config)
    load_weights(model, CheckpointReader(checkpoint), torch.device("cpu"), config.seed)
    events: list[str] = []
    all_to_all = dist.all_to_all_single

    def watched(out: torch.Tensor, *others: Any, **options: Any) -> Any:
        if out.is_floating_point():  # and not how many rows there will be
            events.append("leave" if options.get("async_op") else "all-to-all")
        work = all_to_all(out, *others, **options)

        def arrive() -> None:
            events.append("arrive")
            work.wait()

        return work and mock.Mock(wait=arrive)

    dense = model.model.decoder.layers[-1].mlp
    dense.register_forward_hook(lambda *_: events.append("dense"))
    dense.register_full_backward_hook(lambda *_: events.append("dense"))
    with mock.patch.object(dist, "all_to_all_single", watched):
        examples, draws = examples_and_draws()
        mine = slice(dist.get_rank(), None, 2)
        loss, _, _ = model.run_under_fsdp(
            losses,
            pack(examples[mine], draws[mine]),
            (0.1, 0.1),
            any_self_conditioned=False,
            checkpointing=False,
        )
        at = len(events)
        loss.backward()
    if dist.get_rank() == 0:
        (folder / "events.json").write_text(json.dumps([events[at - 6 : at], events[at : at + 6]]))


def test_rows_and_their_gradients_travel_while_the_dense_layer_computes(
    checkpoint: Path, tmp_path: Path
) -> None:
    run_ranks(watched_step, 2, tmp_path, checkpoint)
    forward, backward = json.loads((tmp_path / "events.json").read_text())
    # Rows and their weights each; the results' own way is waited for.
    assert forward == ["leave", "leave", "dense", "arrive", "arrive", "all-to-all"]
    assert backward == ["all-to-all", "leave", "leave", "dense", "arrive", "arrive"]


def test_adapters_start_the_same_on_any_number_of_ranks(checkpoint: Path) -> None:
    config = run_config("lora", lora=LORA_WITH_ALL)
    one, two = (dict(shared_model(checkpoint, config).named_parameters()) for _ in range(2))
    for name, parameter in one.items():
        assert torch.equal(parameter, two[name]), (
            f"{base_name(name)} does not depend on the seed only"
        )
        if ".lora_B." in name:
            assert not parameter.any(), "an adapter must start as the identity"


def test_an_expert_parallel_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.ep: found 3, .* 4$"):
        ParallelDims.of(run_config(ep=3), 4, **SIZES)
    with pytest.raises(UserError, match=r"parallel\.ep: found 16, .* 8$"):
        ParallelDims.of(run_config(ep=16), 16, **SIZES)


def test_a_global_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(
        UserError, match=r"train\.global_batch_size: found 6, .* 4 ranks x 1 "
    ) as error:
        ParallelDims.of(run_config(global_batch_size=6), 4, **SIZES)
    assert "train.global_batch_size=8" in error.value.hint


def test_the_first_step_uses_the_first_non_zero_rate_and_the_last_one_the_least() -> None:
    config = parse_config({"name": "r", "data": {"source": "x"}}).optimizer
    rates = [learning_rate(config, step, 800) for step in range(1, 801)]
    assert rates[0] == pytest.approx(config.lr / 25)
    assert rates[24] == pytest.approx(config.lr)
    assert rates[-1] == pytest.approx(config.min_lr)
    assert max(rates) == rates[24]
    assert all(a >= b for a, b in itertools.pairwise(rates[24:]))

"""However a global batch is split over micro-batches and ranks, the step is the plain one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file

from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.config import RunConfig
from canvastune.config.schema import ObjectiveConfig
from canvastune.data.dataset import TrainingDataset
from canvastune.data.packing import Example, pack
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import shard_model
from canvastune.model.lora import lora_factors
from canvastune.noise import NoiseSample
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.flops import needed_flops
from canvastune.training.trainer import Trainer
from tests.distributed.test_parallel import whole
from tests.distributed.test_precision import adapters_that_act, trained
from tests.support.oracle import plain_loss
from tests.support.small import (
    CANVAS,
    EOS,
    VOCABULARY,
    examples_and_draws,
    run_config,
    shared_model,
    stock_model,
    worst_difference,
    write_checkpoint,
)

BATCH = 8
SEED = 4  # whose coins leave one rank without a self-conditioned example, and one with some
CUTS = {1: (1, 2, 4, 8), 2: (1, 2, 4)}  # ranks -> examples per forward
METHODS = ("full", "lora")


class Cut(NamedTuple):
    """How a global batch is computed."""

    method: str
    blocks: Any  # objective.blocks
    ranks: int
    size: int  # examples per forward
    at_once: int | None = None  # blocks of an example in one forward


SEVERAL = [
    Cut("full", "all", 1, 8),
    Cut("lora", 2, 1, 2),
    Cut("full", "all", 2, 2),
    Cut("full", 2, 2, 1),
    Cut("lora", "all", 2, 4),
    Cut("full", "all", 1, 4, 2),
    Cut("full", "all", 2, 2, 2),
    Cut("lora", "all", 2, 1, 1),  # an odd number of parts: one rank has none in the last forward
]
CASES = [
    *(
        Cut(method, 1, ranks, size)
        for ranks, sizes in CUTS.items()
        for size in sizes
        for method in METHODS
    ),
    *SEVERAL,
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a prepared data set of eight ragged examples."""
    folder = tmp_path_factory.mktemp("cuts")
    write_checkpoint(folder / "base", sliding=1)
    _fill_padding_row(folder / "base")
    rows = []
    for example, (prefix, response) in zip(
        examples_and_draws()[0],
        ((12, 20), (40, 33), (7, 8), (60, 5), (3, 40), (21, 16), (50, 24), (9, 1)),
        strict=True,
    ):
        cut = len(example.tokens) == prefix + response and response % CANVAS != 0
        row = {
            "input_ids": example.tokens[: prefix + response].tolist(),
            "prefix_length": prefix,
            "complete": not cut,
            "id": example.id,
        }
        rows.append(row)
    for part in ("train", "validation"):
        Dataset.from_list(rows).save_to_disk(str(folder / "data" / part))
    return folder


def _fill_padding_row(base: Path) -> None:
    """Set the padding token's embedding, as in the released model: with the zeros of a new one, a
    rank without an example would add no gradient, whatever its weight.
    """
    stored = CheckpointReader(base)
    (name,) = [name for name in stored.names() if name.endswith("embed_tokens.weight")]
    tensors = load_file(stored.path(name))
    tensors[name][0] = tensors[name][1]
    save_file(tensors, stored.path(name), metadata={"format": "pt"})


def recipe(method: str, blocks: Any = 1, **train: Any) -> RunConfig:
    config = run_config(method, global_batch_size=BATCH, **train)
    unclipped = config.optimizer.model_copy(update={"max_grad_norm": 1e9})
    objective = config.objective.model_copy(update={"blocks": blocks})
    return config.model_copy(update={"optimizer": unclipped, "objective": objective, "seed": SEED})


def prepared(ground: Path, blocks: Any = 1) -> TrainingDataset:
    sizes = {"canvas_length": CANVAS, "vocab_size": VOCABULARY, "eos_token_id": EOS}
    objective = ObjectiveConfig(blocks=blocks)
    return TrainingDataset(ground / "data", **sizes, seed=SEED, objective=objective)


def trained_step(ground: Path, config: RunConfig) -> dict[str, Any]:
    """One step of the trainer: its record, and the gradients as the optimizer saw them, whole."""
    model = build_model(config, read_model_config(ground / "base"))
    shard_model(
        model,
        ParallelDims(dist.get_world_size() // config.parallel.ep, config.parallel.ep).build_meshes(
            "cpu"
        ),
        config,
    )
    load_weights(model, CheckpointReader(ground / "base"), torch.device("cpu"), config.seed)
    adapters_that_act(model)
    unused: Any = SimpleNamespace(wait_staged=lambda: None)
    trainer = Trainer(config, model, prepared(ground, config.objective.blocks), unused, None, None)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update(
            {name: whole(parameter.grad).clone() for name, parameter in trained(model).items()}
        )

    trainer.optimizer.register_step_pre_hook(keep)
    record = trainer.train_step()
    numbers = {
        key: record[key] for key in ("loss", "diffusion_loss", "autoregressive_loss", "grad_norm")
    }
    return {
        **numbers,
        "flops": record["tflops"] * 1e12 * record["seconds"] * dist.get_world_size(),
        "gradients": gradients,
    }


def every_cut(folder: Path, ground: Path) -> None:
    world_size = dist.get_world_size()
    results = {
        tuple(cut): trained_step(
            ground,
            recipe(
                cut.method, cut.blocks, micro_batch_size=cut.size, micro_batch_blocks=cut.at_once
            ),
        )
        for cut in CASES
        if cut.ranks == world_size
    }
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{world_size}.pt")


@pytest.fixture(scope="module")
def cuts(
    ground: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[tuple[Any, ...], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in CUTS:
        run_ranks(every_cut, world_size, folder, ground)
    return {
        world_size: torch.load(folder / f"{world_size}.pt", weights_only=True)
        for world_size in CUTS
    }


@pytest.fixture(scope="module")
def plain(ground: Path) -> dict[tuple[str, Any], dict[str, Any]]:
    """The plain step of stock modules, one block of an example at a time.

    An adapter's gradient follows from its merged weight's, W + s B A.
    """
    results = {}
    for method, blocks in {case[:2] for case in CASES}:
        examples, draws = global_batch(ground, blocks)
        config = recipe(method)
        ours, stock = shared_model(ground / "base", config), stock_model(ground / "base")
        adapters_that_act(ours)
        weights = {
            name.replace("model.encoder.language_model.", "model.decoder."): p
            for name, p in stock.named_parameters()
        }
        names = {parameter: name for name, parameter in ours.named_parameters()}
        adapted = {
            names[a].partition(".lora_A.")[0] + ".weight": (a, b) for _, a, b in lora_factors(ours)
        }
        with torch.no_grad():
            for name, (a, b) in adapted.items():
                weights[name] += config.lora.scale * b @ a
        loss, diffusion, autoregressive = plain_loss(stock, examples, draws)
        loss.backward()
        gradients: dict[str, Any] = {
            name: weights[name].grad for name in trained(ours) if name in weights
        }
        for name, (a, b) in adapted.items():
            upstream = config.lora.scale * weights[name].grad
            gradients |= {names[a]: b.detach().T @ upstream, names[b]: upstream @ a.detach().T}
        losses = {
            "loss": float(loss.detach()),
            "diffusion_loss": diffusion,
            "autoregressive_loss": autoregressive,
        }
        results[method, blocks] = {**losses, "gradients": gradients}
    return results


def global_batch(ground: Path, blocks: Any) -> tuple[list[Example], list[tuple[NoiseSample, ...]]]:
    data = prepared(ground, blocks)
    examples = data.train_examples(range(BATCH))
    return examples, [data.train_draws(example, at) for at, example in enumerate(examples)]


@pytest.mark.parametrize("cut", CASES, ids=str)
def test_loss_and_gradients_do_not_depend_on_how_a_global_batch_is_cut(
    plain: dict[tuple[str, Any], dict],
    cuts: dict[int, dict],
    cut: Cut,
) -> None:
    found, expected = cuts[cut.ranks][tuple(cut)], plain[cut.method, cut.blocks]
    where = str(cut)
    for key in ("loss", "diffusion_loss", "autoregressive_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), f"{where}: another {key}"
    worst, name = worst_difference(found["gradients"], expected["gradients"])
    assert worst < 1e-5, (
        f"{where}: the gradient of {name} is off by {worst:.1e} relative to the plain step"
    )
    norm = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-5), (
        f"{where}: another gradient norm"
    )


@pytest.mark.parametrize(("method", "blocks"), sorted({case[:2] for case in CASES}, key=str))
def test_the_flops_of_a_step_are_its_examples_however_it_is_cut(
    cuts: dict[int, dict], ground: Path, method: str, blocks: Any
) -> None:
    batch = pack(*global_batch(ground, blocks))
    needed = needed_flops(read_architecture(recipe(method), ground / "base"), batch)
    found = {
        cut: cuts[cut.ranks][tuple(cut)]["flops"]
        for cut in CASES
        if (cut.method, cut.blocks) == (method, blocks)
    }
    assert found == pytest.approx(dict.fromkeys(found, needed), rel=1e-9), (
        "ranks that wait or compute twice are not worth more"
    )


def test_several_blocks_are_drawn_where_an_example_has_them(ground: Path) -> None:
    for blocks, most in ((1, 1), (2, 2), ("all", 99)):
        examples, draws = global_batch(ground, blocks)
        data = prepared(ground, blocks)
        assert [len(own) for own in draws] == [min(most, example.blocks) for example in examples]
        assert [tuple(sorted({d.block for d in own})) for own in draws] == [
            tuple(d.block for d in own) for own in draws
        ]
        assert list(map(any_coin, draws)) == [
            data.any_self_conditioned(data.parts([at])) for at in range(BATCH)
        ]


def test_a_cut_leaves_a_rank_without_a_part(ground: Path) -> None:
    shares = prepared(ground, "all").balance_microbatches(range(BATCH), 2, 1, 1)
    assert [] in shares[-1]
    assert any(shares[-1])


def any_coin(draws: tuple[NoiseSample, ...]) -> bool:
    return any(draw.self_condition for draw in draws)


def test_the_cuts_hold_every_case_of_ragged_work(ground: Path) -> None:
    data = prepared(ground)
    examples = data.train_examples(range(BATCH))
    coins = [data.any_self_conditioned(data.parts([position])) for position in range(BATCH)]
    pairs = {
        (coins[step], coins[step + 1]) for step in range(0, BATCH, 2)
    }  # of two ranks, an example each
    assert (True, False) in pairs or (False, True) in pairs, (
        "no cut leaves only one rank with a self-conditioned example"
    )
    assert (False, False) in pairs, "no forward of all ranks skips the self-conditioning pass"
    assert (True, True) in pairs
    halves = {
        (any(coins[step : step + 2]), any(coins[step + 2 : step + 4])) for step in (0, 4)
    }  # two examples each
    assert (True, False) in halves or (False, True) in halves
    assert len({len(example.tokens) for example in examples}) > 5
    assert any(
        len(example.tokens) % CANVAS != example.prefix_length % CANVAS for example in examples
    ), "no last block is cut"

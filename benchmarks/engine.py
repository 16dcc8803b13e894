"""The engine as the benchmarks run it: recipe, model, data of random tokens, trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import DiffusionGemmaConfig

from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights
from canvastune.checkpoint.resume import Checkpoints
from canvastune.config import RunConfig, parse_config
from canvastune.data.dataset import TrainingDataset
from canvastune.data.packing import Example
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import shard_model
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.noise import NoiseSample, training_block_draws
from canvastune.training.trainer import Trainer


def bench_recipe(ep: int = 1, **train: Any) -> RunConfig:
    """Return a recipe of full fine-tuning in float32, unless `train` says otherwise."""
    return parse_config(
        {
            "name": "bench",
            "data": {"source": "none"},
            "train": {"method": "full", "precision": "float32", **train},
            "parallel": {"ep": ep},
        }
    )


def sharded_model(
    config: RunConfig, model_config: DiffusionGemmaConfig, world_size: int, device: str = "cpu"
) -> WeightTiedDiffusionGemma:
    """Build the engine's model on the meta device, sharded over the world of this rank."""
    model, ep = build_model(config, model_config), config.parallel.ep
    shard_model(model, ParallelDims(world_size // ep, ep).build_meshes(device), config)
    return model


def loaded_model(
    config: RunConfig, model_config: DiffusionGemmaConfig, folder: Path, seed: int = 0
) -> WeightTiedDiffusionGemma:
    """Load a checkpoint on the CPU, sharded over the ranks if there is a process group."""
    if dist.is_initialized():
        model = sharded_model(config, model_config, dist.get_world_size())
    else:
        model = build_model(config, model_config)
    load_weights(model, CheckpointReader(folder), torch.device("cpu"), seed)
    return model


def allocate_gradients(model: torch.nn.Module) -> None:
    """Set each trained parameter's gradient to zeros, which a measured step adds to."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def held_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return parameters and gradients."""
    pairs = ((parameter.detach(), parameter.grad) for parameter in model.parameters())
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def draw_noise(
    seed: int, example: Example, vocabulary: int, *, count: int = 1, coin: float = 0.5
) -> tuple[NoiseSample, ...]:
    """Draw the noise of some blocks of an example, whose id is its position in the stream.

    Args:
        coin: probability of self-conditioning.
    """
    return training_block_draws(
        seed,
        int(example.id),
        count,
        blocks=example.blocks,
        canvas_length=example.canvas_length,
        vocab_size=vocabulary,
        min_corruption=0.001,
        self_conditioning_probability=coin,
    )


def write_random_rows(
    folder: Path, count: int, vocabulary: int, *, tokens: int, prefix: int
) -> None:
    """Write a prepared data set of random tokens, the same rows for training and validation."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(5, vocabulary, (tokens,), generator=generator).tolist(),
            "prefix_length": prefix,
            "complete": True,
            "id": str(row),
        }
        for row in range(count)
    ]
    for split in ("train", "validation"):
        Dataset.from_list(rows).save_to_disk(str(folder / split))


def make_trainer(
    config: RunConfig,
    model: WeightTiedDiffusionGemma,
    model_config: DiffusionGemmaConfig,
    data: Path,
    checkpoints: Any = None,
) -> Trainer:
    """Return a trainer on prepared data, which logs nothing.

    Args:
        checkpoints: None: those of a folder next to the data, which is not written.
    """
    dataset = TrainingDataset.of_run(data, config, model_config)
    checkpoints = checkpoints or Checkpoints(data.with_name("checkpoints"), config, "")
    return Trainer(config, model, dataset, checkpoints, None, None)

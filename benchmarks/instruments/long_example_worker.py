"""Run checkpointed steps of a checkout on a long example, for `benchmarks.long_example`: of the
checkout that PYTHONPATH names. Argument: the folder of the weights.

Each line on standard input asks for two steps; the answer is a line with their loss, peak memory
and CPU seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks import step
from benchmarks.measure import extra_memory
from canvastune.config import parse_config

SHAPE = step.Shape(
    "one example of 16,384 tokens",
    {"layers": 6, "hidden": 128, "experts": 16, "vocabulary": 4096, "canvas": 256},
    ((8192, 8192),),
)


def main() -> None:
    torch.set_num_threads(1)
    try:  # where older commits have them
        loading = importlib.import_module("canvastune.model.load")
        reading = importlib.import_module("canvastune.model.checkpoint_files")
    except ModuleNotFoundError:
        loading = importlib.import_module("canvastune.checkpoint.load")
        reading = importlib.import_module("canvastune.checkpoint.hf_format")
        devices = importlib.import_module("canvastune.training.devices")
        devices.select_device()  # as the trainer does
    config = parse_config(
        {
            "name": "bench",
            "data": {"source": "none"},
            "train": {"method": "full", "precision": "float32"},
            "parallel": {"ep": 1},
        }
    )
    model = loading.build_model(config, SHAPE.config())
    stored = reading.CheckpointReader(Path(sys.argv[1]))
    loading.load_weights(model, stored, torch.device("cpu"), config.seed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    examples, draws = step.made_examples(SHAPE)
    losses: list[torch.Tensor] = []

    def two_steps() -> None:
        losses.extend(step.our_step(model, examples, draws, True) for _ in range(2))

    for _ in sys.stdin:
        started = time.process_time()
        memory = extra_memory(two_steps)
        seconds = time.process_time() - started
        answer = {"loss": float(losses[-1]), "extra_memory_bytes": memory, "cpu_seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

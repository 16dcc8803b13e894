"""Run steps of a checkout on request, for `benchmarks.step_commits`: of the checkout that PYTHONPATH
names, this one or an older one. Arguments: the folder of the weights, a shape of `benchmarks.step`.

Each line on standard input is a value of `train.activation_checkpointing` as JSON; the answer is a
line with the loss.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch

from benchmarks import step
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights
from canvastune.config import parse_config


def main() -> None:
    folder, shape = Path(sys.argv[1]), step.SHAPES[sys.argv[2]]
    torch.set_num_threads(step.THREADS)
    config = parse_config(
        {
            "name": "bench",
            "data": {"source": "none"},
            "train": {"method": "full", "precision": "float32"},
            "parallel": {"ep": 1},
        }
    )
    model = build_model(config, copy.deepcopy(shape.config()))
    load_weights(model, CheckpointReader(folder), torch.device("cpu"), config.seed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    examples, draws = step.made_examples(shape)
    for line in sys.stdin:
        loss = step.our_step(model, examples, draws, json.loads(line))
        print(json.dumps(float(loss)), flush=True)


if __name__ == "__main__":
    main()

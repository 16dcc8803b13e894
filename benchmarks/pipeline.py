"""`python -m benchmarks.pipeline [--rounds 3]`: the wall time of the local pipeline outside of its
steps.

Runs `canvastune run` on a tiny model and a few training steps, and times what it says: a step
begins with its name and ends with its
seconds. What is left is the command's own start, compiling, and handing over between steps. Writes
benchmarks/results/pipeline.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import ROOT, command_parser, python_module, say, write_result
from canvastune.tiny_model import make_tiny_model, write_problems

GOAL = 5.0  # seconds outside of the steps
STEPS = ("resolve", "prepare_data", "plan", "train", "merge_lora", "evaluate", "report", "finish")
_ENDED = re.compile(r"    \d+\.\d s")


def main() -> int:
    parser = command_parser("benchmarks.pipeline", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-pipeline-") as folder:
        work = Path(folder)
        make_tiny_model(work / "base")
        write_problems(work / "problems.jsonl", "compare", 1000, seed=0)
        recipe = write_recipe(work)
        runs = []
        for number in range(options.rounds):
            runs.append(run_once(recipe, work / f"workspace-{number}"))
            say(
                "pipeline",
                f"round {number + 1}: {runs[-1]['seconds']:.1f} s, {runs[-1]['outside']:.2f} s of"
                " them outside of the steps",
            )
    median = sorted(runs, key=lambda run: run["outside"])[len(runs) // 2]
    write_result("pipeline", {"rounds": options.rounds, **median})
    print(json.dumps(median, indent=2))
    return int(median["outside"] > GOAL)


def run_once(recipe: Path, workspace: Path, checkout: Path = ROOT) -> dict[str, Any]:
    """Run once from an empty workspace: seconds in total, of each step, until it begins, and
    outside of the steps.

    Args:
        checkout: the code that runs.
    """
    command = python_module("pipelines.cli", "run", recipe, "--workspace", workspace)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(checkout),
        "PYTHONUNBUFFERED": "1",
    }
    steps: dict[str, float] = {}
    begins: dict[str, float] = {}
    said: list[str] = []
    begun = before = between = last = 0.0
    name = ""
    started = time.monotonic()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=workspace.parent,
    ) as process:
        assert process.stdout is not None
        for line in map(str.rstrip, process.stdout):
            now = time.monotonic() - started
            said.append(line)
            if line in STEPS:
                begun = begins[line] = now
                name = line
                if steps:
                    between += now - last
                else:
                    before = now
            elif name and _ENDED.fullmatch(line):
                steps[name], last, name = now - begun, now, ""
    total = time.monotonic() - started
    if process.returncode or set(steps) != set(STEPS):
        ended = f"the pipeline ended with exit code {process.returncode}"
        raise SystemExit("\n".join([*said, f"{ended}; steps seen: {', '.join(steps)}"]))
    return {
        "seconds": total,
        "outside": total - sum(steps.values()),
        "before_the_first": before,
        "between": between,
        "after_the_last": total - last,
        "begins": begins,
        "steps": steps,
    }


def write_recipe(work: Path) -> Path:
    tree = {
        "name": "overhead",
        "model": {"id": str(work / "base")},
        "data": {"source": str(work / "problems.jsonl"), "seq_length": 128, "validation_rows": 32},
        "train": {
            "method": "lora",
            "steps": 4,
            "global_batch_size": 8,
            "precision": "float32",
            "validation_batches": 1,
        },
        "parallel": {"nproc_per_node": 1, "ep": 1},
        "evaluate": {
            "rows": 8,
            "batch_size": 8,
            "max_new_tokens": 16,
            "max_denoising_steps": 4,  # a name that earlier commits read, too
        },
        "hardware": {"accelerator": "cpu", "gpu_memory": 12},
    }
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


if __name__ == "__main__":
    sys.exit(main())

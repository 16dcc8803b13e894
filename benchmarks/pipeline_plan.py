"""`python -m benchmarks.pipeline_plan`: time and GPU-hours of every step of the pipeline at full size,
by plan.

What needs a GPU is planned for the recipe's accelerators; what does not was measured on a CPU: rows
per second of preparation, GB per second of merge and its proof, and what a step takes when it has next
to nothing to do. Evaluation is planned three times: as it was, with stock `generate()` on one GPU; and
with our sampler on one GPU and on all that trained. Both answer the same: answers that fill
`data.seq_length`; a block takes half of the denoising steps on average, and the slowest of a batch of
stock's takes all. The bytes that stock moves for each logit are those counted by
`benchmarks.evaluation`. Writes benchmarks/results/pipeline_plan.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.measure import ROOT, read_result, say, write_result
from canvastune.config import RunConfig, load_config
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.evaluation import (
    AnswerShape,
    answer_memory,
    trunk_seconds,
)
from canvastune.perf_model.hardware import BANDWIDTH_SHARE, find_accelerator
from canvastune.planner.evaluation import STEPS
from canvastune.planner.plan import Plan
from canvastune.planner.planner import SHIPPED_CONFIG, make_plan

RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"
ROWS = 7_473  # of GSM8K's training split
READ_RATE = 1e9  # bytes per second that a node reads from the workspace, assumed
STOCK_BATCH = 8
MEAN_STEPS = 0.5  # of a block, of the most


def main() -> int:
    argparse.ArgumentParser("benchmarks.pipeline_plan", description=__doc__).parse_args()
    steps = planned_steps()
    print(json.dumps(steps, indent=2))
    write_result("pipeline_plan", steps)
    return 0


def planned_steps() -> dict[str, Any]:
    """Return seconds and GPUs by step, for each way to evaluate."""
    config = load_config(RECIPE)
    fixed = read_result("pipeline")["steps"]
    merge = read_result("merge")["merge_and_proof"]["gb_per_second"] * 1e9
    data = read_result("data")["one_process"]["rows_per_second"]["prepare_data"]
    plan = make_plan(config, SHIPPED_CONFIG, config.world_size)
    checkpoint = _weight_bytes(config)
    common = {
        "resolve": (fixed["resolve"], 0),
        "plan": (fixed["plan"], 0),
        "prepare_data": (fixed["prepare_data"] + ROWS / data, 0),
        "train": (
            fixed["train"] + checkpoint / READ_RATE + plan.run_seconds + plan.validation.total,
            plan.world_size,
        ),
        "merge_lora": (fixed["merge_lora"] + checkpoint / merge, 0),
    }
    ways = {
        "stock": (1, _stock_seconds(config, plan)),
        "ours": (1, MEAN_STEPS * _planned(config, 1).evaluation.seconds),
        "ours_on_all": (
            plan.world_size,
            MEAN_STEPS * _planned(config, plan.world_size).evaluation.seconds,
        ),
    }
    found: dict[str, Any] = {"recipe": config.name, "accelerator": plan.accelerator, "ways": {}}
    for name, (gpus, answering) in ways.items():
        evaluation = fixed["evaluate"] + 2 * checkpoint / READ_RATE + answering
        steps = common | {"evaluate": (evaluation, gpus), "report": (fixed["report"], 0)}
        steps["finish"] = (fixed["finish"], 0)
        found["ways"][name] = {
            "answering": answering,
            "steps": {
                step: {"seconds": seconds, "gpus": count, "gpu_hours": seconds * count / 3600}
                for step, (seconds, count) in steps.items()
            },
        }
        longest = max(steps, key=lambda step: steps[step][0])
        say("pipeline_plan", f"{name}: the longest step is {longest}")
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return the rows of the table in docs/performance.md."""
    ways = [way["steps"] for way in found["ways"].values()]
    keys = ("seconds", "gpu_hours")
    rows = {step: [{key: way[step][key] for key in keys} for way in ways] for step in ways[0]}
    rows["all"] = [{key: sum(step[key] for step in way.values()) for key in keys} for way in ways]
    return [f"| {step} | {' | '.join(map(_cells, cells))} |" for step, cells in rows.items()]


def _cells(step: dict[str, float]) -> str:
    return f"{step['seconds']:,.0f} | {step['gpu_hours']:.2f}"


def _planned(config: RunConfig, gpus: int) -> Plan:
    return make_plan(config.with_values("evaluate", gpus=gpus), SHIPPED_CONFIG, config.world_size)


def _stock_seconds(config: RunConfig, plan: Plan) -> float:
    """Return the seconds in which stock `generate()` answers for both models."""
    architecture = read_architecture(config, SHIPPED_CONFIG)
    accelerator = find_accelerator(config.hardware.accelerator)
    blocks = round(plan.evaluation.blocks_per_answer)
    shape = AnswerShape(
        rows=STOCK_BATCH,
        ep=1,
        prompt=config.data.seq_length,
        answer=blocks * architecture.canvas,
    )
    logits = STOCK_BATCH * architecture.canvas * architecture.vocabulary
    moved = read_result("evaluation")["shapes"]["head"]["stock_bytes_per_logit"] * logits
    step = trunk_seconds(architecture, shape, accelerator)
    step += moved / (accelerator.bandwidth * 1e9 * BANDWIDTH_SHARE)
    batches = -(-config.evaluate.rows // STOCK_BATCH)
    most = config.evaluate.sampler.steps or STEPS
    return 2 * batches * blocks * most * step


def _weight_bytes(config: RunConfig) -> int:
    shape = AnswerShape(rows=1, ep=1, prompt=1, answer=1)
    return answer_memory(read_architecture(config, SHIPPED_CONFIG), shape)["weights"]


if __name__ == "__main__":
    sys.exit(main())

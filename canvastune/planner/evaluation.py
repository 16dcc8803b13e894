"""How many GPUs evaluation takes, what it holds on each, and how long it answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.perf_model.architecture import Architecture, read_architecture
from canvastune.perf_model.evaluation import (
    AnswerShape,
    answer_memory,
    denoising_seconds,
)
from canvastune.perf_model.hardware import Accelerator, find_accelerator
from canvastune.planner.blocks import Answers
from canvastune.planner.estimate import available_bytes, largest_fitting, reserved_bytes
from canvastune.planner.plan import EvaluationPlan, refuse_evaluation

STEPS = 48  # of a block at most, of DiffusionGemma's own generation_config.json
_MODELS = 2  # base and tuned


def evaluation_layout(config: RunConfig, model: Path, gpus: int | None = None) -> EvaluationPlan:
    """Plan only the evaluation, whose memory decides over how many GPUs the experts are divided.

    Args:
        model: a checkpoint's folder, or a config.json.
        gpus: that there are; None: as the recipe says.

    Raises:
        UserError: it does not fit, or the model or the accelerator is unknown.
    """
    if gpus is not None:
        config = config.with_values("evaluate", gpus=gpus)
    architecture = read_architecture(config, model)
    answers = Answers.assumed(config, architecture.canvas)
    accelerator = find_accelerator(config.hardware.accelerator)
    plan = plan_evaluation(config, architecture, accelerator, answers)
    refuse_evaluation(config.name, plan)
    return plan


def plan_evaluation(
    config: RunConfig, architecture: Architecture, accelerator: Accelerator, answers: Answers
) -> EvaluationPlan:
    """Plan the evaluation: on the GPUs of `evaluate.gpus`, or on as few as hold the model.

    The experts are divided over as few GPUs as hold them. If no number does, the plan that needs
    the least is returned, and does not fit.
    """
    plans = [
        _plan(config, architecture, accelerator, answers, gpus, ep)
        for gpus, ep in _layouts(config, architecture)
    ]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _layouts(config: RunConfig, architecture: Architecture) -> list[tuple[int, int]]:
    """Return the numbers of GPUs, and of those that share the experts, in the order of preference."""
    given, node = config.evaluate.gpus, config.parallel.nproc_per_node
    degrees = [
        ep
        for ep in range(1, architecture.experts + 1)
        if architecture.experts % ep == 0 and (ep <= node or ep % node == 0)
    ]
    if given is None:
        return [(ep, ep) for ep in degrees]
    return [(given, ep) for ep in degrees if given % ep == 0]


def _plan(
    config: RunConfig,
    architecture: Architecture,
    accelerator: Accelerator,
    answers: Answers,
    gpus: int,
    ep: int,
) -> EvaluationPlan:
    settings, canvas = config.evaluate, architecture.canvas
    questions = settings.rows * settings.repeats
    most = -(-settings.max_new_tokens // canvas)
    shape = AnswerShape(
        rows=min(settings.batch_size, -(-questions // gpus)),
        ep=ep,
        prompt=config.data.seq_length,
        answer=most * canvas,
        device="cpu" if config.hardware.accelerator == "cpu" else "cuda",
    )
    memory = answer_memory(architecture, shape)
    if accelerator.process:
        memory["process"] = round(accelerator.process * 1e9)
    size, limit = sum(memory.values()), available_bytes(config, accelerator)

    def fits(rows: int) -> bool:
        needed = sum(answer_memory(architecture, dataclasses.replace(shape, rows=rows)).values())
        needed += memory.get("process", 0)
        return needed + reserved_bytes(needed, accelerator) <= limit

    blocks = sum(min(count, most) * rows for count, rows in answers.rows.items())
    blocks_a_row = blocks / sum(answers.rows.values())
    steps = questions * blocks_a_row * (settings.sampler.steps or STEPS) / (gpus * shape.rows)
    seconds = _MODELS * steps * denoising_seconds(architecture, shape, accelerator)
    return EvaluationPlan(
        gpus=gpus,
        ep=ep,
        rows=settings.rows,
        batch_size=shape.rows,
        memory=memory,
        memory_bytes=size,
        reserved_bytes=reserved_bytes(size, accelerator),
        limit_bytes=limit,
        largest_batch_size=largest_fitting(fits, shape.rows),
        blocks_per_answer=blocks_a_row,
        seconds=seconds,
    )

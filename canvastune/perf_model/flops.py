"""What one rank computes and sends in an optimiser step: FLOPs by part, bytes by collective.

A matmul of [m, k] and [k, n] is 2 * m * k * n FLOPs; attention is counted over the whole rectangle of queries and keys, as a
masked kernel computes it. Elementwise work and the few bytes of counts, losses and norms are left out.

Letters: T tokens, S clean and C canvas tokens of an example, H hidden size, V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from canvastune.config.schema import Checkpointing
from canvastune.data.packing import PackedBatch
from canvastune.model.attention import sliding_window_rows
from canvastune.model.diffusion_gemma import is_recomputed
from canvastune.perf_model.architecture import Architecture, LayerShape, Weight
from canvastune.perf_model.memory import FLOAT, StepShape, fsdp_units

Parts = dict[str, float]  # by part of the model

PASS_1, FORWARD, BACKWARD, RECOMPUTED, IDLE = "pass 1 (self-conditioning)", "forward", "backward", "recomputed", "idle pass 1"
_IDLE_TOKENS = 2  # a clean one and a canvas of one
LAYERS_GATHER, ROOT_GATHER = "all-gather of layers", "all-gather of the embedding"
REDUCE, EXPERTS_GATHER = "reduce-scatter of gradients", "all-gather of experts"
EXPERTS_REDUCE, EXCHANGE = "reduce-scatter of experts' gradients", "all-to-all of expert rows"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one rank's optimiser step, by pass and by part of the model."""

    by_pass: dict[str, float]  # expected over the coins of self-conditioning
    by_part: dict[str, float]  # all passes
    model: float  # without what is computed twice or for nothing

    @property
    def total(self) -> float:
        return sum(self.by_pass.values())


def count_flops(architecture: Architecture, step: StepShape) -> Flops:
    """Count one rank's step, with its share of the global batch."""
    tokens = step.clean + step.canvas
    products = _products(architecture, step.checkpointing)
    forward, backward, recomputed = ({kind: product * tokens for kind, product in parts.items()} for parts in products)
    scores = scores_again = 0.0
    for index, layer in enumerate(architecture.layers):
        own, again_here = _scores(step, step.clean, layer, architecture.window), is_recomputed(step.checkpointing, index)
        scores += own
        _add(recomputed, {"attention": own * (again_here + 0.5)})  # fused kernels form the scores again in the backward pass
        scores_again += _scores(step, step.past, layer, architecture.window)
    again = {kind: product * self_conditioning_share(step) for kind, product in forward.items()}
    _add(forward, {"attention": scores})
    _add(backward, {"attention": 2 * scores})

    block = 6 * architecture.hidden * architecture.intermediate * step.canvas
    row = 2 * architecture.hidden * architecture.vocabulary
    soft = row * step.canvas  # canvas logits to the embedding, or back
    idle = _sum(forward, {"self-conditioning": block})
    pass_1 = _sum(again, {"attention": scores_again, "head": soft, "self-conditioning": block + soft})
    scored = row * (step.clean - 1 + step.canvas)
    _add(forward, {"self-conditioning": block, "head": scored})
    _add(backward, {"head": scored})
    if architecture.full:
        _add(backward, {"head": scored, "self-conditioning": 2 * block + step.self_conditioning * soft})
        _add(recomputed, {"head": step.self_conditioning * soft})

    examples = step.micro_batch * step.micro_steps
    passes = {
        PASS_1: (pass_1, step.self_conditioning * examples),
        FORWARD: (forward, examples),
        BACKWARD: (backward, examples),
        RECOMPUTED: (recomputed, examples),
        IDLE: (idle, padding_pass_share(step) * step.micro_steps * _IDLE_TOKENS / (step.clean + step.canvas)),
    }
    by_part: Parts = {}
    for parts, times in passes.values():
        _add(by_part, parts, times)
    by_pass = {name: sum(parts.values()) * times for name, (parts, times) in passes.items()}
    return Flops(by_pass, by_part, sum(by_pass[name] for name in (PASS_1, FORWARD, BACKWARD)))


def needed_flops(architecture: Architecture, batch: PackedBatch) -> float:
    """What the loss and the gradients of a batch need: its own tokens and scored rows, nothing computed twice or for nothing."""
    examples = zip(batch.clean_lengths, batch.canvas_lengths, batch.block_starts, batch.self_conditioned, strict=True)
    steps = (
        StepShape(1, 1, 1, 1, clean, canvas, checkpointing=False, self_conditioning=float(coin), chosen_start=start)
        for clean, canvas, start, coin in examples
    )
    return sum(count_flops(architecture, step).model for step in steps)


def count_bytes(architecture: Architecture, step: StepShape) -> dict[str, float]:
    """Bytes that one rank receives from others in an optimiser step, by collective; it sends as many."""
    groups = fsdp_units(architecture, step)
    anyone = any_self_conditioning_share(step)
    passes = 2 + anyone  # pass 1, the forward pass, and once more for the backward pass; the last layer stays in between
    exchanged, idle = _exchanged(architecture, step), padding_pass_share(step) * _IDLE_TOKENS / step.tokens

    def gathered(received: list[int]) -> float:
        return float(step.micro_steps * (passes * sum(received[:-1]) + received[-1]))

    return {
        LAYERS_GATHER: gathered([group.received for group in groups.layers]),
        EXPERTS_GATHER: gathered([group.received for group in groups.experts]),
        ROOT_GATHER: float(step.micro_steps * groups.root.received),
        REDUCE: float(step.micro_steps * sum(group.reduced for group in (groups.root, *groups.layers))),
        EXPERTS_REDUCE: float(step.micro_steps * sum(group.reduced for group in groups.experts)),
        EXCHANGE: exchanged * (2 + recomputed_share(architecture, step) + step.self_conditioning * self_conditioning_share(step) + idle),
    }


def recomputed_share(architecture: Architecture, step: StepShape) -> float:
    """Of the layers, those that the backward pass recomputes."""
    layers = len(architecture.layers)
    return sum(is_recomputed(step.checkpointing, index) for index in range(layers)) / layers


def any_self_conditioning_share(step: StepShape) -> float:
    """Probability that some rank denoises an example of a micro-batch twice: then all of them gather the layers for it."""
    return 1 - (1 - step.self_conditioning) ** (step.micro_batch * step.world_size)


def padding_pass_share(step: StepShape) -> float:
    """Probability that a rank has no such example in a micro-batch while another has: it runs pass 1 on two tokens for nothing."""
    none = (1 - step.self_conditioning) ** step.micro_batch
    return none * (1 - none ** (step.world_size - 1))


def self_conditioning_share(step: StepShape) -> float:
    """Of an example's tokens, those that pass 1 takes through the layers: the canvas, and the clean ones before its block."""
    return (step.past + step.canvas) / (step.clean + step.canvas)


def slowest_self_conditioning(step: StepShape) -> float:
    """Expected share of a micro-batch that the rank with most coins denoises twice; the others wait for it."""
    probability, batch = step.self_conditioning, step.micro_batch
    cumulative, expected, term = 0.0, 0.0, (1 - probability) ** batch
    for coins in range(batch):  # E[max] = sum over k of P(max > k)
        cumulative += term
        expected += 1 - min(1.0, cumulative) ** step.world_size
        if probability < 1:
            term *= (batch - coins) / (coins + 1) * probability / (1 - probability)
    return expected / batch


def _exchanged(architecture: Architecture, step: StepShape) -> float:
    """Bytes of a dispatch and a combine, over all layers and examples of the step."""
    rows = step.tokens * step.micro_steps * architecture.experts_per_token
    away = (step.ep - 1) / step.ep  # with balanced experts
    row = 2 * architecture.hidden * architecture.compute_bytes + FLOAT  # there and back, and its weight there
    return len(architecture.layers) * rows * row * away


@functools.lru_cache(maxsize=8)  # a thousand weights, and the trainer asks for every example
def _products(architecture: Architecture, checkpointing: Checkpointing) -> tuple[Parts, Parts, Parts]:
    """One token's products with the layers' weights, by kind: forward, backward and recomputed."""
    forward: Parts = {}
    backward: Parts = {}
    recomputed: Parts = {}
    for weight in architecture.weights:
        if weight.layer is not None:
            product = _matmul(architecture, weight)
            _add(forward, {weight.kind: product})
            _add(backward, {weight.kind: product * (_input_needs_gradient(architecture, weight) + weight.trained)})
            _add(recomputed, {weight.kind: product * is_recomputed(checkpointing, weight.layer)})
    return forward, backward, recomputed


def _matmul(architecture: Architecture, weight: Weight) -> float:
    """One token's product with a weight; norms and scales have none."""
    if weight.expert:
        return 2 * weight.numel * architecture.experts_per_token / architecture.experts
    return 2.0 * weight.numel if len(weight.shape) == 2 else 0.0


def _input_needs_gradient(architecture: Architecture, weight: Weight) -> bool:
    """Where the embedding is frozen, nothing before the first layer's projections of queries, keys and values needs one."""
    first = weight.layer == 0 and re.search(r"\.[qkv]_proj\.", weight.name) is not None
    return architecture.full or not first or ".lora_B." in weight.name


def _scores(step: StepShape, rows: int, layer: LayerShape, window: int) -> float:
    """One example's scores and their product with the values: clean `rows` on each other, its canvas on its past and itself."""
    past, clean = step.past, float(rows**2)
    if layer.sliding:
        past = min(past, window - 1)
    if layer.sliding and rows > window:
        starts = range(0, rows, sliding_window_rows(window))
        stops = [min(start + sliding_window_rows(window), rows) for start in starts]
        clean = sum(float((stop - start) * (stop - max(0, start - window + 1))) for start, stop in zip(starts, stops, strict=True))
    return 4.0 * layer.query_width * (clean + step.canvas * (past + step.canvas))


def _add(into: Parts, parts: Parts, times: float = 1.0) -> None:
    for name, value in parts.items():
        into[name] = into.get(name, 0.0) + value * times


def _sum(first: Parts, second: Parts) -> Parts:
    total = dict(first)
    _add(total, second)
    return total

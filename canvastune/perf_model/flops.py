"""What one rank computes and sends in an optimizer step: FLOPs by part, bytes by collective.

A matmul of [m, k] and [k, n] is 2 * m * k * n FLOPs; attention is counted over the full rectangle
of queries and keys, as a masked kernel computes it. Elementwise work and the few bytes of counts,
losses and norms are left out.

Letters: T tokens, S clean and C canvas tokens of an example, H hidden size, V vocabulary, E
experts, K experts per token.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from canvastune.config.model_sizes import LayerShape
from canvastune.config.schema import Checkpointing, is_recomputed
from canvastune.model.attention_calls import canvas_calls, sliding_calls
from canvastune.perf_model.architecture import FLOAT, Architecture, Weight
from canvastune.perf_model.memory import StepShape, fsdp_units

if TYPE_CHECKING:  # it holds tensors, and a plan needs none
    from canvastune.data.packing import PackedBatch

Parts = dict[str, float]  # by part of the model

PASS_1, FORWARD, BACKWARD, RECOMPUTED, IDLE = (
    "pass 1 (self-conditioning)",
    "forward",
    "backward",
    "recomputed",
    "idle pass 1",
)
_PADDING_TOKENS = 2  # one clean and one canvas token
LAYERS_GATHER, ROOT_GATHER = "all-gather of layers", "all-gather of the embedding"
REDUCE, EXPERTS_GATHER = "reduce-scatter of gradients", "all-gather of experts"
EXPERTS_REDUCE, EXCHANGE = "reduce-scatter of experts' gradients", "all-to-all of expert rows"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one rank's optimizer step, by pass and by part of the model."""

    by_pass: dict[str, float]  # expected value over the self-conditioning draws
    by_part: dict[str, float]  # all passes
    model: float  # without recomputation and padding passes

    @property
    def total(self) -> float:
        return sum(self.by_pass.values())


@dataclass(frozen=True)
class _Canvas:
    """One canvas of an example."""

    past: int  # clean tokens before its block
    rows: int
    coin: float  # probability that it is denoised twice


def count_flops(architecture: Architecture, step: StepShape) -> Flops:
    """Count the FLOPs of one rank's step, with its share of the global batch."""
    whole = _count(architecture, replace(step, blocks_at_once=None), _canvases(step))
    if len(step.forwards) == 1:
        return whole
    parts = [_count(architecture, part, _canvases(part)) for part in step.forwards]
    by_part: Parts = {}
    for part in parts:
        _add(by_part, part.by_part)
    # What the forwards of an example compute more than one would.
    idle = sum(part.by_pass[IDLE] for part in parts)
    again = sum(part.total for part in parts) - idle - (whole.total - whole.by_pass[IDLE])
    by_pass = whole.by_pass | {RECOMPUTED: whole.by_pass[RECOMPUTED] + again, IDLE: idle}
    return Flops(by_pass, by_part, whole.model)


def _count(architecture: Architecture, step: StepShape, canvases: list[_Canvas]) -> Flops:
    """Count the FLOPs of a step whose examples have these canvases."""
    canvas_rows = sum(canvas.rows for canvas in canvases)
    tokens = step.clean + canvas_rows
    last, again_rows = _pass_1(canvases)
    products = _products(architecture, step.checkpointing)
    forward, backward, recomputed = (
        {kind: product * tokens for kind, product in parts.items()} for parts in products
    )
    scores = scores_again = 0.0
    twice = [canvas for canvas in canvases if canvas.coin]
    coin = sum(canvas.coin for canvas in twice) / max(1, len(twice))
    for index, layer in enumerate(architecture.layers):
        again_here = is_recomputed(step.checkpointing, index)
        own = _clean_scores(step.clean, layer, architecture.window)
        own += _canvas_scores(canvases, layer, architecture.window)
        scores += own
        # Fused kernels recompute the scores.
        _add(recomputed, {"attention": own * (again_here + 0.5)})
        scores_again += (
            sum(
                probability * _clean_scores(past, layer, architecture.window)
                for past, probability in last.items()
            )
            + _canvas_scores(twice, layer, architecture.window) * coin
        )
    tokens_again = again_rows + sum(past * probability for past, probability in last.items())
    again = {kind: product * tokens_again for kind, product in products[0].items()}
    _add(forward, {"attention": scores})
    _add(backward, {"attention": 2 * scores})

    block_row = 6 * architecture.hidden * architecture.intermediate
    block = block_row * canvas_rows
    row = 2 * architecture.hidden * architecture.vocabulary
    soft = row * again_rows  # canvas logits to the embedding, or their gradient
    idle = _sum(forward, {"self-conditioning": block})
    conditioning = block_row * again_rows + soft
    pass_1 = {"attention": scores_again, "head": soft, "self-conditioning": conditioning}
    pass_1 = _sum(again, pass_1)
    scored = row * (step.scored_clean + canvas_rows)
    _add(forward, {"self-conditioning": block, "head": scored})
    _add(backward, {"head": scored})
    if architecture.full:
        _add(backward, {"head": scored, "self-conditioning": 2 * block + soft})
        _add(recomputed, {"head": soft})

    examples = step.micro_batch * step.micro_steps
    padding = padding_pass_share(step) * step.micro_steps * _PADDING_TOKENS / tokens
    passes = {
        PASS_1: (pass_1, examples),
        FORWARD: (forward, examples),
        BACKWARD: (backward, examples),
        RECOMPUTED: (recomputed, examples),
        IDLE: (idle, padding),
    }
    by_part: Parts = {}
    for parts, times in passes.values():
        _add(by_part, parts, times)
    by_pass = {name: sum(parts.values()) * times for name, (parts, times) in passes.items()}
    return Flops(by_pass, by_part, sum(by_pass[name] for name in (PASS_1, FORWARD, BACKWARD)))


def count_forward_flops(architecture: Architecture, step: StepShape) -> float:
    """Count the FLOPs of a rank's forward pass, without gradients and self-conditioning, over
    `step.blocks` canvases of each example that all see its clean tokens before the last block.
    """
    past = max(0, step.clean - step.canvas)
    canvases = [_Canvas(past, step.canvas, 0.0)] * step.blocks
    return _count(architecture, replace(step, self_conditioning=0.0), canvases).by_pass[FORWARD]


def count_forward_bytes(architecture: Architecture, step: StepShape) -> tuple[float, float]:
    """Count the bytes that a rank receives in such a pass: of weights, and of expert rows."""
    groups = fsdp_units(architecture, step)
    units = (groups.root, *groups.layers, *groups.experts)
    return float(sum(unit.received for unit in units)), _exchanged(architecture, step)


def needed_flops(architecture: Architecture, batch: PackedBatch) -> float:
    """Count the FLOPs that a batch's loss and gradients need, without recomputation and padding
    passes.
    """
    canvases: list[list[_Canvas]] = [[] for _ in batch.clean_lengths]
    for example, start, rows, coin in zip(
        batch.canvas_examples,
        batch.block_starts,
        batch.canvas_lengths,
        batch.self_conditioned,
        strict=True,
    ):
        canvases[example].append(_Canvas(start, rows, float(coin)))
    total = 0.0
    for clean, own in zip(batch.clean_lengths, canvases, strict=True):
        step = StepShape(1, 1, 1, 1, clean, own[0].rows, checkpointing=False, self_conditioning=0)
        total += _count(architecture, step, own).model
    return total


def count_bytes(architecture: Architecture, step: StepShape) -> dict[str, float]:
    """Count the bytes that one rank receives from others in an optimizer step, by collective; it
    sends as many.
    """
    if len(step.forwards) > 1:
        total: dict[str, float] = {}
        for part in step.forwards:
            _add(total, count_bytes(architecture, part))
        return total
    groups = fsdp_units(architecture, step)
    anyone = any_self_conditioning_share(step)
    # Self-conditioning, forward and backward pass; the last layer stays gathered between the latter
    # two.
    passes = 2 + anyone
    exchanged = _exchanged(architecture, step)
    idle = padding_pass_share(step) * _PADDING_TOKENS / step.tokens

    def gathered(received: list[int]) -> float:
        return float(step.micro_steps * (passes * sum(received[:-1]) + received[-1]))

    return {
        LAYERS_GATHER: gathered([group.received for group in groups.layers]),
        EXPERTS_GATHER: gathered([group.received for group in groups.experts]),
        ROOT_GATHER: float(step.micro_steps * groups.root.received),
        REDUCE: float(
            step.micro_steps * sum(group.reduced for group in (groups.root, *groups.layers))
        ),
        EXPERTS_REDUCE: float(step.micro_steps * sum(group.reduced for group in groups.experts)),
        EXCHANGE: (
            exchanged
            * (2 + recomputed_share(architecture, step) + self_conditioning_share(step) + idle)
        ),
    }


def recomputed_share(architecture: Architecture, step: StepShape) -> float:
    """Return the share of layers that the backward pass recomputes."""
    layers = len(architecture.layers)
    return sum(is_recomputed(step.checkpointing, index) for index in range(layers)) / layers


def any_self_conditioning_share(step: StepShape) -> float:
    """Return the probability that any rank self-conditions a canvas of a micro-batch.

    All ranks then gather the layers for it.
    """
    canvases = step.micro_batch * step.blocks
    return 1 - (1 - step.self_conditioning) ** (canvases * step.world_size)


def padding_pass_share(step: StepShape) -> float:
    """Return the probability that a rank has no self-conditioned canvas in a micro-batch while
    another has one.

    It then runs the self-conditioning pass on two padding tokens.
    """
    none = (1 - step.self_conditioning) ** (step.micro_batch * step.blocks)
    return none * (1 - none ** (step.world_size - 1))


def self_conditioning_share(step: StepShape) -> float:
    """Return the expected share of an example's tokens that the self-conditioning pass computes:
    its self-conditioned canvases, and the clean tokens before the last of them.
    """
    last, rows = _pass_1(_canvases(step))
    clean = sum(past * probability for past, probability in last.items())
    return (clean + rows) / (step.clean + step.canvas_rows)


def slowest_self_conditioning(step: StepShape) -> float:
    """Return the expected self-conditioned share of a micro-batch on the rank with the most; the
    others wait for it.
    """
    probability, batch = step.self_conditioning, step.micro_batch * step.blocks
    cumulative, expected, term = 0.0, 0.0, (1 - probability) ** batch
    for coins in range(batch):  # E[max] = sum over k of P(max > k)
        cumulative += term
        expected += 1 - min(1.0, cumulative) ** step.world_size
        if probability < 1:
            term *= (batch - coins) / (coins + 1) * probability / (1 - probability)
    return expected / batch


def _exchanged(architecture: Architecture, step: StepShape) -> float:
    """Count the bytes of one dispatch and one combine, over all layers and examples of the step."""
    rows = step.tokens * step.micro_steps * architecture.experts_per_token
    away = (step.ep - 1) / step.ep  # with balanced experts
    # Both ways, and its weight one way.
    row = 2 * architecture.hidden * architecture.compute_bytes + FLOAT
    return len(architecture.layers) * rows * row * away


@functools.lru_cache(maxsize=8)  # of a thousand weights; the trainer asks for each example
def _products(
    architecture: Architecture, checkpointing: Checkpointing
) -> tuple[Parts, Parts, Parts]:
    """Count one token's products with the layers' weights, by kind: forward, backward and
    recomputed.
    """
    forward: Parts = {}
    backward: Parts = {}
    recomputed: Parts = {}
    for weight in architecture.weights:
        if weight.layer is not None:
            product = _matmul(architecture, weight)
            _add(forward, {weight.kind: product})
            gradients = _input_needs_gradient(architecture, weight) + weight.trained
            _add(backward, {weight.kind: product * gradients})
            _add(recomputed, {weight.kind: product * is_recomputed(checkpointing, weight.layer)})
    return forward, backward, recomputed


def _matmul(architecture: Architecture, weight: Weight) -> float:
    """Count one token's product with a weight; norms and scales have none."""
    if weight.expert:
        return 2 * weight.numel * architecture.experts_per_token / architecture.experts
    return 2.0 * weight.numel if len(weight.shape) == 2 else 0.0


def _input_needs_gradient(architecture: Architecture, weight: Weight) -> bool:
    """Return whether a product's input needs a gradient.

    With a frozen embedding, the inputs of the first layer's query, key and value projections do
    not.
    """
    first = weight.layer == 0 and re.search(r"\.[qkv]_proj\.", weight.name) is not None
    return architecture.full or not first or ".lora_B." in weight.name


def _canvases(step: StepShape) -> list[_Canvas]:
    return [_Canvas(past, step.canvas, step.self_conditioning) for past in step.pasts]


def _pass_1(canvases: list[_Canvas]) -> tuple[dict[int, float], float]:
    """Return what the self-conditioning pass of an example is expected to compute.

    Returns:
        the clean tokens before its last self-conditioned canvas, each possible number with its
        probability, and the expected number of canvas rows.
    """
    last: dict[int, float] = {}
    none_later = 1.0
    for canvas in sorted(canvases, key=lambda canvas: -canvas.past):
        last[canvas.past] = last.get(canvas.past, 0.0) + none_later * canvas.coin
        none_later *= 1 - canvas.coin
    return last, sum(canvas.coin * canvas.rows for canvas in canvases)


def _canvas_scores(canvases: list[_Canvas], layer: LayerShape, window: int) -> float:
    """Count the attention of one example's canvases over the clean tokens that they see and
    themselves, in the engine's calls.
    """
    calls = canvas_calls(
        tuple((0, canvas.past, canvas.rows) for canvas in canvases),
        window if layer.sliding else None,
    )
    return 4.0 * layer.query_width * sum(call.scores for call in calls)


def _clean_scores(rows: int, layer: LayerShape, window: int) -> float:
    """Count the attention of one example's clean `rows` over each other."""
    clean = float(rows**2)
    if layer.sliding and rows > window:
        clean = sum(
            float((own.stop - own.start) * (seen.stop - seen.start))
            for own, seen in sliding_calls(rows, window)
        )
    return 4.0 * layer.query_width * clean


def _add(into: Parts, parts: Parts, times: float = 1.0) -> None:
    for name, value in parts.items():
        into[name] = into.get(name, 0.0) + value * times


def _sum(first: Parts, second: Parts) -> Parts:
    total = dict(first)
    _add(total, second)
    return total

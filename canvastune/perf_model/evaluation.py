"""Memory and time of answering held-out questions: what `evaluation.sampler` holds and computes.

Letters: n questions answered at once on a GPU, C canvas, V vocabulary, H hidden size, E experts, K
experts per token; c bytes of a stored weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from canvastune.logit_chunks import (
    CHOOSING_TOKENS,
    SAMPLER_TOKENS,
    encoded_tokens,
    sampler_columns,
)
from canvastune.perf_model.architecture import FLOAT, Architecture, Weight
from canvastune.perf_model.hardware import (
    BANDWIDTH_SHARE,
    MATMUL_SHARE,
    Accelerator,
    peak_rate,
)
from canvastune.perf_model.launches import FULL

_DOUBLE = 8
# Kernels of a tile of logits.
_TILE_LAUNCHES = 30


@dataclass(frozen=True)
class AnswerShape:
    """What one GPU answers at once."""

    rows: int  # n
    ep: int  # GPUs that share the experts
    prompt: int  # tokens of the longest prompt
    answer: int  # tokens of the longest answer, in whole canvases
    device: str = "cuda"

    @property
    def context(self) -> int:
        """Tokens that the last block of the longest answer sees."""
        return self.prompt + self.answer


def answer_memory(architecture: Architecture, shape: AnswerShape) -> dict[str, int]:
    """Return the peak bytes by part, on one GPU, with every answer at its longest.

    Weights are as stored, which is assumed to be the compute dtype. Without expert parallelism the
    stock model has its vision tower.
    """
    c, hidden = architecture.compute_bytes, architecture.hidden
    vision = 0 if shape.ep > 1 else architecture.vision
    weights = vision + sum(
        weight.numel // (shape.ep if weight.expert else 1) for weight in stored(architecture)
    )
    seen = [
        min(shape.context, architecture.window - 1) if layer.sliding else shape.context
        for layer in architecture.layers
    ]
    # Of a layer that grows, both sizes are there.
    kept = [
        2 * layer.key_width * (tokens + architecture.canvas)
        for layer, tokens in zip(architecture.layers, seen, strict=True)
    ]
    canvases = shape.rows * architecture.canvas
    # Prompts are encoded in the pass that denoises the canvases.
    tokens = canvases + min(shape.rows * shape.prompt, encoded_tokens(canvases))
    routed = architecture.experts_per_token * (2 * hidden + 4 * architecture.expert_size)
    heads = max(2 * layer.query_width + 4 * layer.key_width for layer in architecture.layers)
    a_token = 8 * hidden + heads + max(3 * architecture.intermediate, routed)
    width = min(architecture.vocabulary, sampler_columns(canvases, shape.device))
    tile = min(canvases, SAMPLER_TOKENS) * width
    # Logits, a copy of those that count, and their exponentials; in a smaller dtype the rounded logits
    # of the soft embedding, and their exponentials in float32 and rounded.
    logits = 3 * FLOAT + (FLOAT + 2 * c if c < FLOAT else 0)
    choosing = min(canvases, CHOOSING_TOKENS) * width * (2 * FLOAT + _DOUBLE)
    return {
        "weights": weights * c,
        "keys and values": c * shape.rows * (sum(kept) + max(kept)),
        "activations": c * tokens * a_token,
        "logits": tile * logits + choosing + canvases * hidden * (2 * FLOAT + 2 * c),
    }


def denoising_seconds(
    architecture: Architecture, shape: AnswerShape, accelerator: Accelerator
) -> float:
    """Return the time of one denoising step of all rows at once, with the longest context."""
    tokens = shape.rows * architecture.canvas
    table = architecture.vocabulary * architecture.hidden
    parts = -(-tokens // SAMPLER_TOKENS)
    # Head and soft embedding.
    head = _seconds(
        architecture,
        accelerator,
        flops=4.0 * tokens * table,
        read=2 * parts * table * architecture.compute_bytes,
    )
    width = sampler_columns(tokens, shape.device)
    tiles = parts * -(-architecture.vocabulary // width)
    launches = len(architecture.layers) * FULL.forward
    launches += tiles * _TILE_LAUNCHES
    return max(
        trunk_seconds(architecture, shape, accelerator) + head, launches * accelerator.launch
    )


def trunk_seconds(
    architecture: Architecture, shape: AnswerShape, accelerator: Accelerator
) -> float:
    """Return the time of the layers in a denoising step of all rows, with the longest context."""
    tokens, share = shape.rows * architecture.canvas, architecture.experts_per_token
    layers = [weight for weight in stored(architecture) if weight.kind != "embedding"]
    routed = share / architecture.experts
    flops = 2.0 * tokens * sum(w.numel * (routed if w.expert else 1) for w in layers)
    read = sum(w.numel // (shape.ep if w.expert else 1) for w in layers)
    for layer in architecture.layers:
        seen = min(shape.context, architecture.window - 1) if layer.sliding else shape.context
        keys = seen + architecture.canvas
        flops += 4.0 * tokens * layer.query_width * keys
        read += shape.rows * 2 * layer.key_width * keys
    return _seconds(architecture, accelerator, flops, read * architecture.compute_bytes)


def _seconds(
    architecture: Architecture, accelerator: Accelerator, flops: float, read: float
) -> float:
    """Return the longer of computing and of reading so many bytes."""
    return max(
        flops / (peak_rate(architecture, accelerator) * MATMUL_SHARE),
        read / (accelerator.bandwidth * 1e9 * BANDWIDTH_SHARE),
    )


def stored(architecture: Architecture) -> list[Weight]:
    """Return the weights of a merged model: those without adapters."""
    return [weight for weight in architecture.weights if "adapters" not in weight.kind]

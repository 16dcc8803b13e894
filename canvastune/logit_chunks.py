"""How many logits are alive at once: the chunks in which losses and answers are computed."""

from __future__ import annotations

# Float32 logits that are alive at once: a chunk of rows. Each chunk reads the whole table and
# updates its gradient, which is cheap next to the matmuls only if a chunk has hundreds of rows. A
# CPU processes a chunk in tiles that fit its caches.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, TILE_ELEMENTS = 2**25, 2**27, 2**18
_MAX_CHUNK_ROWS = 256  # on a CPU: larger chunks are not faster


def sampler_columns(tokens: int, device: str) -> int:
    """Return the columns of a tile of the sampler of answers, which has so many tokens at most.

    On a CPU a tile stays in its caches, but is never so narrow that the calls are what costs.
    """
    return max(2**10, 2**17 // tokens) if device == "cpu" else 2**15


def encoded_tokens(canvases: int) -> int:
    """Return how many tokens of prompts and blocks the sampler of answers encodes in one pass.

    Args:
        canvases: tokens that a pass denoises.
    """
    return max(2**7, canvases // 2)


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many rows have their logits alive at once."""
    rows = (
        min(_MAX_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
        if device == "cpu"
        else GPU_CHUNK_ELEMENTS // vocabulary
    )
    return max(1, rows)


def tile_columns(rows: int, vocabulary: int, device: str) -> int:
    """Return the number of columns of a tile with this many rows."""
    return min(vocabulary, max(1, TILE_ELEMENTS // rows)) if device == "cpu" else vocabulary


# Of the sampler of answers, whose tiles have all of these.
SAMPLER_TOKENS = 2048  # whose logits exist at once
CHOOSING_TOKENS = 256  # of them, those whose cumulative probabilities exist at once, in float64

"""What a CPU computes in chunks of rows equals the whole."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import GELUTanh

from canvastune.model.memory_efficient import recomputed
from canvastune.model.moe import experts_forward

TOKENS, CHOSEN, EXPERTS, HIDDEN, WIDTH = 4100, 4, 8, 544, 16  # 36 MB of results


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def test_what_is_recomputed_in_chunks_equals_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 9001, 48), (1, 9001, 48), (1, 9001, 1))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)

    def weighted(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gated(gate, up) * weight

    ours, plain = recomputed(weighted, *inputs), weighted(*inputs)
    assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-6)
    found = (torch.autograd.grad(out, inputs, upstream) for out in (ours, plain))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("emptied", [0, EXPERTS - 1, None])
def test_experts_in_chunks_equal_experts_one_by_one(emptied: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    leaves = [
        (0.1 * torch.randn(shape, generator=generator)).requires_grad_()
        for shape in ((TOKENS, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    ]
    hidden, gate_up, down = leaves
    # One expert has half of the rows, more than a chunk, another one none.
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[: TOKENS // 2, 3] += 1
    if emptied is not None:
        scores[:, emptied] = -1
    weights, index = scores.topk(CHOSEN, dim=-1)
    weights = weights.detach().requires_grad_()
    module = types.SimpleNamespace(
        num_experts=EXPERTS, gate_up_proj=gate_up, down_proj=down, act_fn=GELUTanh()
    )
    expected = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        token, place = (index == expert).nonzero(as_tuple=True)
        active = gated(*(hidden[token] @ gate_up[expert].T).chunk(2, dim=-1))
        out = (active * weights[token, place, None]) @ down[expert].T
        expected = expected.index_add(0, token, out)
    ours = experts_forward(module, hidden, index, weights)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(expected.shape, generator=generator)
    needed = [*leaves, weights]
    found = (torch.autograd.grad(out, needed, upstream) for out in (ours, expected))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) < 1e-6 * float(other.norm())

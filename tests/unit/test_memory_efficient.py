"""Lean operations give what the stock modules give, forward and backward, and keep less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaRMSNorm

from canvastune.model.memory_efficient import MemoryEfficientNorm, recomputed

ROWS, WIDTH = 7, 48


def norms(with_scale: bool) -> tuple[DiffusionGemmaRMSNorm, MemoryEfficientNorm]:
    stock, lean = (
        kind(WIDTH, with_scale=with_scale) for kind in (DiffusionGemmaRMSNorm, MemoryEfficientNorm)
    )
    if with_scale:
        torch.manual_seed(1)
        with torch.no_grad():
            lean.weight.copy_(stock.weight.uniform_(0.5, 2))
    return stock, lean


def values_and_gradients(
    norm: Callable[[torch.Tensor], torch.Tensor], module: DiffusionGemmaRMSNorm
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, ROWS, WIDTH, generator=generator)).requires_grad_()
    out = norm(x)
    trained = [x, *module.parameters()]
    return [
        out.detach(),
        *torch.autograd.grad(out, trained, torch.randn(out.shape, generator=generator)),
    ]


@pytest.mark.parametrize("with_scale", [True, False])
def test_lean_and_fused_norm_equal_the_stock_one_in_value_and_every_gradient(
    with_scale: bool,
) -> None:
    stock, lean = norms(with_scale)
    expected = values_and_gradients(stock, stock)
    for form in (lean, lean.fused):
        for ours, plain in zip(values_and_gradients(form, lean), expected, strict=True):
            assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6), (
                "the norm is not transformers' norm"
            )


def test_a_lean_norm_rounds_bfloat16_as_the_stock_one_does() -> None:
    stock, lean = norms(with_scale=True)
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(lean(x), stock(x))


def kept_bytes(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(x)  # alive, so that no address is used twice
    assert out.shape == x.shape
    return sum(kept.values())


def test_a_lean_norm_keeps_its_input_and_a_number_for_each_row() -> None:
    stock, lean = norms(with_scale=True)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = lean.weight.nbytes
    assert kept_bytes(lean, x) == x.nbytes + 4 * ROWS + weight
    assert kept_bytes(stock, x) > 2 * x.nbytes


def test_what_is_recomputed_keeps_its_inputs_alone_and_has_the_same_gradients() -> None:
    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.tanh(gate) * gate.square() * up

    gate, up = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
    upstream = torch.randn(ROWS, WIDTH)
    plain = torch.autograd.grad(gated(gate, up), [gate, up], upstream)
    ours = torch.autograd.grad(recomputed(gated, gate, up), [gate, up], upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert kept_bytes(lambda x: recomputed(gated, x, up), gate) == 2 * gate.nbytes


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)
    recomputed(lambda a, b: a * b, x, weight).sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, weight)  # type: ignore[arg-type]

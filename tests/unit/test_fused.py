"""A GPU's forms of a layer's parts against the plain ones, on a CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from canvastune.distributed.parallelize import clip_gradients
from canvastune.model import fused
from canvastune.model.lora import lora_factors
from tests.support.small import (
    examples_and_draws,
    loss_and_gradients,
    run_config,
    shared_model,
    worst_difference,
)


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("full", {}),
        ("lora", {}),
        ("lora", {"experts": True, "rslora": True, "alpha": 8.0}),
        ("lora", {"dropout": 0.3}),
    ],
)
def test_loss_and_every_gradient_equal_those_of_the_plain_forms(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    lora: dict[str, object],
) -> None:
    model = shared_model(checkpoint, run_config(method, lora=lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, b in lora_factors(model):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.03)
    plain = loss_and_gradients(model, [examples_and_draws()], checkpointing=True)
    monkeypatch.setattr(fused, "few_launches", lambda x: True)
    ours = loss_and_gradients(model, [examples_and_draws()], checkpointing=True)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours[1].keys() == plain[1].keys()
    worst, name = worst_difference(ours[1], plain[1])
    assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e}"


def test_the_norm_of_all_gradients_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator) for size in (3, 500, 7)]

    def clipped() -> tuple[torch.Tensor, list[torch.Tensor]]:
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in made]
        for parameter, gradient in zip(parameters, made, strict=True):
            parameter.grad = gradient.clone()
        norm = clip_gradients(parameters, 1.0)
        return norm, [parameter.grad for parameter in parameters if parameter.grad is not None]

    plain, expected = clipped()
    monkeypatch.setattr(fused, "few_launches", lambda x: True)
    norm, found = clipped()
    torch.testing.assert_close(norm, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

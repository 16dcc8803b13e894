"""The Triton kernels against the plain operators, in float32, run in Python by Triton's interpreter;
and compiled for an H100 without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from canvastune.data.packing import Example
from canvastune.model import fused, kernels, moe
from canvastune.model.lora import lora_factors
from tests.support.small import (
    CANVAS,
    VOCABULARY,
    loss_and_gradients,
    noise,
    run_config,
    shared_model,
    worst_difference,
    write_checkpoint,
)

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-layers")
    write_checkpoint(folder, sliding=1)
    return folder


@pytest.mark.parametrize(("method", "experts"), [("full", False), ("lora", True)])
def test_loss_and_every_gradient_equal_those_of_the_plain_forms(
    two_layers: Path, monkeypatch: pytest.MonkeyPatch, method: str, experts: bool
) -> None:
    model = shared_model(two_layers, run_config(method, lora={"experts": experts}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, b in lora_factors(model):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.03)
    tokens = torch.randint(1, VOCABULARY, (5,), generator=generator)
    example = Example(tokens, 3, CANVAS, "0")
    one = [([example], [noise(0, example.blocks)])]
    plain = loss_and_gradients(model, one, checkpointing=True)
    launched: list[str] = []
    stock = kernels.launch

    def launch(name: str, *arguments: object, **constants: object) -> None:
        launched.append(name)
        stock(name, *arguments, **constants)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(fused, "few_launches", lambda x: True)
    monkeypatch.setattr(kernels, "available", lambda x: True)
    ours = loss_and_gradients(model, one, checkpointing=True)
    assert {"before_experts", "after_experts_backward", "turn_heads_backward"} <= set(launched)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours[1].keys() == plain[1].keys()
    worst, name = worst_difference(ours[1], plain[1])
    assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e}"


def test_rows_are_sorted_by_expert_as_a_stable_sort_does() -> None:
    index = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)).topk(3).indices
    order, inverse, counts = kernels.sort_rows(index, 12)
    assert torch.equal(order, moe.sorted_order(index.flatten(), 12, as_bytes=False))
    assert torch.equal(inverse, moe._inverse(order).view_as(index))
    assert torch.equal(counts, index.flatten().bincount(minlength=12))


def test_received_rows_are_sorted_by_expert_and_permuted_with_their_weights() -> None:
    ranks, experts = 3, 4
    sizes = torch.tensor([2, 0, 5, 1, 0, 0, 3, 130, 1, 1, 0, 2])
    expert = torch.arange(experts).repeat(ranks).repeat_interleave(sizes)
    by_expert, by_sender, ends = kernels.sort_segments(sizes, ranks, len(expert))
    assert torch.equal(by_expert, expert.argsort(stable=True))
    assert torch.equal(by_sender, moe._inverse(by_expert))
    assert ends.tolist() == expert.bincount().cumsum(0).tolist()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(expert), 5, generator=generator, requires_grad=True)
    weights = torch.randn(len(expert), 1, generator=generator, requires_grad=True)
    found = kernels.dispatch(rows, weights, by_expert, by_sender[:, None])
    plain = rows[by_expert], weights[by_expert]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    upstream = [torch.randn(part.shape, generator=generator) for part in plain]
    gradients = torch.autograd.grad(found, (rows, weights), upstream)
    expected = torch.autograd.grad(plain, (rows, weights), upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_experts_are_chosen_as_by_the_router_and_of_equal_scores_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 11, generator=generator, requires_grad=True)
    scales = torch.rand(11, generator=generator)
    weights, index = kernels.choose(scores, 3, scales)
    top, expected = F.softmax(scores, dim=-1).topk(3)
    plain = top / top.sum(-1, keepdim=True) * scales[expected]
    assert torch.equal(index, expected)
    torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(weights.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(weights, scores, upstream),
        torch.autograd.grad(plain, scores, upstream),
        rtol=1e-5,
        atol=1e-6,
    )
    assert kernels.choose(torch.zeros(1, 5), 2, torch.ones(5))[1].tolist() == [[0, 1]]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_without_finite_scores_still_have_experts_so_that_the_step_can_be_skipped() -> None:
    weights, index = kernels.choose(torch.full((2, 5), torch.nan), 2, torch.ones(5))
    assert weights.isnan().all()
    assert index.min() >= 0
    assert index.max() < 5
    order, inverse, counts = kernels.sort_rows(index, 5)
    assert torch.equal(order[inverse.flatten()], torch.arange(4))
    assert counts.sum() == 4


@pytest.mark.parametrize("whole", [False, True])
def test_a_gate_equals_the_plain_one(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    both = (2 * torch.randn(5, 14, generator=generator)).requires_grad_()
    weights = torch.rand(5, 1, generator=generator, requires_grad=True) if whole else None
    gates, ups = both.chunk(2, dim=-1)
    plain = F.gelu(gates, approximate="tanh") * ups * (1 if weights is None else weights)
    found = kernels.gate(both, None, weights) if whole else kernels.gate(gates, ups)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    trained = [both] if weights is None else [both, weights]
    upstream = torch.randn(plain.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(found, trained, upstream),
        torch.autograd.grad(plain, trained, upstream),
        rtol=1e-5,
        atol=1e-6,
    )


def test_no_kernel_is_launched_where_triton_cannot_build_its_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def can_compile() -> bool:
        kernels._can_compile.cache_clear()
        return kernels._can_compile()

    assert not kernels.available(torch.empty(1))
    monkeypatch.delenv("CC", raising=False)
    include = tmp_path / "include"
    include.mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(include)})
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_compile(), "Python's headers are missing"
    (include / "Python.h").touch()
    assert can_compile() == (importlib.util.find_spec("triton") is not None)
    monkeypatch.setenv("CC", "missing")
    assert not can_compile(), "Triton takes only CC, where it is set"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not can_compile()
    kernels._can_compile.cache_clear()

"""objective.md section 9: several blocks of an example in one step, next to one clean pass (float32).

`test_noise` has their draws, `tests/distributed/test_parallel.py` several ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torch_flex
from torch.profiler import ProfilerActivity, profile

from canvastune.data.packing import Example, PackedBatch, pack
from canvastune.model import attention, attention_calls
from canvastune.model.attention import Packing
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.noise import NoiseSample
from canvastune.objective import losses
from tests.distributed.test_precision import adapters_that_act
from tests.support.oracle import plain_loss
from tests.support.small import (
    CANVAS,
    WINDOW,
    counts,
    examples_and_blocks,
    run_config,
    shared_model,
    stock_model,
    worst_difference,
)

ALL = 99
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "lora with experts and dropout": ("lora", {"experts": True, "dropout": 0.25}),
}
Blocks = list[tuple[NoiseSample, ...]]
Found = tuple[float, float, float, dict[str, torch.Tensor]]


def built(checkpoint: Path, method: str, **train: Any) -> WeightTiedDiffusionGemma:
    kind, lora = METHODS[method]
    model = shared_model(checkpoint, run_config(kind, lora=lora, **train))
    adapters_that_act(model)
    return model


def summed(
    model: WeightTiedDiffusionGemma,
    batches: list[tuple[PackedBatch, tuple[float, float]]],
    checkpointing: bool = False,
    any_coin: bool = False,
) -> Found:
    """The losses and gradients of batches with these weights, added up.

    `any_coin`: whether another rank has a self-conditioned canvas in each of them.
    """
    model.zero_grad(set_to_none=True)
    totals = torch.zeros(3)
    for batch, weights in batches:
        found = model.run_under_fsdp(
            losses,
            batch,
            weights,
            any_self_conditioned=any_coin or any(batch.self_conditioned),
            checkpointing=checkpointing,
        )
        found[0].backward()
        totals += torch.stack(found).detach()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return *totals.tolist(), gradients


def one_by_one(examples: list[Example], draws: Blocks) -> list[Any]:
    """A batch for each block only; the autoregressive loss counts with an example's first."""
    canvas_rows, pairs = counts(examples, draws)
    batches = []
    for example, own in zip(examples, draws, strict=True):
        for index, draw in enumerate(own):
            batch = pack([example], [draw])
            if index:
                batch = dataclasses.replace(
                    batch, next_rows=batch.next_rows[:0], next_targets=batch.next_targets[:0]
                )
            batches.append((batch, (1 / canvas_rows, 1 / pairs)))
    return batches


def together(examples: list[Example], draws: Blocks, sizes: tuple[int, ...]) -> list[Any]:
    """Batches of this many examples, each with all its drawn blocks."""
    canvas_rows, pairs = counts(examples, draws)
    ends = itertools.accumulate(sizes)
    return [
        (pack(examples[end - n : end], draws[end - n : end]), (1 / canvas_rows, 1 / pairs))
        for n, end in zip(sizes, ends, strict=True)
    ]


def assert_equal(found: Found, expected: Found, what: str) -> None:
    assert found[:3] == pytest.approx(expected[:3], rel=1e-6), f"{what}: another loss"
    worst, name = worst_difference(found[3], expected[3])
    assert worst < 1e-5, f"{what}: the gradient of {name} is off by {worst:.1e}"


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_every_gradient_are_the_sum_of_single_block_passes(
    checkpoint: Path, method: str
) -> None:
    model = built(checkpoint, method)
    for count in (2, ALL):
        examples, draws = examples_and_blocks(count)
        assert [len(own) for own in draws] == [min(count, e.blocks) for e in examples]
        expected = summed(model, one_by_one(examples, draws))
        for sizes in ((8,), (3, 5), (1,) * 8):
            for checkpointing in (False, True) if sizes == (8,) else (False,):
                found = summed(model, together(examples, draws, sizes), checkpointing)
                assert_equal(found, expected, f"{count} blocks, {sizes} examples a forward")


def in_parts(examples: list[Example], draws: Blocks, most: int) -> list[Any]:
    """The blocks of each example in forwards of at most this many."""
    canvas_rows, pairs = counts(examples, draws)
    batches = []
    for example, own in zip(examples, draws, strict=True):
        for first in range(0, len(own), most):
            batch = pack([example], [own[first : first + most]], scored=[first + most >= len(own)])
            batches.append((batch, (1 / canvas_rows, 1 / pairs)))
    return batches


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_an_example_in_several_forwards_give_what_one_forward_gives(
    checkpoint: Path, method: str
) -> None:
    model = built(checkpoint, method)
    examples, draws = examples_and_blocks(ALL)
    expected = summed(model, together(examples, draws, (8,)))
    for most in (1, 2, 3):
        batches = in_parts(examples, draws, most)
        assert max(len(batch.canvas_lengths) for batch, _ in batches) == most
        found = summed(model, batches, checkpointing=True)
        assert_equal(found, expected, f"{most} blocks a forward")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_flex_gives_the_sum_of_single_block_passes_too(
    checkpoint: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    # PyTorch refuses gradients on a CPU; its dense definition of the operator has them.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    examples, draws = examples_and_blocks(ALL)
    expected = summed(built(checkpoint, method), one_by_one(examples, draws))
    flex = built(checkpoint, method, attention="flex")
    for sizes in ((8,), (3, 5)):
        found = summed(flex, together(examples, draws, sizes), checkpointing=True)
        assert_equal(found, expected, f"{sizes} examples a forward")


def test_loss_and_every_gradient_are_those_of_stock_modules(checkpoint: Path) -> None:
    """Each block by the plain step, divided by the same counts; the encoder's loss once."""
    examples, draws = examples_and_blocks(ALL)
    canvas_rows, pairs = counts(examples, draws)
    stock = stock_model(checkpoint)
    loss, diffusion, autoregressive = plain_loss(stock, examples, draws)
    loss.backward()
    model = built(checkpoint, "full")
    found = summed(model, together(examples, draws, (8,)))
    gradients = {
        name.replace("model.encoder.language_model.", "model.decoder."): p.grad
        for name, p in stock.named_parameters()
        if p.grad is not None
    }
    assert found[1] / canvas_rows == pytest.approx(diffusion, rel=1e-6)
    assert found[2] / pairs == pytest.approx(autoregressive, rel=1e-6)
    assert found[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    worst, name = worst_difference(found[3], {n: gradients[n] for n in found[3]})
    assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e} relative to the plain step"
    assert found[3].keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_pass_one_runs_once_over_the_blocks_with_a_coin_and_what_they_see(
    checkpoint: Path,
) -> None:
    model = built(checkpoint, "full")
    examples, draws = examples_and_blocks(ALL)
    batch = pack(examples, draws)
    seen: list[PackedBatch] = []
    run = model.hidden_states

    def watched(batch: PackedBatch, *args: Any, **options: Any) -> Any:
        seen.append(batch)
        return run(batch, *args, **options)

    with mock.patch.object(model, "hidden_states", watched):
        model.run_under_fsdp(
            losses, batch, (1.0, 1.0), any_self_conditioned=True, checkpointing=False
        )
    first, second = seen
    assert second is batch
    coins = [[d for d in own if d.self_condition] for own in draws]
    assert sum(len(own) > 1 for own in coins) > 1, "no example has several coins"
    assert any(not own for own in coins), "every example has a coin"
    last_starts = [
        e.prefix_length + max(d.block for d in own) * CANVAS
        for e, own in zip(examples, coins, strict=True)
        if own
    ]
    assert first.clean_lengths == tuple(last_starts)
    twice = list(zip(batch.self_conditioned, batch.block_starts, batch.canvas_lengths, strict=True))
    assert first.block_starts == tuple(start for coin, start, _ in twice if coin)
    assert first.canvas_lengths == tuple(length for coin, _, length in twice if coin)
    assert [first.canvas_examples.count(at) for at in range(len(last_starts))] == [
        len(own) for own in coins if own
    ]


def test_a_canvas_sees_itself_and_the_clean_tokens_before_its_block_alone(
    checkpoint: Path,
) -> None:
    """Read from the engine's attention: with equal keys a row's weights are uniform over what it
    sees, and one-hot values return them.
    """
    examples, draws = examples_and_blocks(ALL)
    batch = pack(examples, draws)
    rows = len(batch.clean) + len(batch.canvas)
    equal, one_hot = torch.zeros(1, 1, rows, rows), torch.eye(rows)[None, None]
    packing = Packing.of(batch, WINDOW)
    places = {
        (at, place): row
        for row, (at, place) in enumerate(
            (at, place) for at, e in enumerate(examples) for place in range(len(e.tokens))
        )
    }
    for kind, near in (("full_attention", 10**6), ("sliding_attention", WINDOW)):
        sight = packing.attend(kind, equal, equal, one_hot, 1.0)[0, 0] > 0
        row = len(batch.clean)
        for at, (example, own) in enumerate(zip(examples, draws, strict=True)):
            for draw in own:
                start = example.prefix_length + draw.block * CANVAS
                length = min(CANVAS, len(example.tokens) - start)
                past = [places[at, p] for p in range(max(0, start - (near - 1)), start)]
                expected = [*past, *range(row, row + length)]
                for canvas_row in range(row, row + length):
                    assert sight[canvas_row].nonzero().flatten().tolist() == expected
                row += length
        assert row == rows
        for clean in range(len(batch.clean)):
            assert not sight[clean, len(batch.clean) :].any(), "a clean row sees a canvas"


def test_canvases_of_an_example_attend_in_as_few_calls_as_their_masks_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = Example(torch.arange(5 + 12 * CANVAS), 5, CANVAS, "x")
    draw = examples_and_blocks(1)[1][0][0]
    batch = pack([example], [[dataclasses.replace(draw, block=b) for b in range(12)]])
    shapes: list[tuple[int, ...]] = []
    plain = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append((len(query), query.shape[2], key.shape[2]))
        return plain(query, key, *args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    rows = torch.randn(1, 2, len(batch.clean) + len(batch.canvas), 4)
    packing = Packing.of(batch, WINDOW)
    packing.attend("sliding_attention", rows, rows, rows, 1.0)
    assert shapes[-3:] == [
        (1, CANVAS, 5 + CANVAS),
        (1, CANVAS, 5 + 2 * CANVAS),
        (10, CANVAS, WINDOW - 1 + CANVAS),
    ], "blocks past the first window have equal masks"
    shapes.clear()
    packing.attend("full_attention", rows, rows, rows, 1.0)
    calls = packing.calls["full_attention"]
    assert shapes[1:] == [(1, call.rows, call.key_rows) for call in calls]
    assert [len(call.canvases) for call in calls] == [1, 1, 1, 1, 2, 2, 2, 2], (
        "canvases that see many keys share a call; the first ones would mostly see masked keys"
    )
    for call in calls:
        seen = sum(canvas.rows * canvas.keys for canvas in call.canvases)
        assert seen <= call.scores <= 1.25 * seen


def test_slices_of_a_long_example_add_their_gradients_in_place() -> None:
    """Autograd would pad each slice's gradient to the whole example: time grows with its square."""
    example = Example(torch.arange(40 * WINDOW), 39 * WINDOW, CANVAS, "x")
    batch = pack([example], [examples_and_blocks(1)[1][0][0]])
    rows = torch.randn(1, 2, len(batch.clean) + len(batch.canvas), 4, requires_grad=True)
    out = Packing.of(batch, WINDOW).attend("sliding_attention", rows, rows, rows, 1.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out.sum().backward()
    padded = [e for e in profiled.events() if e.name == "aten::slice_backward"]
    assert not padded, f"{len(padded)} slices are padded with zeros"


def test_canvases_of_several_examples_share_no_call() -> None:
    spans = tuple((at, 90, CANVAS) for at in range(3))
    for window in (None, WINDOW):
        calls = attention_calls.canvas_calls(spans, window)
        assert [call.canvases[0].example for call in calls] == [0, 1, 2]
        assert all(call.scores == CANVAS * call.key_rows for call in calls)


def test_scored_rows_positions_and_targets_are_those_of_each_block() -> None:
    examples, draws = examples_and_blocks(ALL)
    batch = pack(examples, draws)
    spans = [
        (e, e.prefix_length + d.block * CANVAS)
        for e, own in zip(examples, draws, strict=True)
        for d in own
    ]
    assert len(batch.clean) == sum(len(e.tokens) for e in examples), "clean tokens more than once"
    assert len(batch.next_targets) == sum(len(e.tokens) - 1 for e in examples)
    assert torch.equal(
        batch.canvas_targets, torch.cat([e.tokens[start : start + CANVAS] for e, start in spans])
    )
    assert torch.equal(
        batch.canvas_positions,
        torch.cat([torch.arange(len(e.tokens))[start : start + CANVAS] for e, start in spans]),
    )
    assert batch.row_keys is not None
    assert len(set(batch.row_keys.tolist())) == len(batch.row_keys), "rows drop the same features"

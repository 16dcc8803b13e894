"""FlexAttention's form of a packed batch against the form that attends example by example
(tests/unit/test_objective.py holds that one).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from canvastune.data.packing import Example, PackedBatch, pack
from canvastune.errors import UserError
from canvastune.model import flex_attention
from canvastune.model.flex_attention import TILE, FlexPacking
from canvastune.noise import NoiseSample
from canvastune.training.run import train
from tests.support.small import (
    CANVAS,
    VOCABULARY,
    WINDOW,
    examples_and_draws,
    loss_and_gradients,
    noise,
    run_config,
    shared_model,
    worst_difference,
)

Batch = tuple[list[Example], list[NoiseSample]]


@pytest.fixture(autouse=True)
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients on a CPU, where it has no kernel for them; its own dense definition
    of the operator has them.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def ragged() -> Batch:
    return examples_and_draws()


def long() -> Batch:
    """Several tiles of rows, some of them seen as a whole, some not at all; a first block, a last
    one, and one that was cut.
    """
    generator = torch.Generator().manual_seed(1)
    examples, draws = [], []
    for position, (prefix, rows, block) in enumerate([(300, 40, 0), (20, 64, 7), (150, 27, 2)]):
        example = Example(
            torch.randint(1, VOCABULARY, (prefix + rows,), generator=generator),
            prefix,
            CANVAS,
            str(position),
        )
        examples.append(example)
        draws.append(
            dataclasses.replace(
                noise(position, example.blocks), block=block, self_condition=position != 1
            )
        )
    return examples, draws


def without_coins() -> Batch:
    examples, draws = ragged()
    return examples, [dataclasses.replace(draw, self_condition=False) for draw in draws]


@pytest.mark.parametrize(
    ("method", "batch", "checkpointing"),
    [
        ("full", ragged, True),
        ("full", long, False),
        ("full", without_coins, True),
        ("lora", ragged, False),
        ("lora", long, True),
    ],
)
def test_loss_and_every_gradient_equal_those_of_attention_by_example(
    checkpoint: Path, method: str, batch: Callable[[], Batch], checkpointing: bool
) -> None:
    by_example = loss_and_gradients(
        shared_model(checkpoint, run_config(method)), [batch()], checkpointing
    )
    flex = loss_and_gradients(
        shared_model(checkpoint, run_config(method, attention="flex")), [batch()], checkpointing
    )
    assert flex[0] == pytest.approx(by_example[0], rel=1e-6)
    worst, name = worst_difference(flex[1], by_example[1])
    assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e}"


def seen_by_definition(batch: PackedBatch, kind: str) -> torch.Tensor:
    """bool[L, L], row by row from objective.md section 4."""
    near = WINDOW if kind == "sliding_attention" else 10**6
    clean = [(e, at) for e, length in enumerate(batch.clean_lengths) for at in range(length)]
    canvas = [e for e, length in enumerate(batch.canvas_lengths) for _ in range(length)]
    rows = len(clean) + len(canvas)
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for row, (example, at) in enumerate(clean):
        for key, (other, place) in enumerate(clean):
            mask[row, key] = other == example and at - near < place <= at
    for row, example in enumerate(canvas, len(clean)):
        start = batch.block_starts[example]
        for key, (other, place) in enumerate(clean):
            mask[row, key] = other == example and start - (near - 1) <= place < start
        for key, other in enumerate(canvas, len(clean)):
            mask[row, key] = other == example
    return mask


@pytest.mark.parametrize("batch", [ragged, long])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_each_row_sees_what_the_objective_says_and_each_tile_is_classed_as_torch_would(
    batch: Callable[[], Batch], kind: str
) -> None:
    packed = pack(*batch())
    found = FlexPacking.of(packed, WINDOW).masks[kind]
    rows = len(packed.clean) + len(packed.canvas)
    at = torch.arange(rows)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(
        found.mask_mod(zero, zero, at[:, None], at[None]), seen_by_definition(packed, kind)
    )
    check_tiles(found, kind)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_tiles_are_classed_as_torch_would_where_they_are_counted_a_range_at_a_time(
    kind: str,
) -> None:
    examples, draws = long()
    prefix = torch.arange(1200) % VOCABULARY
    longest = dataclasses.replace(
        examples[0],
        tokens=torch.cat([prefix, examples[0].tokens]),
        prefix_length=len(prefix) + examples[0].prefix_length,
    )
    packed = pack([examples[1], longest], [draws[1], draws[0]])
    check_tiles(FlexPacking.of(packed, 10 * WINDOW).masks[kind], kind)


def check_tiles(found: BlockMask, kind: str) -> None:
    """Compare the tiles of a mask with those of torch's own function, which looks at every pair."""
    rows = found.shape[-1]
    expected = create_block_mask(
        found.mask_mod, None, None, rows, rows, device="cpu", BLOCK_SIZE=TILE
    )
    for count, order in [
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
    ]:
        counts_found, counts_expected = getattr(found, count), getattr(expected, count)
        assert torch.equal(counts_found, counts_expected), f"{count} of {kind}"
        for tile, many in enumerate(counts_expected[0, 0].tolist()):
            chosen = [
                sorted(getattr(mask, order)[0, 0, tile, :many].tolist())
                for mask in (found, expected)
            ]
            assert chosen[0] == chosen[1], f"{order} of tile {tile}, {kind}"


def test_batches_of_all_lengths_share_a_few_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced as for a GPU, with gradients and without, in both kinds of layer: more lengths compile
    nothing more.
    """
    counter = CompileCounterWithBackend("aot_eager")
    how = flex_attention.COMPILATION | {"backend": counter}
    monkeypatch.setattr(
        flex_attention, "flex_attention", torch.compile(torch_flex.flex_attention, **how)
    )
    examples, draws = long()
    compiled = []
    for cut in (0, 5, 12, 44, 83, 100):
        shorter = [
            dataclasses.replace(e, tokens=e.tokens[cut:], prefix_length=e.prefix_length - cut)
            for e in examples[::2]
        ]
        packing = FlexPacking.of(pack(shorter, draws[::2]), WINDOW)
        for grad in (False, True):
            for kind, size, heads in (("sliding_attention", 16, 2), ("full_attention", 32, 1)):
                rows = packing.masks[kind].shape[-1]
                query, key, value = (
                    torch.randn(1, count, rows, size, requires_grad=grad)
                    for count in (4, heads, heads)
                )
                out = packing.attend(kind, query, key, value, 1.0)
                if grad:
                    out.sum().backward()
        compiled.append(counter.frame_count)
    assert compiled[-1] == compiled[0] <= 8


def test_flex_is_refused_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    with pytest.raises(UserError, match=r"train\.attention: found 'flex'") as error:
        train(run_config(attention="flex"), None, tmp_path)
    assert "train.attention=sdpa" in error.value.hint


def test_generation_stays_with_stock_attention(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("generate() calls FlexAttention")

    prompt = torch.randint(5, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    answers = []
    monkeypatch.setattr(FlexPacking, "attend", refused)
    for form in ("sdpa", "flex"):
        model = shared_model(checkpoint, run_config(attention=form))
        torch.manual_seed(1)
        answers.append(
            model.generate(
                prompt,
                max_new_tokens=CANVAS,
                max_denoising_steps=3,
                eos_token_id=VOCABULARY,
                pad_token_id=0,
            ).sequences
        )
    assert torch.equal(answers[0], answers[1])

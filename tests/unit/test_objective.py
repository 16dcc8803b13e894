"""objective.md sections 2 and 4 to 7, claim by claim, in one process and float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from canvastune import logit_chunks, objective
from canvastune.config.schema import Checkpointing
from canvastune.data.packing import Example, pack
from canvastune.model.attention import Packing
from canvastune.model.diffusion_gemma import CACHE, WeightTiedDiffusionGemma
from canvastune.model.parameter_names import VISION, base_name
from canvastune.noise import NoiseSample
from canvastune.objective import losses
from tests.support.oracle import plain_loss
from tests.support.small import (
    CANVAS,
    VOCABULARY,
    WINDOW,
    counts,
    examples_and_draws,
    loss_and_gradients,
    noise,
    run_config,
    shared_model,
    stock_model,
    worst_difference,
)

SLIDING_LAYERS = 3
EOS_NEVER = VOCABULARY  # no token has this id, so every canvas is generated


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> WeightTiedDiffusionGemma:
    return shared_model(checkpoint, run_config("full"))


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> DiffusionGemmaForBlockDiffusion:
    return stock_model(checkpoint)


@pytest.fixture(scope="module")
def plain(
    stock: DiffusionGemmaForBlockDiffusion, model: WeightTiedDiffusionGemma
) -> tuple[float, float, float, dict[str, torch.Tensor]]:
    """The plain step's losses and its gradients under the engine's names, for what the engine
    trains.
    """
    examples, draws = examples_and_draws()
    stock.zero_grad(set_to_none=True)
    total, diffusion, autoregressive = plain_loss(stock, examples, draws)
    total.backward()
    found = {
        name.replace("model.encoder.language_model.", "model.decoder."): p.grad
        for name, p in stock.named_parameters()
        if p.grad is not None
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return (
        float(total.detach()),
        diffusion,
        autoregressive,
        {name: gradient for name, gradient in found.items() if name in trained},
    )


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_loss_and_every_gradient_equal_the_plain_step(
    model: WeightTiedDiffusionGemma, plain: tuple, checkpointing: Checkpointing
) -> None:
    loss, found = loss_and_gradients(model, [examples_and_draws()], checkpointing)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    worst, name = worst_difference(found, plain[3])
    assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e} relative to the plain step"


def test_reported_sums_are_the_two_cross_entropies(
    model: WeightTiedDiffusionGemma, plain: tuple
) -> None:
    examples, draws = examples_and_draws()
    canvas_rows, pairs = counts(examples, draws)
    _, diffusion, autoregressive = model.run_under_fsdp(
        losses, pack(examples, draws), (1.0, 1.0), any_self_conditioned=True, checkpointing=False
    )
    assert float(diffusion) / canvas_rows == pytest.approx(plain[1], rel=1e-6)
    assert float(autoregressive) / pairs == pytest.approx(plain[2], rel=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 2, 2, 2]])
def test_gradients_do_not_depend_on_how_a_batch_is_cut_nor_on_padding(
    model: WeightTiedDiffusionGemma, plain: tuple, sizes: list[int]
) -> None:
    examples, draws = examples_and_draws()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    loss, found = loss_and_gradients(
        model, [(examples[e - n : e], draws[e - n : e]) for e, n in zip(ends, sizes, strict=True)]
    )
    assert loss == pytest.approx(plain[0], rel=1e-6)
    worst, name = worst_difference(found, plain[3])
    assert worst < 1e-5, (
        f"gradient of {name} changes by {worst:.1e} when the batch is cut into {sizes}"
    )


def test_chunked_loss_equals_the_plain_one(
    model: WeightTiedDiffusionGemma, plain: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_ELEMENTS", 3 * VOCABULARY)  # three rows at a time
    loss, found = loss_and_gradients(model, [examples_and_draws()])
    assert loss == pytest.approx(plain[0], rel=1e-6)
    assert worst_difference(found, plain[3])[0] < 1e-5


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiled_loss_equals_the_plain_one(
    model: WeightTiedDiffusionGemma, plain: tuple, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    monkeypatch.setattr(
        logit_chunks, "TILE_ELEMENTS", 5 * tile
    )  # columns at a time, which do not divide the vocabulary
    loss, found = loss_and_gradients(model, [examples_and_draws()])
    assert loss == pytest.approx(plain[0], rel=1e-6)
    assert worst_difference(found, plain[3])[0] < 1e-5


def test_logits_are_softcapped_in_float32() -> None:
    logits = torch.tensor([1000.0, -1000.0, 3.0], dtype=torch.bfloat16)
    tanh, _, _ = objective.softmax_terms(
        torch.ones(1, 1, dtype=torch.bfloat16), logits[:, None], 30.0
    )
    capped = 30 * tanh[:, 0]
    assert capped.dtype == torch.float32
    assert torch.allclose(
        capped, torch.tensor([30.0, -30.0, 30 * torch.tanh(torch.tensor(0.1)).item()])
    )


@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0, 30.0, 300.0])
def test_terms_of_the_softmax_equal_tanh_and_exp(size: float) -> None:
    cap, generator = 30.0, torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, generator=generator)
    table = size / 4 * torch.randn(512, 16, generator=generator)
    tanh, terms, total = objective.softmax_terms(hidden, table, cap)
    expected = (table.double() @ hidden.double().T / cap).tanh()
    exact = (cap * expected).exp()
    rounding = 2e-7 * (1 + size)  # of a logit over the cap, in float32
    assert float((tanh - expected).abs().max()) < rounding
    assert torch.allclose(terms.double(), exact, rtol=cap * rounding, atol=0)
    assert torch.allclose(total.double(), exact.sum(0), rtol=cap * rounding, atol=0)


def canvas_hidden(
    model: WeightTiedDiffusionGemma,
    examples: list[Example],
    draws: list[NoiseSample],
    embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    batch = pack(examples, draws)
    packing = Packing.of(batch, WINDOW)
    if embeds is not None:
        embeds.copy_(model.model.decoder.embed_tokens(batch.clean).detach())
    return model.hidden_states(
        batch, model.embed_canvas(batch.canvas, None), packing, checkpointing=False
    )[1]


def test_canvas_never_sees_clean_tokens_at_or_after_its_block(
    model: WeightTiedDiffusionGemma,
) -> None:
    """Check that what is there changes no bit of the canvas's hidden states."""
    examples, draws = examples_and_draws()
    before = canvas_hidden(model, examples, draws)
    changed = []
    for example, draw in zip(examples, draws, strict=True):
        start = example.prefix_length + draw.block * CANVAS
        tokens = example.tokens.clone()
        tokens[start + CANVAS :] = (tokens[start + CANVAS :] + 7) % VOCABULARY  # later blocks
        changed.append(dataclasses.replace(example, tokens=tokens))
    assert torch.equal(canvas_hidden(model, changed, draws), before), (
        "a later block's clean tokens reach the canvas"
    )
    # Its own clean block: everything is corrupted to fixed tokens, so the targets reach the canvas
    # only by a leak.
    all_noise = [
        dataclasses.replace(d, corrupted=torch.ones(CANVAS, dtype=torch.bool)) for d in draws
    ]
    before = canvas_hidden(model, examples, all_noise)
    own = []
    for example, draw in zip(examples, draws, strict=True):
        start = example.prefix_length + draw.block * CANVAS
        tokens = example.tokens.clone()
        tokens[start : start + CANVAS] = (tokens[start : start + CANVAS] + 11) % VOCABULARY
        own.append(dataclasses.replace(example, tokens=tokens))
    assert torch.equal(canvas_hidden(model, own, all_noise), before), (
        "the block's own clean tokens reach the canvas"
    )


def test_no_gradient_reaches_clean_tokens_at_or_after_the_block(
    model: WeightTiedDiffusionGemma,
) -> None:
    examples, draws = examples_and_draws()
    for example, draw in zip(examples, draws, strict=True):
        seen: list[torch.Tensor] = []
        batch = pack([example], [draw])
        handle = model.model.decoder.embed_tokens.register_forward_hook(
            lambda _m, _i, out, seen=seen: seen.append(out) or out.retain_grad()
        )
        try:
            canvas = model.embed_canvas(batch.canvas, None)
            hidden = model.hidden_states(
                batch, canvas, Packing.of(batch, WINDOW), checkpointing=False
            )[1]
        finally:
            handle.remove()
        hidden.square().sum().backward()
        gradient = seen[1].grad  # the first lookup is the canvas's
        assert gradient is not None
        start = example.prefix_length + draw.block * CANVAS
        assert float(gradient[start:].abs().max() if len(gradient) > start else 0) == 0
        assert float(gradient[:start].abs().max()) > 0, "the canvas does not see its prefix"
    model.zero_grad(set_to_none=True)


def test_hidden_states_equal_those_of_block_by_block_inference(
    model: WeightTiedDiffusionGemma, stock: DiffusionGemmaForBlockDiffusion
) -> None:
    """Stock inference keeps the last window - 1 tokens of a sliding layer in its cache: our mask's
    bounds, several windows long.
    """
    examples, draws = examples_and_draws()
    assert (
        max(e.prefix_length + d.block * CANVAS for e, d in zip(examples, draws, strict=True))
        > 3 * WINDOW
    )
    for example, draw in zip(examples, draws, strict=True):
        batch = pack([example], [draw])
        ours = canvas_hidden(model, [example], [draw])
        start = example.prefix_length + draw.block * CANVAS
        cache = DynamicCache(config=stock.config.text_config)
        stock.model.encoder(input_ids=example.tokens[None, :start], **{CACHE: cache})
        theirs = stock.model.decoder(
            decoder_input_ids=batch.canvas[None],
            **{CACHE: cache},
            decoder_position_ids=batch.canvas_positions[None],
        ).last_hidden_state[0]
        difference = float((ours - theirs).abs().max().detach())
        assert difference < 2e-5, (
            f"block {draw.block} after {start} tokens differs from inference by {difference:.1e}"
        )


def test_sliding_layers_see_exactly_window_minus_one_positions_before_the_block() -> None:
    example = Example(torch.arange(80), 60, CANVAS, "x")
    packing = Packing.of(pack([example], [dataclasses.replace(noise(0, 3), block=1)]), WINDOW)
    start, rows = 60 + CANVAS, 80 + CANVAS
    # With equal keys a row's weights are uniform over what it sees, and one-hot values return them.
    equal, one_hot = torch.zeros(1, 1, rows, rows), torch.eye(rows)[None, None]
    sliding, full = (
        packing.attend(kind, equal, equal, one_hot, 1.0)[0, 0] > 0
        for kind in ("sliding_attention", "full_attention")
    )
    own = list(range(80, rows))
    for row in own:
        assert sliding[row].nonzero().flatten().tolist() == [
            *range(start - (WINDOW - 1), start),
            *own,
        ]
        assert full[row].nonzero().flatten().tolist() == [*range(start), *own]
    for row in range(80):
        assert sliding[row].nonzero().flatten().tolist() == list(
            range(max(0, row - (WINDOW - 1)), row + 1)
        ), "a clean row sees the last `window` tokens, itself included"
        assert full[row].nonzero().flatten().tolist() == list(range(row + 1))


def test_decoding_one_block_equals_decoding_all_and_scoring_one(
    model: WeightTiedDiffusionGemma,
) -> None:
    examples, draws = examples_and_draws()
    example, draw = examples[4], draws[4]  # five blocks
    alone = [
        canvas_hidden(model, [example], [dataclasses.replace(draw, block=b)])
        for b in range(example.blocks)
    ]
    together = canvas_hidden(
        model,
        [example] * example.blocks,
        [dataclasses.replace(draw, block=b) for b in range(example.blocks)],
    )
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_pass_one_matters_only_where_the_coin_says_so(model: WeightTiedDiffusionGemma) -> None:
    examples, draws = examples_and_draws()
    off = [dataclasses.replace(draw, self_condition=False) for draw in draws]
    _, without = loss_and_gradients(model, [(examples, off)])
    canvas_rows, pairs = counts(examples, off)
    model.zero_grad(set_to_none=True)
    # Another rank has a coin, so pass 1 runs here too: nothing may change.
    model.run_under_fsdp(
        losses,
        pack(examples, off),
        (1 / canvas_rows, 1 / pairs),
        any_self_conditioned=True,
        checkpointing=False,
    )[0].backward()
    forced = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst_difference(forced, without)[0] < 1e-6


def test_the_padding_ids_lookup_has_no_gradient(model: WeightTiedDiffusionGemma) -> None:
    embedded = model.model.decoder.embed_tokens(torch.tensor([0, 5]))
    model.zero_grad(set_to_none=True)
    embedded.sum().backward()
    gradient = model.model.decoder.embed_tokens.weight.grad
    assert gradient is not None
    assert float(gradient[0].abs().max()) == 0
    assert float(gradient[5].abs().min()) > 0
    model.zero_grad(set_to_none=True)


def test_full_training_freezes_router_and_leaves_vision_out(
    model: WeightTiedDiffusionGemma,
) -> None:
    frozen = {name.split(".", 4)[-1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"router.proj.weight", "router.scale", "router.per_expert_scale"}
    assert not [name for name, _ in model.named_parameters() if name.startswith(VISION)]
    assert not [name for name, _ in model.named_parameters() if "encoder" in name], (
        "a shared weight is trained twice"
    )


def test_lora_puts_one_adapter_on_each_shared_attention_and_mlp_weight(checkpoint: Path) -> None:
    lora = shared_model(checkpoint, run_config("lora"))
    trained = sorted(name for name, p in lora.named_parameters() if p.requires_grad)
    adapted = {
        base_name(name).split(".lora_")[0].split("layers.")[1].split(".", 1)[1] for name in trained
    }
    assert adapted == {f"self_attn.{x}_proj" for x in "qkvo"} | {
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert len(trained) == 2 * (4 * 7 - 1), "one adapter a weight; the full layer has no v_proj"


def test_stock_generate_works_on_the_shared_model(
    model: WeightTiedDiffusionGemma, stock: DiffusionGemmaForBlockDiffusion
) -> None:
    prompt = torch.randint(5, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    answers = []
    for each in (model, stock):
        torch.manual_seed(1)
        answers.append(
            each.generate(
                prompt,
                max_new_tokens=3 * CANVAS,
                max_denoising_steps=5,
                eos_token_id=EOS_NEVER,
                pad_token_id=0,
            ).sequences
        )
    assert torch.equal(answers[0], answers[1])

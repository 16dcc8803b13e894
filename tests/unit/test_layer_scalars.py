"""A base whose encoder and decoder scale their layers differently is trained with both scalars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import DECODER_SCALAR, ENCODER_SCALAR
from canvastune.config.schema import Checkpointing
from canvastune.data.packing import pack
from canvastune.model.attention import Packing
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.flex_attention import FlexPacking
from tests.support.oracle import plain_loss
from tests.support.small import (
    CANVAS,
    VOCABULARY,
    WINDOW,
    examples_and_draws,
    loss_and_gradients,
    run_config,
    shared_model,
    stock_model,
    worst_difference,
    write_checkpoint,
)

SCALARS = {1: 0.6, 3: 1.7}  # of the encoder, by layer; the others are the decoder's


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder)
    for index, value in SCALARS.items():
        shard = CheckpointReader(folder).path(ENCODER_SCALAR.format(index))
        values = load_file(shard)
        values[ENCODER_SCALAR.format(index)].fill_(value)
        save_file(values, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> WeightTiedDiffusionGemma:
    return shared_model(base, run_config("full"))


@pytest.fixture(scope="module")
def plain(base: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the stock model, by the engine's names."""
    stock = stock_model(base)
    total, _, _ = plain_loss(stock, *examples_and_draws())
    total.backward()
    return float(total.detach()), {
        name.replace("model.encoder.language_model.", "model.decoder."): parameter.grad
        for name, parameter in stock.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient_equal_the_stock_models(
    model: WeightTiedDiffusionGemma, plain: Any, checkpointing: Checkpointing
) -> None:
    loss, found = loss_and_gradients(model, [examples_and_draws()], checkpointing)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: gradient for name, gradient in plain[1].items() if name in trained}
    worst, name = worst_difference(found, expected)
    assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e} relative to the stock model"


def test_the_scalars_matter_to_the_loss(checkpoint: Path, plain: Any) -> None:
    other, _, _ = plain_loss(stock_model(checkpoint), *examples_and_draws())
    assert abs(float(other.detach()) - plain[0]) > 1e-2


def test_flex_attention_scales_the_same_rows(model: WeightTiedDiffusionGemma) -> None:
    examples, draws = examples_and_draws()
    batch = pack(examples, draws)
    layer = model.model.decoder.layers[1]
    rows = len(batch.clean) + len(batch.canvas)
    ours = layer._scalar(rows, packing=Packing.of(batch, WINDOW))
    flex = layer._scalar(rows, packing=FlexPacking.of(batch, WINDOW))
    assert torch.equal(ours, flex)
    clean = len(batch.clean)
    assert ours[:clean].unique().tolist() == [pytest.approx(0.6)]
    assert ours[clean:].unique().tolist() == [pytest.approx(0.9)]


def test_stock_generate_on_the_shared_model_answers_as_the_stock_one(
    model: WeightTiedDiffusionGemma, base: Path
) -> None:
    prompt = torch.randint(5, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    answers = []
    for each in (model, stock_model(base)):
        torch.manual_seed(1)
        settings = {"max_denoising_steps": 5, "eos_token_id": VOCABULARY, "pad_token_id": 0}
        answers.append(each.generate(prompt, max_new_tokens=2 * CANVAS, **settings).sequences)
    assert torch.equal(*answers)


def test_a_base_with_equal_scalars_holds_no_second_one(checkpoint: Path) -> None:
    shared = shared_model(checkpoint, run_config("lora"))
    assert all(layer.encoder_scalar is None for layer in shared.model.decoder.layers)
    layers = len(shared.model.decoder.layers)
    names = [name for name, _ in shared.named_buffers() if "scalar" in name]
    assert names == [DECODER_SCALAR.format(index) for index in range(layers)]

"""The adapters' own claims: what they compute, what they drop, and how they start (objective.md
section 6).
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper

from canvastune.checkpoint.load import build_model
from canvastune.checkpoint.peft_adapter import write_adapter
from canvastune.data.packing import Example, pack
from canvastune.errors import UserError
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.model.lora import CounterBasedDropout, initial_factor, keyed_dropout, lora_factors
from canvastune.noise import NoiseSample, dropout_mask, dropout_module_key, dropout_row_keys
from canvastune.objective import losses
from tests.support.oracle import plain_loss
from tests.support.small import (
    counts,
    examples_and_draws,
    model_config,
    noise,
    run_config,
    shared_model,
    stock_model,
    worst_difference,
)

KINDS: dict[str, dict[str, object]] = {
    "attention and MLP": {},
    "rank-stabilised": {"rslora": True, "alpha": 8.0},
    "with experts": {"experts": True},
    "with dropout": {"dropout": 0.3},
    "with experts, rank-stabilised and dropout": {
        "experts": True,
        "rslora": True,
        "alpha": 8.0,
        "dropout": 0.3,
    },
}
PROBABILITY = 0.3
SEED = 5  # of the examples' draws


def trained(checkpoint: Path, lora: dict[str, object]) -> WeightTiedDiffusionGemma:
    """The engine's model, its factors B no longer zero."""
    model = shared_model(checkpoint, run_config("lora", lora=lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, b in lora_factors(model):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.03)
    return model


def gradients(
    model: WeightTiedDiffusionGemma,
    examples: list[Example],
    draws: list[NoiseSample],
    size: int,
    checkpointing: bool,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the factors' gradients of a global batch that is cut into micro-batches of `size`."""
    canvas_rows, pairs = counts(examples, draws)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for start in range(0, len(examples), size):
        part = slice(start, start + size)
        batch = pack(examples[part], draws[part])
        loss, _, _ = model.run_under_fsdp(
            losses,
            batch,
            (1 / canvas_rows, 1 / pairs),
            any_self_conditioned=True,
            checkpointing=checkpointing,
        )
        loss.backward()
        total += float(loss.detach())
    found: dict[str, torch.Tensor] = {}
    for name, a, b in lora_factors(model):
        assert a.grad is not None, name
        assert b.grad is not None, name
        found |= {f"{name} A": a.grad.clone(), f"{name} B": b.grad.clone()}
    return total, found


class PlainDropout(torch.nn.Module):
    """The same masks, by plain integer arithmetic, on whatever rows the oracle says that it runs."""

    def __init__(self, name: str, stage: dict[str, Any], probability: float) -> None:
        super().__init__()
        self.name, self.stage, self.probability = name, stage, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stage["rows"] is None:
            return x
        draw, rows = self.stage["rows"]
        keep = ~plain_mask(
            draw.dropout_key, rows, x.shape[-2], x.shape[-1], self.name, self.probability
        )
        return x * torch.from_numpy(keep) / (1 - self.probability)


def plain_mask(
    key: int, kind: str, rows: int, features: int, name: str, probability: float
) -> np.ndarray:
    """bool[rows, features]: what is dropped, in unsigned arithmetic that never leaves its width."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    place = 2 * np.arange(rows, dtype=np.uint64) + np.uint64(kind == "canvas")
    keys = splitmix(
        splitmix(place * golden + np.uint64(key % 2**64))
        ^ np.uint64(dropout_module_key(name) % 2**64)
    )
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    words = low[:, None] + np.arange(features, dtype=np.uint32) * np.uint32(0x9E3779B9)
    bits = lowbias(lowbias(words) ^ high[:, None])
    return (bits ^ np.uint32(1 << 31)) < np.uint32(round(probability * 2**32))


def splitmix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def lowbias(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def plain_gradients(
    folder: Path,
    checkpoint: Path,
    model: WeightTiedDiffusionGemma,
    lora: dict[str, Any],
    examples: list[Example],
    draws: list[NoiseSample],
) -> tuple[float, dict[str, torch.Tensor]]:
    """The plain step on the stock model under stock PEFT, with the encoder's and the decoder's
    gradients of a factor summed.
    """
    config = run_config("lora", lora=lora)
    pairs = {name: (a.detach(), b.detach()) for name, a, b in lora_factors(model)}
    write_adapter(folder, pairs, config, checkpoint)
    stock: Any = PeftModel.from_pretrained(
        stock_model(checkpoint), str(folder), is_trainable=True
    ).base_model.model
    stage: dict[str, Any] = {"rows": None}
    if lora.get("dropout"):
        for name, module in list(stock.named_modules()):
            if hasattr(module, "lora_dropout") and not isinstance(module, ParamWrapper):
                shared = name.replace("model.encoder.language_model.", "model.decoder.")
                module.lora_dropout["default"] = PlainDropout(shared, stage, lora["dropout"])
    total, _, _ = plain_loss(stock, examples, draws, stage=lambda rows: stage.update(rows=rows))
    total.backward()
    found: dict[str, torch.Tensor] = {}
    for name, (a, _) in pairs.items():
        module, _, leaf = name.rpartition(".")
        for prefix in ("model.decoder.", "model.encoder.language_model."):
            layer = stock.get_submodule(module.replace("model.decoder.", prefix))
            if leaf == "gate_up_proj":  # the inner one of two wrappers
                layer = layer.base_layer
            a_grad, b_grad = (
                layer.lora_A["default"].weight.grad,
                layer.lora_B["default"].weight.grad,
            )
            if leaf != "weight":
                experts, rank = a.shape[:2]
                a_grad = a_grad.reshape(experts, rank, -1)
                b_grad = b_grad.reshape(-1, rank, experts).permute(2, 0, 1)
            for key, value in ((f"{name} A", a_grad), (f"{name} B", b_grad)):
                found[key] = found[key] + value if key in found else value
    return float(total.detach()), found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_factors_gradient_equal_the_plain_step_under_stock_peft(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    examples, draws = examples_and_draws()
    model = trained(checkpoint, KINDS[kind])
    expected_loss, expected = plain_gradients(
        tmp_path, checkpoint, model, KINDS[kind], examples, draws
    )
    # Whole and kept, then cut and recomputed.
    for size, checkpointing in ((8, False), (3, True)):
        loss, found = gradients(model, examples, draws, size, checkpointing)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        worst, name = worst_difference(found, expected)
        assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e}, {size} examples at a time"


def test_adapters_scale_their_update_by_alpha_over_the_rank_or_its_root(checkpoint: Path) -> None:
    assert run_config("lora").lora.scale == 32 / 8
    stable: dict[str, object] = {"rslora": True, "experts": True}
    assert run_config("lora", lora=stable).lora.scale == pytest.approx(32 / 8**0.5)
    model = shared_model(checkpoint, run_config("lora", lora=stable))
    layer = model.model.decoder.layers[0]
    assert (
        layer.self_attn.q_proj.scaling["default"]
        == layer.experts.lora_scale
        == pytest.approx(32 / 8**0.5)
    )


def test_expert_adapters_cover_both_weights_of_every_expert_and_start_as_the_identity(
    checkpoint: Path,
) -> None:
    model = shared_model(checkpoint, run_config("lora", lora={"experts": True}))
    found = {
        name: (tuple(a.shape), tuple(b.shape))
        for name, a, b in lora_factors(model)
        if "experts" in name
    }
    expected: dict[str, tuple] = {}
    for index in range(len(model.model.decoder.layers)):
        experts = f"model.decoder.layers.{index}.experts"
        expected |= {
            f"{experts}.gate_up_proj": ((8, 8, 32), (8, 32, 8)),
            f"{experts}.down_proj": ((8, 8, 16), (8, 32, 8)),
        }
    assert found == expected
    for name, a, b in lora_factors(model):
        assert a.requires_grad
        assert b.requires_grad
        assert not b.any(), f"{name} must start as the identity"
        if a.dim() == 3:
            assert a.abs().max() <= a.shape[-1] ** -0.5
            assert len({tuple(expert.flatten().tolist()) for expert in a}) == 8, (
                f"two experts of {name} start alike"
            )


def test_a_factor_starts_from_the_seed_and_its_name_alone() -> None:
    name, shape = "model.decoder.layers.0.experts.lora_A.default.down_proj", (8, 8, 16)
    assert torch.equal(initial_factor(name, shape, 3), initial_factor(name, shape, 3))
    assert not torch.equal(initial_factor(name, shape, 3), initial_factor(name, shape, 4))
    assert not torch.equal(
        initial_factor(name, shape, 3),
        initial_factor(name.replace("layers.0", "layers.1"), shape, 3),
    )


@pytest.mark.parametrize(
    ("precision", "rank", "multiple"), [("bfloat16", 12, 8), ("float32", 6, 4)]
)
def test_a_rank_that_the_grouped_matmul_cannot_take_is_refused_with_one_that_it_can(
    precision: str, rank: int, multiple: int
) -> None:
    config = run_config("lora", lora={"experts": True, "rank": rank}, precision=precision)
    better = rank + multiple - rank % multiple
    with pytest.raises(UserError, match=rf"lora\.rank: found {rank}, .* {multiple} ") as error:
        build_model(config, model_config())
    assert f"--set lora.rank={better}" in error.value.hint
    build_model(
        run_config("lora", lora={"rank": rank}, precision=precision), model_config()
    )  # without experts, any rank


def test_dropout_is_not_in_the_model_where_nothing_is_dropped(checkpoint: Path) -> None:
    model = shared_model(checkpoint, run_config("lora", lora={"experts": True}))
    assert not [
        name for name, module in model.named_modules() if isinstance(module, CounterBasedDropout)
    ]
    dropping = shared_model(checkpoint, run_config("lora", lora={"experts": True, "dropout": 0.1}))
    found = {
        name.split(".lora_dropout")[0]
        for name, module in dropping.named_modules()
        if isinstance(module, CounterBasedDropout)
    }
    assert found == {
        name.removesuffix(".weight")
        for name, _, _ in lora_factors(dropping)
        if "experts" not in name
    }


def test_dropout_takes_nothing_from_and_leaves_nothing_in_the_global_generator(
    checkpoint: Path,
) -> None:
    examples, draws = examples_and_draws()
    model = trained(checkpoint, {"dropout": PROBABILITY})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = gradients(model, examples, draws, 8, True)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = gradients(model, examples, draws, 8, True)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_only_training_rows_are_dropped(checkpoint: Path) -> None:
    """Validation, pass 1 of self-conditioning and generate() see the whole adapter."""
    examples, draws = examples_and_draws()
    dropping, whole = (trained(checkpoint, {"dropout": p}) for p in (PROBABILITY, 0.0))
    held_out = [dataclasses.replace(draw, dropout_key=None) for draw in draws]

    def loss(model: WeightTiedDiffusionGemma, some: list[NoiseSample], coin: bool = True) -> float:
        with torch.no_grad():
            return float(
                model.run_under_fsdp(
                    losses,
                    pack(examples, some),
                    (1.0, 1.0),
                    any_self_conditioned=coin,
                    checkpointing=False,
                )[0]
            )

    assert loss(dropping, held_out) == loss(whole, held_out)
    assert loss(dropping, draws) != loss(whole, draws)
    batch = pack(examples, draws)
    assert batch.row_keys is not None
    assert len(batch.row_keys) == len(batch.clean) + len(batch.canvas)
    assert batch.select([True] * 8)[0].row_keys is None, "pass 1 would drop"
    prompt, answers = torch.arange(5, 25)[None], []
    for model in (dropping, whole):
        torch.manual_seed(0)
        answers.append(
            model.generate(
                prompt, max_new_tokens=8, max_denoising_steps=2, eos_token_id=256, pad_token_id=0
            ).sequences
        )
    assert torch.equal(*answers)
    dropping.eval()
    assert loss(dropping, draws) == loss(whole, draws)


def test_a_mask_depends_on_seed_example_row_and_module_and_on_nothing_else() -> None:
    draw = noise(7, 3)
    assert draw.dropout_key is not None
    assert draw.dropout_key == noise(7, 1).dropout_key, "the key depends on the example's length"
    assert draw.dropout_key not in {noise(8, 3).dropout_key, noise(7, 3, seed=6).dropout_key}
    assert draw.dropout_key != noise(7, 3, seed=SEED + 2**32).dropout_key, (
        "the high bits of the seed do not count"
    )
    clean, canvas = dropout_row_keys(draw.dropout_key, 40, 8)
    assert torch.equal(clean[:30], dropout_row_keys(draw.dropout_key, 30, 2)[0]), (
        "a row's key depends on the rows after it"
    )
    assert len({*clean.tolist(), *canvas.tolist()}) == 48, "a canvas row repeats a clean one"
    key = dropout_module_key("layers.0.self_attn.q_proj")
    mask = dropout_mask(torch.cat([clean, canvas]), 64, key, PROBABILITY)
    assert torch.equal(mask[10:20], dropout_mask(clean[10:20], 64, key, PROBABILITY)), (
        "a row's mask depends on its neighbors"
    )
    assert torch.equal(mask[:, :5], dropout_mask(torch.cat([clean, canvas]), 5, key, PROBABILITY))


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_masks_have_their_rate_and_are_independent_of_each_other(probability: float) -> None:
    """Within five standard deviations, over features, rows, the two kinds of rows, examples and
    modules.
    """
    rows, features = 256, 512
    keys = [noise(position, 1).dropout_key for position in range(3)]
    modules = [dropout_module_key(name) for name in ("q_proj", "k_proj")]
    masks = {}
    for index, key in enumerate(keys):
        assert key is not None
        for kind, row_keys in zip(
            ("clean", "canvas"), dropout_row_keys(key, rows, rows), strict=True
        ):
            for module in modules:
                masks[index, kind, module] = (
                    dropout_mask(row_keys, features, module, probability).double() - probability
                )
    spread = (probability * (1 - probability)) ** 0.5
    count = rows * features
    for where, mask in masks.items():
        assert abs(float(mask.mean())) < 5 * spread / count**0.5, f"{where}: another rate"
        for what, means, size in (
            ("features", mask.mean(0), rows),
            ("rows", mask.mean(1), features),
        ):
            statistic = float((means.square() / (spread**2 / size)).sum())
            assert abs(statistic - len(means)) < 6 * (2 * len(means)) ** 0.5, (
                f"{where}: {what} differ in their rates"
            )
        for what, one, other in (
            ("neighboring rows", mask[1:], mask[:-1]),
            ("neighboring features", mask[:, 1:], mask[:, :-1]),
        ):
            assert abs(float((one * other).mean())) < 5 * spread**2 / one.numel() ** 0.5, (
                f"{where}: {what} are correlated"
            )
    for first, second in itertools.combinations(masks, 2):
        product = float((masks[first] * masks[second]).mean())
        assert abs(product) < 5 * spread**2 / count**0.5, (
            f"the masks of {first} and {second} are correlated"
        )


def test_kept_values_are_scaled_so_that_the_mean_stays() -> None:
    dropout = CounterBasedDropout(PROBABILITY, "x")
    x = torch.ones(1, 200, 300)
    keys = dropout_row_keys(1, 200, 0)[0]
    with keyed_dropout(keys):
        dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert float(dropped.mean()) == pytest.approx(1, abs=5 * (0.3 / 0.7 / 60_000) ** 0.5)
    assert torch.equal(dropout(x), x), "outside a training row's layer, nothing is dropped"

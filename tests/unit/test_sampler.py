"""The sampler's answers are those of stock `generate()` for the same noise, whatever is answered
with them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.evaluation import row_attention, tiled_head
from canvastune.evaluation.generation import Question
from canvastune.evaluation.sampler import Answer, Sampler
from canvastune.evaluation.tiled_head import TiledHead
from canvastune.noise import AnswerNoise
from tests.support.small import CANVAS, VOCABULARY, WINDOW, stock_model

SLIDING_LAYERS = 3  # whose scales change the answers
NEVER = VOCABULARY  # no token has this id
# Most blocks of this model end by themselves, after 4 to 10 steps.
SETTINGS = SamplerSettings(
    steps=12,
    entropy_bound=3.0,
    t_min=0.01,
    t_max=0.05,
    stability_threshold=1,
    confidence_threshold=2.0,
)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    """Load a small stock model, which no test changes for good."""
    return stock_model(checkpoint).eval()


def questions(*lengths: int) -> list[Question]:
    generator = torch.Generator().manual_seed(1)
    return [
        Question(f"q{i}", "", torch.randint(5, VOCABULARY, (n,), generator=generator).tolist(), "")
        for i, n in enumerate(lengths)
    ]


# Shorter and longer than the window, and at its edges.
QUESTIONS = questions(5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5, 2, 2 * WINDOW, 9)


def sample(
    model: Any,
    asked: Sequence[Question],
    settings: SamplerSettings = SETTINGS,
    seed: int = 7,
    **changes: Any,
) -> dict[str, Answer]:
    options: dict[str, Any] = {"rows": 3, "max_new_tokens": 4 * CANVAS, "stops": [NEVER]} | changes
    noise = options.pop("noise", None) or AnswerNoise(seed, CANVAS, VOCABULARY)
    sampler = Sampler(model, settings, noise, tile_width=options.pop("tile_width", 100), **options)
    return {answer.question: answer for answer in sampler.answer(asked)}


def by_cumulative_probability(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulated = probabilities.double().cumsum(1)
    return torch.searchsorted(cumulated, (uniforms * cumulated[:, -1])[:, None], right=True)


class StockNoise:
    """Gives stock `generate` an `AnswerNoise`, for a batch of questions."""

    def __init__(self, noise: Any, asked: Sequence[Question]) -> None:
        self.noise, self.asked = noise, asked
        self.block, self.step, self.new_block = -1, 0, True

    def canvas(self) -> torch.Tensor:
        if self.new_block:
            self.block, self.step, self.new_block = self.block + 1, 0, False
        draw = self.noise.renoise if self.step else self.noise.start
        place = (self.block, self.step) if self.step else (self.block,)
        return torch.stack([draw(question.id, *place) for question in self.asked])

    def choose(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        self.step += 1
        uniforms = [self.noise.uniforms(one.id, self.block, self.step) for one in self.asked]
        return by_cumulative_probability(probabilities, torch.cat(uniforms))


def stock_answers(
    model: Any,
    asked: Sequence[Question],
    monkeypatch: pytest.MonkeyPatch,
    settings: SamplerSettings = SETTINGS,
    noise: Any = None,
    **changes: Any,
) -> list[tuple[list[int], float]]:
    """Return the new tokens of each question from one batch of stock `generate`, padded on the
    left, and its tokens per forward.
    """
    chance = StockNoise(noise or AnswerNoise(7, CANVAS, VOCABULARY), asked)
    width = max(len(question.tokens) for question in asked)
    ids = torch.tensor([[0] * (width - len(one.tokens)) + one.tokens for one in asked])
    mask = torch.tensor([[0] * (width - len(one.tokens)) + [1] * len(one.tokens) for one in asked])
    with monkeypatch.context() as patch:
        patch.setattr(EntropyBoundSampler, "initialize_canvas", lambda *_, **__: chance.canvas())
        patch.setattr(torch, "multinomial", chance.choose)
        prepared = type(model)._finalize_canvas

        def finalize(*given: Any, **named: Any) -> Any:
            chance.new_block = True
            return prepared(*given, **named)

        patch.setattr(type(model), "_finalize_canvas", staticmethod(finalize))
        found = model.generate(
            ids,
            attention_mask=mask,
            max_denoising_steps=settings.steps,
            sampler_config=EntropyBoundSamplerConfig(settings.entropy_bound),
            t_min=settings.t_min,
            t_max=settings.t_max,
            stability_threshold=settings.stability_threshold,
            confidence_threshold=settings.confidence_threshold,
            pad_token_id=None,
            **({"max_new_tokens": 4 * CANVAS, "eos_token_id": [NEVER]} | changes),
        )
    per_forward = found.tokens_per_forward.tolist()
    return list(zip(found.sequences[:, width:].tolist(), per_forward, strict=True))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda one: str(len(one.tokens)))
def test_an_answer_is_that_of_stock_generate(
    model: Any, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((tokens, per_forward),) = stock_answers(model, [question], monkeypatch)
    found = sample(model, [question])[question.id]
    assert found.tokens == tokens
    assert found.cut
    assert found.forwards < 4 * SETTINGS.steps, "no block ended by itself"
    assert len(tokens) / found.forwards == pytest.approx(per_forward)


@pytest.mark.parametrize(
    "changes",
    [
        {"stability_threshold": 0},
        {"stability_threshold": 2},
        {"confidence_threshold": 1e-9},
        {"confidence_threshold": 100.0},
        {"entropy_bound": 1e-6},
        {"entropy_bound": 1e6},
        {"steps": 1},
        {"t_min": 0.5, "t_max": 2.0},
    ],
    ids=str,
)
def test_every_setting_means_what_it_means_to_stock_generate(
    model: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)
    for question in QUESTIONS[3:5]:
        ((tokens, per_forward),) = stock_answers(model, [question], monkeypatch, settings)
        found = sample(model, [question], settings)[question.id]
        assert found.tokens == tokens
        assert len(tokens) / found.forwards == pytest.approx(per_forward)


def test_a_batch_of_stock_generate_gives_the_same_answers(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = stock_answers(model, QUESTIONS, monkeypatch)
    found = sample(model, QUESTIONS, rows=len(QUESTIONS))
    for question, (tokens, per_forward) in zip(QUESTIONS, batch, strict=True):
        assert found[question.id].tokens == tokens
        assert len(tokens) / found[question.id].forwards == pytest.approx(per_forward)


def test_an_answer_ends_at_the_first_stop_inside_any_block(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(model, QUESTIONS)
    for question in QUESTIONS[3:6]:
        said = whole[question.id].tokens
        # The token that first comes up latest, and one of the first block.
        first = {token: place for place, token in reversed(list(enumerate(said)))}
        for stop, place in (
            max(first.items(), key=lambda item: item[1]),
            (said[2], said.index(said[2])),
        ):
            found = sample(model, [question], stops=[NEVER, stop])[question.id]
            assert found.tokens == said[: place + 1]
            assert not found.cut
            ((tokens, _),) = stock_answers(
                model, [question], monkeypatch, eos_token_id=[NEVER, stop]
            )
            assert tokens[: place + 1] == found.tokens
            assert len(tokens) == CANVAS * (place // CANVAS + 1), "more blocks than stock denoises"


@pytest.mark.parametrize("limit", [1, CANVAS - 1, CANVAS, CANVAS + 1, 3 * CANVAS - 2])
def test_an_answer_is_cut_at_exactly_the_limit(model: Any, limit: int) -> None:
    whole = sample(model, QUESTIONS[:3])
    found = sample(model, QUESTIONS[:3], max_new_tokens=limit)
    for name, answer in found.items():
        assert answer.tokens == whole[name].tokens[:limit]
        assert answer.cut
    stop = whole["q0"].tokens[limit - 1]
    ended = sample(model, QUESTIONS[:1], max_new_tokens=limit, stops=[stop])["q0"]
    assert not ended.cut, "the last token that fits ends the answer"


@pytest.fixture(scope="module")
def alone(model: Any) -> tuple[set[int], dict[str, Answer]]:
    """Some stops, and each question's answer with them when it is asked by itself."""
    whole = [sample(model, [one], rows=1)[one.id] for one in QUESTIONS]
    stops = {answer.tokens[5 * index % CANVAS] for index, answer in enumerate(whole)}
    answers = {one.id: sample(model, [one], rows=1, stops=stops)[one.id] for one in QUESTIONS}
    assert len({len(answer.tokens) for answer in answers.values()}) > 2, "all end together"
    return stops, answers


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_an_answer_is_the_same_alone_in_any_batch_and_in_any_order(
    model: Any, alone: tuple[set[int], dict[str, Answer]], rows: int
) -> None:
    stops, expected = alone
    for order in (QUESTIONS, QUESTIONS[3:] + QUESTIONS[2::-1]):
        assert sample(model, order, rows=rows, stops=stops) == expected
    assert sample(model, QUESTIONS[5:], rows=rows, stops=stops) == {
        name: expected[name] for name in ("q5", "q6", "q7")
    }, "the rest of an interrupted evaluation is answered otherwise"


def test_another_seed_gives_other_answers(model: Any) -> None:
    settings = dataclasses.replace(SETTINGS, t_min=0.5, t_max=1.0)
    found, other = (sample(model, QUESTIONS[:2], settings, seed=seed) for seed in (1, 2))
    assert found["q0"].tokens != other["q0"].tokens
    assert found["q0"].tokens[:CANVAS] != found["q1"].tokens[:CANVAS]


@pytest.mark.parametrize("width", [7, VOCABULARY])
def test_tiles_of_the_vocabulary_change_nothing(model: Any, width: int) -> None:
    asked = QUESTIONS[2:5]
    assert sample(model, asked, tile_width=width) == sample(model, asked)


COLD = dataclasses.replace(SETTINGS, t_min=0.0005, t_max=0.002, steps=6)


def watch_tiles(monkeypatch: pytest.MonkeyPatch, see: Callable[..., object]) -> None:
    """Call `see` with the sums and the arguments of each tile that was added to them."""
    add = tiled_head.TileSums.add

    def watched(self: Any, *given: Any) -> None:
        add(self, *given)
        see(self, *given)

    monkeypatch.setattr(tiled_head.TileSums, "add", watched)


def test_tokens_without_probability_are_left_out_without_a_trace(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    watch_tiles(
        monkeypatch, lambda _, index, rows, logits, *rest: counted.append(len(logits) * (index > 0))
    )
    found = sample(model, QUESTIONS, COLD, tile_width=32)
    some = sum(counted)
    counted.clear()
    monkeypatch.setattr(tiled_head, "_NEGLIGIBLE", float("inf"))
    assert sample(model, QUESTIONS, COLD, tile_width=32) == found
    assert 0 < some < 0.7 * sum(counted), "no tile was left out, or all were"
    ((tokens, _),) = stock_answers(model, QUESTIONS[:1], monkeypatch, COLD)
    assert found["q0"].tokens == tokens


def test_no_exponential_underflows_and_none_is_missed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU an exponential that underflows takes 100 times as long."""
    least: list[float] = []
    watch_tiles(monkeypatch, lambda sums, *_: least.append(float(sums.weights.min())))
    found = sample(model, QUESTIONS, COLD, tile_width=32)
    assert min(least) > torch.finfo(torch.float32).tiny
    monkeypatch.setattr(tiled_head, "_LEAST", float("-inf"))
    assert sample(model, QUESTIONS, COLD, tile_width=32) == found
    assert min(least) == 0, "none was so far below the highest"


def test_encoder_and_decoder_may_scale_their_layers_differently(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = model.model.encoder.language_model.layers
    own = [layer.layer_scalar for layer in layers]
    before = sample(model, QUESTIONS)
    try:
        for index, layer in enumerate(layers):
            layer.layer_scalar = torch.tensor([0.5 + 0.2 * index])
        found = sample(model, QUESTIONS)
        stock = stock_answers(model, QUESTIONS, monkeypatch)
        for question, (tokens, _) in zip(QUESTIONS, stock, strict=True):
            assert found[question.id].tokens == tokens, question.id
    finally:
        for layer, scalar in zip(layers, own, strict=True):
            layer.layer_scalar = scalar
    assert found != before, "the scalars do not matter"
    assert sample(model, QUESTIONS) == before


def test_encoding_takes_no_pass_of_its_own(model: Any) -> None:
    passes: list[str] = []
    stacks = {"encoder": model.model.encoder.language_model, "decoder": model.model.decoder}
    handles = [
        stack.layers[0].register_forward_hook(lambda *_, name=name: passes.append(name))
        for name, stack in stacks.items()
    ]
    steps: list[str] = []
    handles.append(model.model.decoder.norm.register_forward_hook(lambda *_: steps.append("")))
    try:
        found = sample(model, QUESTIONS)
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(QUESTIONS)
    assert passes == ["decoder"] * len(steps)


class TorchNoise:
    """Noise from a generator, in the order in which stock `generate` draws for one question."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def start(self, *_: object) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (CANVAS,), generator=self.generator)

    renoise = start

    def uniforms(self, *_: object) -> torch.Tensor:
        return torch.rand(CANVAS, generator=self.generator, dtype=torch.float64)


def test_noise_may_come_from_a_generator_in_the_order_of_stock_generate(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = QUESTIONS[4]
    ((tokens, _),) = stock_answers(model, [question], monkeypatch, noise=TorchNoise())
    assert sample(model, [question], noise=TorchNoise())[question.id].tokens == tokens


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and not getattr(one, "_is_view", lambda: False)():
                self.elements = max(self.elements, one.numel())
        return out


def test_no_tensor_has_the_logits_of_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_attention, "_ROOM", 1)  # caches are not what is looked at
    asked = questions(*[2] * 128)
    settings = dataclasses.replace(SETTINGS, steps=2)
    with Largest() as largest:
        sample(model, asked, settings, tile_width=8, rows=128, max_new_tokens=CANVAS)
    assert 0 < largest.elements < 128 * CANVAS * VOCABULARY


def test_tokens_are_chosen_by_their_probability(model: Any) -> None:
    """Of 20 000 draws from one distribution, each token comes up as often as it should."""
    head = TiledHead(model, 37)
    count = 20_000
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(count, -1)
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found = head.statistics(hidden, torch.full((count,), 1.5), uniforms, want_soft=True)
        cap = model.final_logit_softcapping
        logits = torch.tanh(model.lm_head(hidden[0]) / cap) * cap / 1.5
        expected = logits.softmax(0)
        soft = expected @ model.lm_head.weight * model.model.decoder.embed_tokens.embed_scale
    shares = torch.bincount(found.chosen, minlength=VOCABULARY) / count
    deviation = ((shares - expected).abs() / (expected * (1 - expected) / count).sqrt()).max()
    assert deviation < 4.5, "a token comes up more or less often than its probability"
    entropy = float(torch.distributions.Categorical(logits=logits).entropy())
    assert float((found.entropy - entropy).abs().max()) < 1e-5
    assert int(found.likeliest[0]) == int(logits.argmax())
    assert float((found.soft[0] - soft).abs().max()) < 1e-4 * float(soft.abs().max())


def test_without_self_conditioning_a_step_knows_nothing_of_the_one_before(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = dataclasses.replace(SETTINGS, self_conditioning=False)
    given = []
    conditioning = model.model.decoder.self_conditioning
    handle = conditioning.register_forward_hook(lambda _, inputs, __: given.append(inputs[1]))
    try:
        plain = sample(model, QUESTIONS[:2], off)
        assert not any(bool(each.any()) for each in given)
        given.clear()
        usual = sample(model, QUESTIONS[:2])
        assert any(bool(each.any()) for each in given)
    finally:
        handle.remove()
    assert plain != usual


def test_a_place_is_taken_as_soon_as_its_answer_has_ended(model: Any) -> None:
    """Every step but the last ones has all places taken: no row is denoised after its end."""
    sizes: list[int] = []
    decoder = model.model.decoder
    handle = decoder.norm.register_forward_hook(
        lambda _, inputs, __: sizes.append(inputs[0].shape[1] // CANVAS)
    )
    try:
        found = sample(model, QUESTIONS * 3, rows=4)
    finally:
        handle.remove()
    assert sum(sizes) == 3 * sum(answer.forwards for answer in found.values())
    full = list(itertools.takewhile(lambda size: size == 4, sizes))
    longest = max(answer.forwards for answer in found.values())
    assert len(sizes) - len(full) <= longest


def test_logits_that_are_no_numbers_end_in_an_answer(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = model.model.decoder.norm
    monkeypatch.setattr(norm, "forward", lambda hidden: hidden * float("nan"))
    found = sample(model, QUESTIONS[:2])
    assert all(len(answer.tokens) == 4 * CANVAS for answer in found.values())


Run = Callable[..., dict[str, Answer]]


def test_the_model_attends_as_before_afterwards(model: Any) -> None:
    before = model.config.text_config._attn_implementation
    sample(model, QUESTIONS[:1])
    assert model.config.text_config._attn_implementation == before
    answers = Sampler(
        model, SETTINGS, AnswerNoise(0, CANVAS, VOCABULARY), rows=1, max_new_tokens=8, stops=[]
    ).answer(QUESTIONS)
    next(answers)
    assert model.config.text_config._attn_implementation == before, "changed between two answers"

"""The model is asked as a user would ask it: stock `generate`, prompts padded on the left, answers
that end where they end.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.denoising_trace import DenoisingTrace, select_frames
from canvastune.evaluation.generation import (
    Question,
    batch_questions,
    generate_answers,
    plain_text,
)
from canvastune.preparation.tokenizer import load_tokenizer
from tests.support.small import CANVAS, EOS, VOCABULARY, WINDOW, stock_model


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    """Load a small stock model, which no test changes for good."""
    return stock_model(checkpoint).eval()


class Numbers:
    """A fake tokenizer: a token's text is its number."""

    added_tokens_decoder: Mapping[int, Any] = {}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(token) for token in tokens)


NUMBERS: Any = Numbers()


class Logits:
    """A streamer that keeps the logits of every denoising step."""

    _takes_logits = True

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...

    def put_draft(self, logits: torch.Tensor) -> None:
        self.steps.append(logits.clone())


def test_prompts_padded_on_the_left_are_answered_as_if_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through stock `generate`, over several canvases, with prompts shorter and longer than the
    sliding window.
    """
    start = torch.randint(0, VOCABULARY, (1, CANVAS), generator=torch.Generator().manual_seed(7))

    def chosen(self: EntropyBoundSampler, batch_size: int, device: torch.device) -> torch.Tensor:
        return start.expand(batch_size, -1).clone()

    # Chance would fall differently for another batch size: take it out.
    monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", chosen)
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True),
    )
    settings: dict[str, Any] = {
        "max_new_tokens": 4 * CANVAS,
        "max_denoising_steps": 3,
        "confidence_threshold": 1e-9,
        "eos_token_id": VOCABULARY,  # no token has this id, so every canvas is generated
        "pad_token_id": 0,
    }
    lengths = [5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    ids = torch.stack(
        [torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]
    )
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    together = Logits()
    padded = model.generate(ids, attention_mask=mask, streamer=together, **settings).sequences[
        :, width:
    ]
    for row, prompt in enumerate(prompts):
        alone = Logits()
        expected = model.generate(prompt[None], streamer=alone, **settings).sequences[
            0, len(prompt) :
        ]
        assert len(alone.steps) == len(together.steps) == 4 * 3
        assert torch.equal(padded[row], expected), (
            f"padding changes the answer to a prompt of {len(prompt)} tokens"
        )
        for found, wanted in zip(together.steps, alone.steps, strict=True):
            assert float((found[row] - wanted[0]).abs().max()) < 1e-5 * float(wanted.abs().max())


class Parrot:
    """A fake model: `generate` returns the given answer to each prompt."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], stops: Any) -> None:
        self.answers = answers
        self.generation_config = type(
            "Generation", (), {"eos_token_id": stops, "pad_token_id": 0}
        )()
        self.config = type(
            "Config",
            (),
            {"text_config": type("Text", (), {"eos_token_id": EOS, "pad_token_id": 0})()},
        )()
        self.lm_head = torch.nn.Linear(1, 1)

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        said = [
            self.answers[tuple(row[keep.bool()].tolist())]
            for row, keep in zip(ids, attention_mask, strict=True)
        ]
        sequences = torch.cat(
            [ids, torch.tensor([answer + [0] * (12 - len(answer)) for answer in said])], dim=1
        )
        return type(
            "Output",
            (),
            {"sequences": sequences, "tokens_per_forward": torch.full((len(said),), 2.5)},
        )()


QUESTIONS = [
    Question(f"{number}", "", [number, *range(10, 9 + length)], "")
    for number, length in enumerate((7, 3, 9, 3, 5))
]


def test_an_answer_stands_beside_its_question_and_ends_at_the_end_of_its_turn() -> None:
    said = {
        tuple(question.tokens): [50 + place, 60, 106, 70]
        for place, question in enumerate(QUESTIONS)
    }
    batches = batch_questions(QUESTIONS, 2)
    assert [[len(question.tokens) for question in batch] for batch in batches] == [
        [3, 3],
        [5, 7],
        [9],
    ], "padding is computed for nothing"
    found = [
        generate_answers(Parrot(said, [EOS, 106]), batch, NUMBERS, EvaluateConfig(), 0, None)
        for batch in batches
    ]
    assert found[0]["texts"] | found[1]["texts"] | found[2]["texts"] == {
        f"{place}": f"{50 + place} 60" for place in range(5)
    }
    assert [each["tokens"] for each in found] == [
        6,
        6,
        3,
    ], "the token that ends an answer is generated too"
    assert [each["tokens_per_forward"] for each in found] == [5, 5, 2.5]


@pytest.mark.parametrize(
    "stops", [EOS, None]
)  # None: the generation config names none, the model's configuration does
def test_an_answer_ends_where_the_checkpoint_says(stops: int | None) -> None:
    found = generate_answers(
        Parrot({(1, 10, 11): [50, EOS, 60]}, stops),
        QUESTIONS[1:2],
        NUMBERS,
        EvaluateConfig(),
        0,
        None,
    )
    assert found["texts"] == {"1": "50"}


def test_an_answer_ends_where_prepared_responses_end() -> None:
    found = generate_answers(
        Parrot({(1, 10, 11): [50, 51, 60, EOS]}, EOS),
        QUESTIONS[1:2],
        NUMBERS,
        EvaluateConfig(),
        0,
        None,
        ends=[60],
    )
    assert (found["texts"], found["tokens"]) == ({"1": "50 51"}, 3)


def test_thinking_and_calls_stay_in_the_text(tiny_model: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_model).tokenizer
    ids = tokenizer.convert_tokens_to_ids
    thinks, answers, ends = ids("<|channel>"), ids("<channel|>"), ids("<turn|>")
    said = [ids("<mask>"), thinks, ids("7"), answers, ids("8"), ends]
    found = generate_answers(
        Parrot({(1, 10, 11): said}, [EOS, ends]),
        QUESTIONS[1:2],
        tokenizer,
        EvaluateConfig(),
        0,
        None,
    )
    (text,) = found["texts"].values()
    assert text.startswith("<|channel>")
    assert "<channel|>" in text
    assert "<mask>" not in text
    assert "<turn|>" not in text
    hidden = tokenizer.decode(said[2:5:2], skip_special_tokens=True)
    assert text.replace("<|channel>", "").replace("<channel|>", "").strip() == hidden.strip()


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ([{"role": "user", "content": "How many?"}], "How many?"),
        (
            [{"role": "system", "content": "Count."}, {"role": "user", "content": "How many?"}],
            "system: Count.\nuser: How many?",
        ),
        (
            [
                {"role": "user", "content": "Weather in Bonn?"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning": "I need the tool.",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "weather", "arguments": {"city": "Köln"}},
                        }
                    ],
                },
                {"role": "tool", "name": "weather", "content": "rain"},
            ],
            "user: Weather in Bonn?\n"
            "assistant: (thinking) I need the tool.\n"
            '(call) weather({"city": "Köln"})\n'
            "tool weather: rain",
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                }
            ],
            "a\nb",
        ),
    ],
)
def test_a_prompt_is_shown_with_its_calls_and_responses(
    prompt: list[dict[str, Any]], shown: str
) -> None:
    assert plain_text(prompt) == shown


def test_generation_stops_when_every_answer_has_ended(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    handle = model.model.decoder.register_forward_hook(lambda *_: steps.append(1))
    settings = EvaluateConfig(max_new_tokens=4 * CANVAS, max_denoising_steps=3)
    try:
        monkeypatch.setattr(
            model.generation_config, "eos_token_id", [VOCABULARY]
        )  # no token has this id
        whole = generate_answers(model, QUESTIONS[:3], NUMBERS, settings, 0, None)
        assert (whole["tokens"], len(steps)) == (3 * 4 * CANVAS, 4 * 3)
        steps.clear()
        monkeypatch.setattr(
            model.generation_config, "eos_token_id", list(range(VOCABULARY))
        )  # every token ends an answer
        ended = generate_answers(model, QUESTIONS[:3], NUMBERS, settings, 0, None)
        assert (ended["tokens"], len(steps)) == (
            3,
            3,
        ), "the model continues after the end of all answers"
    finally:
        handle.remove()


def test_answers_follow_from_the_seed_and_the_rows_of_the_batch(model: Any) -> None:
    settings = EvaluateConfig(max_new_tokens=CANVAS, max_denoising_steps=2)

    def texts(batch: Sequence[Question], seed: int = 0) -> dict[str, str]:
        torch.manual_seed(len(batch))  # what came before must not matter
        return dict(generate_answers(model, batch, NUMBERS, settings, seed, None)["texts"])

    assert texts(QUESTIONS[:2]) == texts(QUESTIONS[:2])
    assert texts(QUESTIONS[:2]) != texts(QUESTIONS[:2], seed=1)
    before = torch.random.get_rng_state()
    generate_answers(model, QUESTIONS[:2], NUMBERS, settings, 0, None)
    assert torch.equal(before, torch.random.get_rng_state()), (
        "an evaluation disturbs the draws of its caller"
    )


def test_a_batch_that_does_not_fit_names_the_setting(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(UserError, match=r"evaluate\.batch_size: .* 2 rows"):
        generate_answers(model, QUESTIONS[:2], NUMBERS, EvaluateConfig(), 0, None)


# --- the denoising trace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "shown"), [(1, 1), (3, 3), (6, 4)])
def test_the_last_frame_of_each_block_is_the_answer(
    model: Any, monkeypatch: pytest.MonkeyPatch, blocks: int, shown: int
) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", [VOCABULARY])
    settings = EvaluateConfig(max_new_tokens=blocks * CANVAS, max_denoising_steps=11)
    found = generate_answers(model, QUESTIONS[:3], NUMBERS, settings, 0, QUESTIONS[1].id)
    frames, said = found["trace"], found["texts"][QUESTIONS[1].id].split()
    assert len(said) == blocks * CANVAS
    assert [frame["block"] for frame in frames] == sorted(frame["block"] for frame in frames)
    for block in range(shown):
        own = [frame for frame in frames if frame["block"] == block]
        steps = [frame["step"] for frame in own]
        assert 2 <= len(own) <= 8
        assert steps == sorted(set(steps))
        assert steps[0] == 0
        assert [text for text, _ in own[-1]["tokens"]] == said[
            block * CANVAS : (block + 1) * CANVAS
        ]
        assert all(changed == 1 for _, changed in own[0]["tokens"])
        for earlier, later in itertools.pairwise(own):
            for (before, _), (after, changed) in zip(
                earlier["tokens"], later["tokens"], strict=True
            ):
                assert changed == (before != after)
    assert max(frame["block"] for frame in frames) == shown - 1


def test_the_trace_ends_with_the_answer() -> None:
    drafts = DenoisingTrace(1)
    drafts.put(torch.zeros(2, 5))
    for block in (
        [[1, 2, 3], [1, 5, 3], [4, 5, 3]],
        [[7, 8, 9], [7, 8, 9], [7, 8, 9]],
        [[0, 0, 0]],
    ):
        for canvas in block:
            drafts.put_draft(torch.tensor([[9, 9, 9], canvas]))
        drafts.put(torch.zeros(2, 3))
    assert select_frames(drafts, 5, NUMBERS) == [
        {"block": 0, "step": 0, "tokens": [["1", 1], ["2", 1], ["3", 1]]},
        {"block": 0, "step": 1, "tokens": [["1", 0], ["5", 1], ["3", 0]]},
        {"block": 0, "step": 2, "tokens": [["4", 1], ["5", 0], ["3", 0]]},
        {
            "block": 1,
            "step": 0,
            "tokens": [["7", 1], ["8", 1]],
        },  # nothing changed any more; what follows the end is left out
    ]

"""The model is asked as a user would ask it, and answers end where they end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.denoising_trace import longest_trace, select_frames
from canvastune.evaluation.generation import (
    Answering,
    Question,
    answering,
    generate_answers,
    plain_text,
)
from canvastune.evaluation.sampler import Answer, Sampler
from canvastune.preparation.tokenizer import load_transformers_tokenizer
from tests.support.small import CANVAS, EOS, VOCABULARY, model_config, stock_model


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


HOW = Answering(
    SamplerSettings(
        steps=3,
        entropy_bound=0.1,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
    ),
    max_new_tokens=4 * CANVAS,
    stops=(VOCABULARY,),  # no token has this id
)


def ask(
    model: Any, questions: Sequence[Question], tokenizer: Any = NUMBERS, **changes: Any
) -> dict[str, dict[str, Any]]:
    options: dict[str, Any] = {"seed": 0, "rows": 2, "traced": ()}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    how = dataclasses.replace(HOW, **changes)
    return dict(generate_answers(model, questions, tokenizer, how, **options))


def say(monkeypatch: pytest.MonkeyPatch, tokens: list[int], cut: bool = False) -> None:
    """Let every answer be these tokens."""

    def answer(self: Sampler, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            yield Answer(question.id, tokens, forwards=2, cut=cut, drafts=[])

    monkeypatch.setattr(Sampler, "answer", answer)


QUESTIONS = [
    Question(f"{number}", "", [number, *range(10, 9 + length)], "")
    for number, length in enumerate((7, 3, 9, 3, 5))
]


def test_an_answer_ends_before_the_token_that_ends_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [50, 60, 106])
    found = ask(model, QUESTIONS, stops=(EOS, 106))
    assert found.keys() == {question.id for question in QUESTIONS}
    for answer in found.values():
        assert answer["text"] == "50 60"
        assert answer["tokens"] == 3, "the token that ends an answer is generated too"


@pytest.mark.parametrize(
    ("named", "stops"), [([EOS, 106], (EOS, 60, 106)), (7, (7, 60)), (None, (EOS, 60))]
)  # None: the generation config names none, the model's configuration does
def test_an_answer_ends_where_checkpoint_and_prepared_responses_say(
    named: Any, stops: tuple[int, ...], tmp_path: Path
) -> None:
    settings = {"max_denoising_steps": 9}
    if named is not None:
        settings["eos_token_id"] = named
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    how = answering(tmp_path, model_config(), EvaluateConfig(), ends=[60])
    assert how.stops == stops
    assert how.sampler.steps == 9


def test_thinking_and_calls_stay_in_the_text(
    model: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = load_transformers_tokenizer(tiny_model)
    ids = tokenizer.convert_tokens_to_ids
    thinks, answers, ends = ids("<|channel>"), ids("<channel|>"), ids("<turn|>")
    said = [ids("<mask>"), thinks, ids("7"), answers, ids("8"), ends]
    say(monkeypatch, said)
    found = ask(model, QUESTIONS[1:2], tokenizer, stops=(EOS, ends))
    ((text),) = [answer["text"] for answer in found.values()]
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


def test_the_time_of_the_answers_adds_up_and_a_cut_is_said(model: Any) -> None:
    started = time.perf_counter()
    found = ask(model, QUESTIONS, max_new_tokens=CANVAS + 3)
    seconds = time.perf_counter() - started
    assert 0.9 * seconds < sum(answer["seconds"] for answer in found.values()) <= seconds
    assert all(answer["cut"] and answer["tokens"] == CANVAS + 3 for answer in found.values())
    assert all(len(answer["text"].split()) == CANVAS + 3 for answer in found.values())
    every = tuple(range(VOCABULARY))  # every token ends an answer
    ended = ask(model, QUESTIONS, stops=every)
    assert all((one["tokens"], one["cut"], one["text"]) == (1, False, "") for one in ended.values())


def test_answers_follow_from_the_seed_alone(model: Any) -> None:
    def texts(seed: int = 0) -> list[str]:
        torch.manual_seed(seed + 5)  # what came before must not matter
        return [answer["text"] for answer in ask(model, QUESTIONS[:2], seed=seed).values()]

    before = torch.random.get_rng_state()
    ask(model, QUESTIONS[:1])
    assert torch.equal(before, torch.random.get_rng_state()), (
        "an evaluation disturbs the draws of its caller"
    )
    assert texts() == texts()
    assert texts() != texts(seed=1)


def test_rows_that_do_not_fit_name_the_setting(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Sampler, "_denoise", full)
    with pytest.raises(UserError, match=r"evaluate\.batch_size: .* 2 rows"):
        ask(model, QUESTIONS[:3])


# --- the denoising trace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "shown"), [(1, 1), (3, 3), (6, 4)])
def test_the_last_frame_of_each_block_is_the_answer(model: Any, blocks: int, shown: int) -> None:
    sampler = dataclasses.replace(HOW.sampler, steps=11)
    name = QUESTIONS[1].id
    limit = blocks * CANVAS
    asked = QUESTIONS[:3]
    found = ask(model, asked, sampler=sampler, max_new_tokens=limit, traced=[name], rows=3)
    frames, said = found[name]["trace"], found[name]["text"].split()
    assert found[QUESTIONS[0].id]["trace"] is None
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


def test_the_answer_that_changes_most_is_the_one_to_show() -> None:
    at_once = select_frames([[[1, 2, 3]]], 3, NUMBERS)
    slowly = select_frames([[[1, 2, 3], [4, 2, 3], [4, 5, 3]]], 3, NUMBERS)
    assert longest_trace({"a": at_once, "b": slowly, "c": at_once}) == "b"
    tuned = {"a": at_once, "b": at_once}
    assert longest_trace(tuned, {"a": at_once, "b": slowly}) == "b", (
        "the base decides between equals"
    )
    assert longest_trace({"a": [], "b": []}) == "a"


def test_the_trace_ends_with_the_answer() -> None:
    drafts = [
        [[1, 2, 3], [1, 5, 3], [4, 5, 3]],
        [[7, 8, 9], [7, 8, 9], [7, 8, 9]],
        [[0, 0, 0]],
    ]
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

"""Answers before and after: the model is asked as a user would ask it, and the counts are those of the answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

from canvastune import evaluate as step
from canvastune.config import RunConfig, parse_config
from canvastune.data.prepare import prepare_data
from canvastune.data.tokenizer import load_tokenizer
from canvastune.errors import UserError
from canvastune.evaluate import Answers, Question, evaluate, find_answer
from canvastune.model.checkpoint_files import CheckpointReader, CheckpointWriter, copy_side_files
from canvastune.model.stock import load_stock
from canvastune.tiny import write_problems
from tests.small import CANVAS, VOCABULARY, WINDOW, stock_model, write_checkpoint

GSM8K = re.compile(r"####\s*(-?[\d.,]+)")


def recipe(problems: Path, **evaluation: Any) -> RunConfig:
    settings = {"rows": 6, "batch_size": 4, "max_new_tokens": 16, "max_denoising_steps": 2} | evaluation
    data = {"source": str(problems), "seq_length": 96, "validation_fraction": 0.3}
    return parse_config({"name": "test", "data": data, "evaluate": settings})


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_problems(path, "change", 60, seed=0)
    return path


@pytest.fixture(scope="module")
def prepared(problems: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_data(recipe(problems), tiny_model, out)
    return out


class Logits:
    """A streamer that keeps what every denoising step thought."""

    _takes_logits = True

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...

    def put_draft(self, logits: torch.Tensor) -> None:
        self.steps.append(logits.clone())


def test_prompts_padded_on_the_left_are_answered_as_if_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through stock `generate`, over several canvases, with prompts shorter and longer than the sliding window."""
    write_checkpoint(tmp_path)
    model: Any = stock_model(tmp_path)
    start = torch.randint(0, VOCABULARY, (1, CANVAS), generator=torch.Generator().manual_seed(7))

    def chosen(self: EntropyBoundSampler, batch_size: int, device: torch.device) -> torch.Tensor:
        return start.expand(batch_size, -1).clone()

    # Chance would fall differently for another batch size: take it out.
    monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", chosen)
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True))
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
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    together = Logits()
    padded = model.generate(ids, attention_mask=mask, streamer=together, **settings).sequences[:, width:]
    for row, prompt in enumerate(prompts):
        alone = Logits()
        expected = model.generate(prompt[None], streamer=alone, **settings).sequences[0, len(prompt) :]
        assert len(alone.steps) == len(together.steps) == 4 * 3
        assert torch.equal(padded[row], expected), f"padding changes the answer to a prompt of {len(prompt)} tokens"
        for found, wanted in zip(together.steps, alone.steps, strict=True):
            assert float((found[row] - wanted[0]).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_prompt_is_the_prefix_that_was_trained_on(prepared: Path, tiny_model: Path) -> None:
    questions = step._questions(prepared, load_tokenizer(tiny_model).tokenizer, 6)
    rows: Any = load_from_disk(str(prepared / "validation"))
    prefixes = {row["id"]: row["input_ids"][: row["prefix_length"]] for row in rows}
    assert len(questions) == 6
    for question in questions:
        assert question.tokens == prefixes[question.id]


def test_rows_are_chosen_by_content_and_not_by_their_place(prepared: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows: Any = load_from_disk(str(prepared / "validation"))
    backwards: Dataset = rows.select(range(len(rows) - 1, -1, -1))
    backwards.save_to_disk(str(tmp_path / "validation"))
    tokenizer = load_tokenizer(tiny_model).tokenizer
    assert step._questions(prepared, tokenizer, 5) == step._questions(tmp_path, tokenizer, 5)


@pytest.fixture(scope="module")
def evaluated(problems: Path, prepared: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "evaluation"
    evaluate(recipe(problems), prepared, tiny_model, tiny_model, out)
    return out


def test_chance_is_the_same_before_and_after(evaluated: Path) -> None:
    answers = [json.loads(line) for line in (evaluated / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert all(answer["before"] == answer["after"] for answer in answers), "one model gave two answers: the draws differ"
    assert len({answer["before"] for answer in answers}) > 1


def test_every_answer_stands_beside_its_question_and_reference(evaluated: Path, prepared: Path) -> None:
    answers = [json.loads(line) for line in (evaluated / "answers.jsonl").read_text().splitlines()]
    rows: Any = load_from_disk(str(prepared / "validation"))
    held_out = {row["id"]: row for row in rows}
    for answer in answers:
        row = held_out[answer["id"]]
        assert answer["prompt"] == json.loads(row["prompt"])[-1]["content"]
        assert answer["reference"] == row["answer"]
        assert answer.keys() == {"id", "prompt", "reference", "before", "after", "correct_before", "correct_after"}
    result = json.loads((evaluated / "evaluation.json").read_text())
    assert (result["rows"], result["scored"]) == (6, 6)
    for side in ("before", "after"):
        assert result[f"correct_{side}"] == sum(answer[f"correct_{side}"] for answer in answers)
        assert 0 < result[f"tokens_{side}"] <= 6 * 16
        assert result[f"tokens_per_second_{side}"] == pytest.approx(result[f"tokens_{side}"] / result[f"seconds_{side}"])
        assert 0 < result[f"tokens_per_forward_{side}"] <= 16
    assert {file.name for file in evaluated.iterdir()} == {"evaluation.json", "answers.jsonl", "config.yaml", "provenance.json"}


class Parrot:
    """Stands for a model: `generate` gives each prompt the answer that was laid out for it."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], stops: Any) -> None:
        self.answers = answers
        self.generation_config = type("Generation", (), {"eos_token_id": stops, "pad_token_id": 0})()
        self.config = type("Config", (), {"text_config": type("Text", (), {"eos_token_id": 1, "pad_token_id": 0})()})()
        self.lm_head = torch.nn.Linear(1, 1)
        self.widths: list[int] = []

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        said = [self.answers[tuple(row[keep.bool()].tolist())] for row, keep in zip(ids, attention_mask, strict=True)]
        self.widths.append(ids.shape[1])
        sequences = torch.cat([ids, torch.tensor([answer + [0] * (12 - len(answer)) for answer in said])], dim=1)
        return type("Output", (), {"sequences": sequences, "tokens_per_forward": torch.full((len(said),), 2.5)})()


def ask(prepared: Path, tiny_model: Path, problems: Path, answer: str, stops: Any = (1, 106)) -> tuple[Answers, Sequence[Question], Parrot]:
    tokenizer = load_tokenizer(tiny_model).tokenizer
    questions = step._questions(prepared, tokenizer, 6)
    said = {tuple(q.tokens): tokenizer.encode(f"{n}{answer}", add_special_tokens=False) for n, q in enumerate(questions)}
    parrot = Parrot(said, list(stops) if isinstance(stops, tuple) else stops)
    return step._ask(parrot, questions, tokenizer, recipe(problems), "before"), questions, parrot


def test_answers_come_back_in_the_order_of_their_questions(prepared: Path, tiny_model: Path, problems: Path) -> None:
    answers, _, parrot = ask(prepared, tiny_model, problems, "=7<turn|>8")
    assert answers.texts == [f"{n}=7" for n in range(6)], "an answer ends at the end of its turn, and stands beside its own question"
    assert answers.tokens == 6 * 4
    assert answers.tokens_per_forward == 2.5
    assert parrot.widths == sorted(parrot.widths)
    assert len(parrot.widths) == 2


def test_answer_ends_where_the_checkpoint_says(prepared: Path, tiny_model: Path, problems: Path) -> None:
    for stops in (1, None):  # None: the generation config names none, the model's configuration does
        answers, _, _ = ask(prepared, tiny_model, problems, "=<eos>9", stops)
        assert answers.texts[0] == "0="


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("16+2=18\n#### 18.", "18"),
        ("#### 1,234", "1234"),
        ("#### 5 no\n#### -3", "-3"),
        ("####12.5", "12.5"),
        ("seventy-two", None),
        ("", None),
    ],
)
def test_answer_is_the_last_match_as_gsm8k_writes_numbers(text: str, answer: str | None) -> None:
    assert find_answer(GSM8K, text) == answer


def test_dollar_sign_is_not_part_of_an_answer() -> None:
    assert find_answer(re.compile("is (.+)"), "It is $1,000.") == "1000"


def test_counts_are_those_of_the_answers(
    prepared: Path, tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five right after; two before, one of which is lost."""
    questions = step._questions(prepared, load_tokenizer(tiny_model).tokenizer, 6)
    right = [question.reference for question in questions]
    before = [right[0], right[1], "#### 999", "", right[4] + "\n#### 999", "999"]
    after = [right[0], "#### 999", right[2], right[3], right[4], right[5]]
    said = iter([Answers(before, 60, 2.0, 1.5), Answers(after, 30, 0.5, 4.0)])
    monkeypatch.setattr(step, "_ask", lambda *_: next(said))
    result = evaluate(recipe(problems), prepared, tiny_model, tiny_model, tmp_path / "out")
    assert (result["correct_before"], result["correct_after"], result["scored"]) == (2, 5, 6)
    assert (result["exact_match_before"], result["exact_match_after"]) == (2 / 6, 5 / 6)
    assert (result["gained"], result["lost"]) == (4, 1)
    assert (result["tokens_per_second_before"], result["tokens_per_second_after"]) == (30, 60)
    assert (result["tokens_per_forward_before"], result["tokens_per_forward_after"]) == (1.5, 4)


def test_rows_whose_reference_has_no_answer_are_not_scored(
    prepared: Path, tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Any = load_from_disk(str(prepared / "validation"))
    unanswerable = min(rows["id"])
    rows.map(lambda row: {"answer": "I do not know" if row["id"] == unanswerable else row["answer"]}).save_to_disk(
        str(tmp_path / "validation")
    )
    monkeypatch.setattr(step, "_ask", lambda *_: Answers(["I do not know"] * 6, 6, 1.0, 1.0))
    result = evaluate(recipe(problems), tmp_path, tiny_model, tiny_model, tmp_path / "out")
    assert (result["rows"], result["scored"], result["correct_after"]) == (6, 5, 0)
    first = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert (first["id"], first["correct_before"], first["correct_after"]) == (unanswerable, None, None)


def test_pattern_that_finds_no_answer_is_refused_before_a_model_is_loaded(
    prepared: Path, tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "load_stock", lambda *_: pytest.fail("a model was loaded"))
    refused = {"(": "not a regular expression", "####": "no group", "is exactly (never)": "matches none of the 6 references"}
    for pattern, said in refused.items():
        with pytest.raises(UserError, match=r"evaluate\.answer_pattern") as error:
            evaluate(recipe(problems, answer_pattern=pattern), prepared, tiny_model, tiny_model, tmp_path / "out")
        assert said in str(error.value)
        assert not list(tmp_path.iterdir())


def test_some_answers_are_shown_at_once_before_and_after(
    prepared: Path, tiny_model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(recipe(problems, rows=2), prepared, tiny_model, tiny_model, tmp_path / "out")
    said = capsys.readouterr().err
    for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        assert repr(answer["prompt"]) in said, "the person at the terminal sees no question"
        assert f"after {answer['after']!r}"[:90] in said, "the person at the terminal sees no answer"


def test_folder_that_is_no_prepared_data_set_is_refused(tiny_model: Path, problems: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data set") as error:
        evaluate(recipe(problems), tmp_path / "nothing", tiny_model, tiny_model, tmp_path / "out")
    assert str(tmp_path / "nothing") in str(error.value)


def test_checkpoint_that_lacks_a_value_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    lost = "model.decoder.layers.1.mlp.up_proj.weight"
    whole = CheckpointReader(tiny_model)
    copy_side_files(tiny_model, tmp_path)
    with CheckpointWriter(tmp_path, {name: spec for name, spec in whole.specs().items() if name != lost}) as writer:
        for name in set(whole.names()) - {lost}:
            writer.write(name, whole.get(name))
    with pytest.raises(UserError, match=r"missing keys.*layers\.1\.mlp\.up_proj") as error:
        load_stock(tmp_path, torch.device("cpu"))
    assert str(tmp_path) in str(error.value)

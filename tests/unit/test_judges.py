"""What each judge calls right, and what becomes of rows that none can judge."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot
from sacrebleu.metrics.chrf import CHRF

from canvastune.config import RunConfig, parse_config
from canvastune.config.schema import EvaluateConfig
from canvastune.errors import UserError
from canvastune.evaluation.figures import (
    JudgedRow,
    compared,
    judge_row,
    measure,
    side_scores,
    slices,
    with_judgement,
)
from canvastune.evaluation.generation import select_questions
from canvastune.evaluation.judges import Judging, Score, load_judge
from canvastune.evaluation.preflight import describe_answers, describe_scoring
from canvastune.evaluation.run import judging_of
from canvastune.evaluation.scoring import (
    mcnemar,
    mean_interval,
    paired_test,
    share_interval,
    sign_flip,
    too_few,
    wilson,
)
from canvastune.evaluation.tool_calls import InvalidCall, read_tool_calls
from canvastune.preparation.prepare import prepare_data
from canvastune.preparation.tokenizer import load_transformers_tokenizer
from pipelines.submit import refuse_local_paths

CALL = '<|tool_call>call:count{text:<|"|>a, b: {c}<|"|>,times:3}<tool_call|>'


def judged(name: str, reference: str, answer: str, prompt: str = "?") -> float | None:
    """Return the score of one answer; None if the judge cannot judge by the reference."""
    row = {"source": None, "prompt": prompt, "reference": reference, "before": answer, "after": ""}
    settings = EvaluateConfig(judge=name)
    result = judge_row(Judging(settings, [(None, reference)]), row)
    return result.mean("before") if result.scored else None


@pytest.mark.parametrize(
    ("name", "reference", "right", "wrong", "unscored"),
    [
        (
            "number",
            "She has 18 apples.",
            ["It is $18.00!", "9 + 9 = 18"],
            ["18-20", "", "19"],
            "no",
        ),
        ("text", "Paris", ["Paris", " Paris\n"], ["paris", "Paris.", ""], ""),
        (
            "json",
            '{"a": [1, true, null], "b": {"c": "x"}}',
            [
                '{"b":{"c":"x"},"a":[1.0,true,null]}',
                'Here:\n```json\n{"a": [1, true, null], "b": {"c": "x"}}\n```\nDone.',
            ],
            ['{"a": [1, 1, null], "b": {"c": "x"}}', '{"a": [1, true, null]}', "{", "[]", "1"],
            "18",
        ),
        (
            "tool_call",
            CALL,
            [
                f"<|channel>thought\nhm<channel|>{CALL}",
                '<|tool_call>call:count{times:3.0,text:<|"|>a, b: {c}<|"|>}<tool_call|>',
            ],
            [
                CALL + CALL,
                CALL.replace("count", "sum"),
                CALL.replace(":3", ":4"),
                CALL.removesuffix("<tool_call|>"),
                "count(3)",
            ],
            "I call nothing.",
        ),
        (
            r"pattern:answer is (\w+)",
            "The answer is B",
            ["answer is A, no: answer is B"],
            ["B"],
            "B",
        ),
    ],
)
def test_a_judge_says_right_wrong_or_nothing(
    name: str, reference: str, right: list[str], wrong: list[str], unscored: str
) -> None:
    for answer in (reference, *right):
        assert judged(name, reference, answer) == 1, answer
    for answer in wrong:
        assert judged(name, reference, answer) == 0, answer
    assert judged(name, unscored, unscored) is None


def test_parallel_calls_are_compared_in_any_order() -> None:
    other = '<|tool_call>call:sum{of:[1,2.5,-3e2],deep:{a:null,b:true,c:<|"|><|"|>}}<tool_call|>'
    assert judged("tool_call", CALL + other, other + CALL) == 1
    assert judged("tool_call", CALL + other, CALL) == 0
    assert read_tool_calls(f"text {other} text") == [
        ("sum", {"of": [1, 2.5, -300.0], "deep": {"a": None, "b": True, "c": ""}})
    ]


def test_calls_of_the_released_template_are_read_back(tiny_model: Path) -> None:
    """The template's own way to write arguments, for random ones, and no cut of them."""
    draw = random.Random(0)
    tokenizer: Any = load_transformers_tokenizer(tiny_model)

    def value(depth: int = 0) -> Any:
        kinds: list[Any] = ["a, b", "", "{x: 1}", 3, -2.5, True, False]
        if depth < 3:
            kinds += [[value(depth + 1) for _ in range(2)], {"k e": value(depth + 1), "l": 1}]
        return draw.choice(kinds)

    for _ in range(50):
        arguments = {name: value() for name in ("one", "two")}
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        text = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "", "tool_calls": [call | {"id": "1"}]},
            ],
            tokenize=False,
        )
        assert read_tool_calls(text) == [("f", arguments)], text
    written = text[text.index("<|tool_call>") : text.index("<tool_call|>") + 5]
    for end in range(len("<|tool_call>call:"), len(written)):
        with pytest.raises(InvalidCall):
            read_tool_calls(written[:end])


def test_chrf_is_that_of_the_library() -> None:
    answer, reference = "You can return it in 30 days.", "Returns are free within 30 days."
    expected = CHRF().sentence_score(answer, [reference]).score / 100
    assert judged("chrf", reference, answer) == pytest.approx(expected)
    assert 0 < expected < 1
    assert judged("chrf", reference, reference) == 1
    assert judged("chrf", reference, "") == 0


def test_a_function_of_ones_own_judges(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import numpy as np\n"
        "def grade(answer, reference, prompt):\n"
        "    if prompt == 'skip': return None\n"
        "    if prompt == 'broken': raise RuntimeError('no network')\n"
        "    if prompt == 'percent': return 40\n"
        "    if prompt == 'exact': return np.bool_(answer == reference)\n"
        "    return np.float32(0.5)\n"
    )
    name = f"python:{file}:grade"
    assert judged(name, "a", "b") == 0.5
    assert judged(name, "a", "a", "exact") == 1
    assert judged(name, "a", "b", "skip") is None
    for prompt, reason in (("broken", "RuntimeError: no network"), ("percent", "found 40")):
        with pytest.raises(UserError, match=reason) as error:
            judged(name, "a", "b", prompt)
        assert name in str(error.value)
        assert error.value.hint
    settings = EvaluateConfig()
    (judge,) = [load_judge(name, settings)]
    file.write_text(file.read_text() + "# another version\n")
    assert load_judge(name, settings).name != judge.name, "two versions count as the same judge"
    assert judge.name.startswith(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, re.escape(os.strerror(errno.ENOENT))),
        ("grade = 3", "grade = 3, .*function"),
        ("def other(): pass", "AttributeError"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(
    tmp_path: Path, code: str | None, message: str
) -> None:
    file = tmp_path / "own.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(UserError, match=message):
        load_judge(f"python:{file}:grade", EvaluateConfig())


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("rouge", r"'rouge', .*: number, text, json, tool_call, chrf, model, pattern, "),
        ("number:3", "'number:3'"),
        ("python:grade", r"'python:grade', .*python:FILE\.py:FUNCTION"),
        ("pattern:(", r"'\('.*\bunterminated\b"),
        ("pattern:x", r"\bgroup\b.*'x'"),
    ],
)
def test_a_judge_that_does_not_exist_is_refused(judge: str, message: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.judge.*" + message):
        recipe("a.jsonl", judge=["text", judge])


def recipe(*sources: str, **evaluate: Any) -> RunConfig:
    data: dict[str, Any] = {"source": sources[0], "seq_length": 96, "validation_fraction": 0.5}
    if len(sources) > 1:
        del data["source"]
        data["mixture"] = [{"source": source} for source in sources]
    return parse_config({"name": "judges", "data": data, "evaluate": evaluate})


def test_judges_of_a_source_that_is_not_there_are_refused() -> None:
    judges = {"c.jsonl": "text"}
    with pytest.raises(UserError, match=r"found 'c\.jsonl'") as error:
        recipe("a.jsonl", "b.jsonl", judges=judges)
    assert "a.jsonl, b.jsonl" in error.value.hint
    config = recipe("a.jsonl", "b.jsonl", judges={"b.jsonl": "text"}, judge="chrf")
    assert config.evaluate.judge == ("chrf",)
    assert config.evaluate.judges == {"b.jsonl": ("text",)}
    again = parse_config(config.model_dump(mode="json"))
    assert again == config


# --- rows


def test_the_first_judge_that_can_judge_by_a_reference_does() -> None:
    settings = EvaluateConfig(judge=("tool_call", "chrf"), judges={"n": ("number",)})
    references = [(None, CALL), (None, "prose"), ("n", "7"), ("n", "none")]
    judging = Judging(settings, references)
    found = [judging.find(*each) for each in references]
    assert [each and each[0].name for each in found] == ["tool_call", "chrf", "number", None]
    assert judging.names == ["tool_call", "chrf", "number"]


def test_text_has_a_verdict_without_a_setting() -> None:
    """The default: the pattern where it matches a reference of the source, else chrF."""
    references = [("math", "so #### 3"), ("math", "unclear"), ("chat", "Hello."), ("chat", "Yes")]
    judging = Judging(EvaluateConfig(), references)
    found = [judging.find(*each) for each in references]
    assert [each and each[0].name for each in found] == ["pattern", None, "chrf", "chrf"]
    off = Judging(EvaluateConfig(judge=()), references)
    assert [off.find(*each) for each in references] == [None] * 4
    assert off.names == []


def row(before: Sequence[float], after: Sequence[float], **about: Any) -> JudgedRow:
    exact = set(before) | set(after) <= {0, 1}
    scores = {
        side: tuple(Score(value, exact, bool(value) if exact else None) for value in values)
        for side, values in (("before", before), ("after", after))
    }
    found: dict[str, Any] = {
        "source": None,
        "columns": {},
        "reference_tokens": 10,
        "judge": "pattern" if exact else "chrf",
    }
    return JudgedRow(scores=scores, **found | about)


def test_unscored_rows_are_counted_and_change_no_figure() -> None:
    rows = [row([0], [1]), row([1], [1]), row([0], [0])]
    more = [*rows, row([], [], judge=None)]
    assert side_scores(more, "after") == side_scores(rows, "after")
    assert compared(more) == compared(rows)
    assert compared([more[-1]])["verdict"] is None
    assert side_scores([more[-1]], "after")["score"] is None


def test_scores_between_right_and_wrong_have_no_exact_match() -> None:
    exact, graded = [row([0], [1]), row([1], [1])], [row([0.25], [0.75]), row([0.5], [0.25])]
    assert (measure(exact), measure(graded), measure(exact + graded)) == (
        "exact match",
        "chrF",
        "score",
    )
    found = side_scores(exact + graded, "after")
    assert found["score"] == pytest.approx((1 + 1 + 0.75 + 0.25) / 4)
    assert found["exact_match"] is found["correct_normalized"] is None
    assert side_scores(exact, "after")["exact_match"] == side_scores(exact, "after")["score"] == 1
    comparison = compared(graded)
    assert (comparison["gained"], comparison["lost"]) == (1, 1)
    assert comparison["gained_normalized"] is None


def test_an_answer_line_says_who_judged_it_and_how() -> None:
    line: dict[str, Any] = {"prompt": "?", "reference": "#### 7", "source": "a"}
    line |= {"before": "#### 8", "after": "#### 7", "reference_tokens": 4}
    judging = Judging(EvaluateConfig(), [("a", "#### 7")])
    found = with_judgement(line, judge_row(judging, line))
    assert found["judge"] == "pattern"
    assert (found["correct_before"], found["correct_after"]) == (False, True)
    assert (found["score_before"], found["score_after"]) == (0, 1)
    repeats = [{"before": "#### 7", "after": "#### 7"}]
    both = with_judgement(
        line | {"repeats": repeats}, judge_row(judging, line | {"repeats": repeats})
    )
    assert (both["score_before"], both["score_after"], both["correct_before"]) == (0.5, 1, False)


def test_figures_of_each_source_and_length() -> None:
    rows = [
        row([0], [1], source="a", reference_tokens=16),
        row([1], [1], source="a", reference_tokens=17),
        row([0.5], [0.25], source="b", reference_tokens=33),
        row([0.5], [0.75], source="b", reference_tokens=64),
        row([], [], source="c", judge=None, reference_tokens=300),
    ]
    found = {(each.by, each.name): each for each in slices(rows, canvas=16)}
    assert list(found) == [
        ("judge", "pattern"),
        ("judge", "chrf"),
        ("source", "a"),
        ("source", "b"),
        ("source", "c"),
        ("length", "1 to 16 tokens"),
        ("length", "17 to 32 tokens"),
        ("length", "33 to 64 tokens"),
        ("length", "257 to 512 tokens"),
    ]
    a, b = found["source", "a"], found["source", "b"]
    assert (a.rows, a.scored, a.score_before, a.score_after) == (2, 2, 0.5, 1)
    assert (a.score_before_low, a.score_before_high) == wilson(1 / 2, 2)
    assert (b.score_after, b.gained, b.lost, b.judges) == (0.5, 1, 1, ("chrf",))
    assert found["length", "33 to 64 tokens"].rows == 2
    assert (found["judge", "chrf"].rows, found["judge", "chrf"].score_after) == (2, 0.5)
    assert found["source", "c"].score_after is found["source", "c"].verdict is None
    assert slices(rows[:1] * 3, canvas=16) == (), "one source and one length are the whole"


# --- statistics


def test_the_paired_test_of_right_and_wrong_is_mcnemars() -> None:
    for gained, lost in itertools.product(range(6), range(5)):
        differences = [1.0] * gained + [-1.0] * lost + [0.0] * 3
        assert sign_flip(differences) == pytest.approx(mcnemar(gained, lost))
        assert paired_test(differences)[0] == mcnemar(gained, lost)


def test_the_paired_test_of_many_rows_agrees_with_counting_all_signs() -> None:
    draw = random.Random(1)
    values = [round(draw.uniform(-0.4, 1), 2) for _ in range(15)]  # one more than are counted
    signs = np.array(list(itertools.product((-1, 1), repeat=15)))
    exact = float(np.mean(np.abs(signs @ values) >= abs(sum(values)) - 1e-9))
    assert sign_flip(values) == pytest.approx(exact, abs=0.01)
    assert sign_flip(values) == sign_flip(values)
    assert paired_test([0.1] * 40)[1] == "better"
    assert paired_test([-0.1] * 40)[1] == "worse"
    assert paired_test([0.1, -0.1] * 20)[1] == "undecided"
    assert sign_flip([0.0, 0.0]) == 1


def test_intervals_cover_the_truth_with_the_noise_of_sampling_in_them() -> None:
    """Rows of different difficulty, each answered three times: about 95% of intervals cover."""
    draw = np.random.default_rng(0)
    covered, wrong, trials, repeats = 0, 0, 400, 3
    for _ in range(trials):
        chances = draw.choice([0.1, 0.5, 0.95], size=40)
        shares = draw.binomial(repeats, chances) / repeats
        low, high = share_interval([*map(float, shares)], repeats)
        covered += low <= (0.1 + 0.5 + 0.95) / 3 <= high
        low, high = wilson(float(shares.mean()), 40 * repeats)
        wrong += low <= (0.1 + 0.5 + 0.95) / 3 <= high
    assert 0.92 < covered / trials < 0.985
    assert wrong / trials < 0.88, "answers of one row were counted as if of different rows"
    assert share_interval([1.0, 0.0, 1.0], 1) == wilson(2 / 3, 3)
    assert share_interval([1.0, 1.0], 5) == wilson(1.0, 2)


def test_intervals_of_scores_are_students() -> None:
    scores = [0.2, 0.4, 0.4, 0.9, 0.6]
    low, high = mean_interval(scores)
    half = 2.7764 * 0.264575 / 5**0.5  # the quantile for 4 degrees of freedom, the deviation
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), rel=0.005)
    assert mean_interval([0.2, 0.3, 0.4]) == (0, 1), "three rows say nothing"
    assert mean_interval([1.0] * 4) == (1, 1)


def test_a_word_where_rows_are_too_few() -> None:
    (line,) = too_few(5)
    assert line == snapshot(
        "5 scored rows are too few to show anything: the paired test needs 6 that change"
    )
    (line,) = too_few(12)
    assert re.match(r"12 .*\b6\b.* \(50%\)", line)
    assert too_few(30) == too_few(0) == []


# --- with prepared data


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """Prepare prose and numbers together."""
    root = tmp_path_factory.mktemp("mixture")
    for name, answer in (("prose", "It is {}, I think."), ("numbers", "#### {}")):
        with (root / f"{name}.jsonl").open("w") as file:
            for number in range(40):
                text = {"prompt": f"{name} {number}?", "response": answer.format(number)}
                file.write(json.dumps(text) + "\n")
    config = recipe(str(root / "prose.jsonl"), str(root / "numbers.jsonl"), max_new_tokens=64)
    prepare_data(config, tiny_model, root / "data")
    return config, root / "data"


def test_prepare_says_how_each_source_is_judged(mixture: tuple[RunConfig, Path]) -> None:
    config, dataset = mixture
    prose, numbers = sorted(describe_scoring(config, dataset), reverse=True)
    assert prose.startswith("evaluate.judge: chrF ")
    assert f"prose.jsonl: evaluate.answer_pattern {config.evaluate.answer_pattern} " in prose
    assert "I think.'" in prose, "no reference is shown"
    assert numbers.startswith("evaluate.answer_pattern ####")
    held_out = numbers.rpartition(" matches ")[2].split()
    assert held_out[0] == held_out[2]
    changed = {"judge": ("json",), "judges": {config.data.sources[1].source: ()}}
    evaluate = config.evaluate.model_copy(update=changed)
    lines = describe_scoring(config.model_copy(update={"evaluate": evaluate}), dataset)
    assert any(re.match(r"evaluate\.judge json\b.* 0 of \d+ ", line) for line in lines)
    assert any(line.startswith("evaluate.judge is []") for line in lines)


def test_a_question_knows_its_source_and_the_length_of_its_reference(
    mixture: tuple[RunConfig, Path], tiny_model: Path
) -> None:
    config, dataset = mixture
    tokenizer: Any = load_transformers_tokenizer(tiny_model)
    questions = select_questions(dataset, tokenizer, 1000)
    assert {question.source for question in questions} == {
        source.source for source in config.data.sources
    }
    for question in questions:
        assert Path(question.source or "").stem == question.text.split()[0]
        expected = len(tokenizer(question.reference, add_special_tokens=False).input_ids) + 1
        assert question.reference_tokens == expected
    judges = {config.data.sources[0].source: ("text",)}
    evaluate = config.evaluate.model_copy(update={"judges": judges})
    judging = judging_of(config.model_copy(update={"evaluate": evaluate}), questions)
    assert sorted(judging.names) == ["pattern", "text"]
    (dataset / "validation" / "sources.json").rename(dataset / "sources.json")
    try:
        older = select_questions(dataset, tokenizer, 1000)
        with pytest.raises(UserError, match=r"evaluate\.judges: .*\bsource\b"):
            judging_of(config.model_copy(update={"evaluate": evaluate}), older)
    finally:
        (dataset / "sources.json").rename(dataset / "validation" / "sources.json")


def test_a_function_that_no_pod_can_see_is_refused() -> None:
    refuse_local_paths(recipe("openai/gsm8k", judge="python:/workspace/own.py:grade"))
    with pytest.raises(UserError, match=r"evaluate\.judge: own\.py\b") as error:
        refuse_local_paths(recipe("openai/gsm8k", judge=["text", "python:own.py:grade"]))
    assert "/workspace/own.py" in error.value.hint


def test_a_function_that_fails_is_found_before_training(
    mixture: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, dataset = mixture
    file = tmp_path / "own.py"
    file.write_text("def grade(answer, reference):\n    return True\n")
    evaluate = config.evaluate.model_copy(update={"judge": (f"python:{file}:grade",)})
    with pytest.raises(UserError, match=r"TypeError: grade\(\) takes 2 positional"):
        describe_scoring(config.model_copy(update={"evaluate": evaluate}), dataset)


def test_prepare_says_where_answers_are_longer_than_the_limit(
    mixture: tuple[RunConfig, Path],
) -> None:
    config, dataset = mixture
    assert describe_answers(config, dataset, sample=True) == []
    short = config.evaluate.model_copy(update={"max_new_tokens": 8})
    (line,) = describe_answers(config.model_copy(update={"evaluate": short}), dataset, sample=True)
    assert re.match(r"\d+ of \d+ references\b.* evaluate\.max_new_tokens \(8\)", line)
    few = config.evaluate.model_copy(update={"rows": 5})
    (line,) = describe_answers(config.model_copy(update={"evaluate": few}), dataset)
    assert line.startswith(too_few(5)[0])

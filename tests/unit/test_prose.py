"""Claims about the linter of prose: every rule finds its words in prose, and none in code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.prose import PHRASES, RULES, SPELLING, Rule, check, main

# One sample that each phrase must find, in the order of the table.
SAMPLES = (
    *(
        "Mend the file.",
        "The run goes on.",
        "The key stands there twice.",
        "It stands in the file.",
    ),
    *(
        "The file lies in the folder.",
        "The error, in words.",
        "Nobody writes it.",
        "Whoever reads it.",
    ),
    *(
        "A page for who knows it.",
        "Give another folder.",
        "Wait, or give another folder.",
        "Choose such names.",
    ),
    *(
        "LoRA alone.",
        "A begun file.",
        "It began late.",
        "A process of its own.",
        "The file is gone.",
    ),
    *(
        "It is of no interest.",
        "A rank makes no progress.",
        "Another is at work.",
        "It is told the step.",
    ),
    *(
        "It tells MLflow.",
        "The reason is said.",
        "A file beside it.",
        "Besides, it waits.",
        "Sent anew.",
    ),
    *("A GPU cannot be had.", "It is no run's folder.", "It waits in vain.", "It shall wait."),
    *(
        "The end thereof.",
        "Kills at length.",
        "Read to its end.",
        "Killed in mid-run.",
        "The cure.",
    ),
    *("It cannot be made.", "Make room there.", "When there is room.", "It does not answer."),
    *("It knows who you are.", "MLflow is away.", "What for?"),
    *(
        "At night, by symptom.",
        "What it left behind.",
        "A base that can do something.",
        "No card is at hand.",
        "What made it.",
        "Set otherwise than the default.",
    ),
    *("Nothing but 3 checkpoints.", "The first thirtieth of the steps.", "Total loss in figures."),
    *("To know before you use it.", "What the shell reads.", "It closes a run's books."),
    *("A key that does not stand here.", "Where everything lies.", "Read on.", "It is believed."),
    *("What no rung proves.", "This is not the real thing.", "The run takes some minutes."),
)
RIGHT = (
    "We stand in for it, and it stands for a model.",
    "The tensor goes on the GPU.",
    "A stand-alone page; leave it alone; memory from the configuration alone.",
    "Tell one from another.",
    "`mend`, mend_file, mend.py, --mend, mend=1 and mend() are names.",
    "An exercise, a promise, a premise, parallelism, analyses, and emphasis.",
    "See https://example.com/mend there.",
)


def found(text: str, path: str = "page.md") -> list[str]:
    return [hit.found for hit in check(path, text)]


# As users read them in an earlier version, and could not follow.
UNCLEAR = (
    "Whoever is called when it breaks.",
    "At night, by symptom.",
    "What it leaves behind.",
    "A base that can do something.",
    "It goes on with the same command.",
    "The check goes on with the same bits.",
    "All is well: nothing stands in the way.",
    "There are 2 problems. Mend model first.",
    "Choose such.",
    "Correct it: optimiser steps.",
    "Give the folder of a checkpoint, or a network.",
    "The file cannot be had from the Hub.",
    "The data card is not at hand.",
    "What made it.",
    "What the recipe sets otherwise than the defaults.",
    "Nothing but 3 checkpoints: no restart.",
    "Means of the first and last thirtieth.",
    "Total loss in figures.",
    "To know before you use this.",
    "It sends what it missed of a run while it was away.",
    "What the shell reads to complete commands and files.",
    "The report of a run again, beside others.",
    "It closes the run's books.",
    "A key that does not stand here is refused.",
    "Where everything lies.",
    "Read on.",
    "It is for who knows transformers.",
    "Every trick is believed.",
    "What no rung proves.",
    "It is not the real thing there.",
    "`make run` takes a few minutes.",
)


@pytest.mark.parametrize("text", UNCLEAR)
def test_what_users_could_not_follow_is_found(text: str) -> None:
    assert found(text)


def test_every_phrase_has_a_sample() -> None:
    assert len(SAMPLES) == len(PHRASES)


@pytest.mark.parametrize(
    ("rule", "sample"),
    [*zip(PHRASES, SAMPLES, strict=True)],
    ids=lambda value: getattr(value, "pattern", ""),
)
def test_each_phrase_is_found(rule: Rule, sample: str) -> None:
    path = "page.md" if "docs" in rule.where else "code.toml"
    text = sample if path == "page.md" else f"# {sample}"
    (hit,) = check(path, text)
    assert hit.write == rule.write


@pytest.mark.parametrize(
    ("british", "american"),
    [
        ("optimiser", "optimizer"),
        ("Normalised", "Normalized"),
        ("utilisation", "utilization"),
        ("colours", "colors"),
        ("behaviour", "behavior"),
        ("grey", "gray"),
        ("licence", "license"),
        ("cancelled", "canceled"),
        ("labelling", "labeling"),
        ("analysed", "analyzed"),
        ("neighbouring", "neighboring"),
    ],
)
def test_british_spellings_name_the_american_one(british: str, american: str) -> None:
    (hit,) = check("page.md", f"The {british} of it.")
    assert hit.write.lower() == american.lower()


@pytest.mark.parametrize("text", RIGHT)
def test_right_words_pass(text: str) -> None:
    assert found(text) == []


def test_a_phrase_is_found_across_lines_and_said_once() -> None:
    (hit,) = check(
        "page.md", "# Title\n\nThe same command goes\non.\n\nIt goes.\n\nOn the next day.\n"
    )
    assert (hit.line, hit.found) == (3, "goes on")


def test_python_is_read_by_comment_docstring_and_message() -> None:
    source = (
        "def mend(colour):  # mend it\n"
        '    """Mend a colour `mend`."""\n'
        "    mend.begun = colour['mend'] + \"mend\"\n"
        '    raise UserError(f"the file {mend(colour)} goes "\n'
        '                    "on; mend it")\n'
    )
    assert [(hit.line, hit.found) for hit in check("code.py", source)] == [
        (1, "mend"),
        (2, "Mend"),
        (2, "colour"),
        (4, "goes on"),
        (5, "mend"),
    ]


@pytest.mark.parametrize("word", ["The", "A", "What", "Whether", "Where", "Who", "Every"])
def test_a_functions_docstring_begins_with_a_verb(word: str) -> None:
    noun = f'    def name(self):\n        """{word} name."""\n'
    fine = f'class Name:\n    """{word} name."""\n\n    @property\n{noun}'
    assert found(f"{fine}\n{noun}", "code.py") == [f"{word} ..."]
    assert found(f"{fine}\n{noun.replace(f'{word} name', 'Return it')}", "code.py") == []
    assert found(f"{fine}\n{noun}", "tests/test_code.py") == []


def test_comments_apart_are_not_one_sentence() -> None:
    assert found("x = 1  # it goes\ny = 2  # on the whole\n", "code.py") == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("values.yaml", "mend: mend  # mend it\n"),
        ("recipe.yaml", "description: >-\n  a text\n  to mend\nmend: of mend\n"),
        ("chart/templates/a.yaml", "{{- /* to mend */}}\nmend: {{ .Values.mend }}\n"),
        ("a.schema.json", '{"mend": {"description": "a text to mend"}}'),
        ("a.js", "// to mend\nmend(`${mend}`, 'mend')\n"),
        ("b.js", "mend(`to mend ${mend}`)\n"),
        ("a.css", "/* to mend */ .mend { color: mend }\n"),
        ("a.html.jinja", "<p class='to mend'>{{ mend }} mend</p><style>mend</style>{% if mend %}"),
        ("b.html.jinja", "{{ 'to mend' if mend }}"),
        ("NOTES.txt", "{{ .Values.mend }} mend\n"),
        ("Makefile", "mend: mend # to mend\n"),
        ("docker/a.Dockerfile", "# to mend\nRUN mend\n"),
        ("a.sh", '#!/bin/mend\necho "to mend" mend\n'),
        ("page.md", "```sh\nmend\n```\n`mend` [mend](mend.md) <!-- mend -->\n"),
    ],
)
def test_each_kind_of_file_is_read_where_it_is_prose(path: str, text: str) -> None:
    assert found(text, path) == ["mend"]


def test_a_line_can_be_accepted() -> None:
    assert found("x = 1  # mend it; prose: ok, the sail is torn\n", "code.py") == []


def test_paths_with_a_reason_are_skipped() -> None:
    assert found("mend it", "canvastune/report/uplot/README.md") == []


def test_no_rule_is_there_twice() -> None:
    patterns = [rule.pattern for rule in RULES]
    assert len(patterns) == len(set(patterns))
    assert all(rule.write for rule in (*PHRASES, *SPELLING))


def test_the_program_prints_the_place_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("A line.\nMend it.\n")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f'{page}:2: "Mend" -> write "fix"\n'
    page.write_text("Fix it.\n")
    assert main([str(page)]) == 0

"""`canvastune ask`: ask the tuned model of a run, and its base if wanted, on this machine."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig, loads
from canvastune.errors import UserError
from components.run_artifacts import find_run, find_run_folder, tuned_model

logger = logging.getLogger("canvastune")  # to standard error, away from the answers


def ask(
    run: str | Path,
    questions: Sequence[str],
    workspace: Path,
    *,
    settings: Sequence[str] = (),
    system: str = "",
    base: bool = False,
) -> None:
    """Print an answer to each question, as the evaluation of the run would generate it.

    Args:
        run: its folder, or its name in the workspace.
        questions: each is the user's turn of a new chat; none: the lines of standard input.
        settings: lines of `evaluate.KEY=VALUE`.
        system: a system message before each question; "": none.
        base: print the base model's answers too. One model at a time is in memory.

    Raises:
        UserError: no such run, a run without a tuned model, another setting than of evaluate, no
            question, a model that cannot be loaded.
    """
    folder = find_run_folder(run, workspace)
    found = find_run(folder).config
    config, tuned = loads(found.model_dump_json(), overrides=list(settings)), tuned_model(folder)
    # Here, as these take seconds to import.
    from canvastune.checkpoint.hub import resolve_model
    from canvastune.evaluation.again import changes_answers

    changes_answers(found, config)  # refuses other settings than evaluate.*
    asked = list(questions) or _read_questions()
    chats = [_chat(question, system) for question in asked]
    of_base = []
    if base:
        of_base = list(_answers("base", resolve_model(config.model), config, chats))
    for number, answer in enumerate(_answers("tuned", tuned, config, chats)):
        shown = answer
        if base:
            sides = {"base": of_base[number], "tuned": answer}
            shown = "\n".join(f"{side}:\n{_indent(text)}" for side, text in sides.items())
        if len(asked) > 1 or base:
            shown = f"> {asked[number]}\n{shown}"
        print(shown, end="\n\n" if number + 1 < len(asked) else "\n", flush=True)


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ")


def _chat(question: str, system: str) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def _answers(
    side: str, folder: Path, config: RunConfig, chats: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[str]:
    """Yield the answers of one model, a batch at a time."""
    from canvastune.evaluation.chat_model import ChatModel

    model, settings, cut = ChatModel(folder, config.evaluate), config.evaluate, 0
    for start in range(0, len(chats), settings.batch_size):
        batch = chats[start : start + settings.batch_size]
        for answer in model.generate(
            batch, seed=config.seed, max_new_tokens=settings.max_new_tokens
        ):
            cut += answer["cut"]
            yield answer["text"]
    if cut:
        logger.warning(
            f"ask: {cut} of {len(chats)} answers of the {side} model were cut; for longer ones: "
            f"--set evaluate.max_new_tokens={2 * settings.max_new_tokens}"
        )


def _read_questions() -> list[str]:
    if sys.stdin.isatty():
        logger.info("One question per line; end with Ctrl-D.")
    found = [line.strip() for line in sys.stdin if line.strip()]
    if not found:
        raise UserError(
            "no question: found none on the command line and none on standard input",
            hint='Pass one: canvastune ask RUN "...".',
        )
    return found

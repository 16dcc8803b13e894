"""What evaluation needs of model, data and recipe, checked before the run trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from canvastune.checkpoint.generation_config import read_generation_file
from canvastune.config import RunConfig
from canvastune.config.schema import EvaluateConfig
from canvastune.data.row_sources import read_sources
from canvastune.evaluation.held_out import open_validation, select_rows
from canvastune.evaluation.judges import Judge, Judging, default_judges, load_judge
from canvastune.evaluation.scoring import answer_part, too_few

NOT_SCORED = "none of them will be scored"

logger = logging.getLogger(__name__)


def check_generation_config(model: Path) -> list[str]:
    """Return a line for each part of a checkpoint's generation_config.json that is not used.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    if not _is_diffusion_gemma(model):  # preparation refuses another model
        return []
    return list(read_generation_file(model).remarks)


def _is_diffusion_gemma(model: Path) -> bool:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "diffusion_gemma"


def describe_scoring(config: RunConfig, dataset: Path) -> list[str]:
    """Say how many held-out rows of each source its judges can score, a line each.

    Raises:
        UserError: a judge that cannot be loaded.
    """
    settings, lines = config.evaluate, []
    rows = open_validation(dataset)
    by_source: dict[str | None, list[str]] = {}
    for source, reference in _references(config, rows, dataset):
        by_source.setdefault(source, []).append(reference)
    for source, references in by_source.items():
        names = settings.judges.get(source or "", settings.judge)
        where = "held-out references" + (f" of {source}" if len(by_source) > 1 else "")
        if names is None:
            (name,) = default_judges(settings, references)
            if name == "chrf":
                line = f"evaluate.judge: chrF judges all {len(references)} {where}"
                if settings.answer_pattern:
                    line += (
                        f": evaluate.answer_pattern {settings.answer_pattern} matches none of them "
                        f"(one ends with {references[0][-60:]!r})"
                    )
                lines.append(line)
                continue
            names = (name,)
        if not names:
            lines.append(f"evaluate.judge is []: the {len(references)} {where} are not scored")
            continue
        judges = [load_judge(name, settings) for name in names]
        for judge in judges:  # now, and not after both models have answered
            if judge.name.startswith("python:"):
                _try_judge(judge, rows[0])
        scored = sum(
            any(judge.read(reference) is not None for judge in judges) for reference in references
        )
        line = f"{_judge_label(names, settings)} {scored} of {len(references)} {where}"
        if not scored:
            line += (
                f" (one ends with {references[0][-60:]!r}): {NOT_SCORED}. Set evaluate.judge to one "
                "that fits, such as chrf for any text"
            )
        elif scored < len(references):
            line += "; the others are not scored"
        lines.append(line)
    return lines


def _try_judge(judge: Judge, row: Mapping[str, Any]) -> None:
    """Ask a judge about a reference as its own answer. Raises: UserError, what it raises."""
    from canvastune.evaluation.generation import plain_text  # loads torch

    prompt = plain_text(json.loads(row["prompt"]))
    judge.compare(answer_part(row["answer"]), judge.read(row["answer"]), prompt)


def _judge_label(names: Sequence[str], settings: EvaluateConfig) -> str:
    if tuple(names) == ("pattern",):
        return f"evaluate.answer_pattern {settings.answer_pattern} matches"
    return f"evaluate.judge {', '.join(names)} can use"


def _references(config: RunConfig, rows: Any, dataset: Path) -> list[tuple[str | None, str]]:
    """Return source and reference of prepared rows."""
    sources = read_sources(dataset / "validation")
    found = zip(rows["id"], rows["answer"], strict=True)
    return [(sources.get(id, config.data.source), answer) for id, answer in found]


def describe_answers(config: RunConfig, dataset: Path, *, sample: bool = False) -> list[str]:
    """Say where evaluation will do something else than its settings suggest, a line each.

    Args:
        sample: whether the dataset has only some of the rows, so that their number says nothing.
    """
    settings, lines = config.evaluate, []
    rows = open_validation(dataset) if sample else select_rows(dataset, settings.rows)
    if len(rows) < settings.rows and not sample:
        held_out = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
        lines.append(f"evaluate.rows is {settings.rows}, but {held_out} held out: all are answered")
    references = _references(config, rows, dataset)
    judging = Judging(settings, references)
    scored = sum(judging.find(*reference) is not None for reference in references)
    if not sample:
        lines += [f"{line} (data.validation_fraction, evaluate.rows)" for line in too_few(scored)]
    card = json.loads((dataset / "card.json").read_text(encoding="utf-8"))
    canvas = int(card["canvas_length"])
    longest = -(-settings.max_new_tokens // canvas) * canvas  # whole canvases are denoised
    prompt, positions = max(rows["prefix_length"]), card.get("positions")
    if positions is not None and prompt + longest > positions:  # older data does not have it
        lines.append(
            f"the longest prompt ({prompt} tokens) and evaluate.max_new_tokens exceed the "
            f"model's {positions} positions"
        )
    lengths = zip(rows["input_ids"], rows["prefix_length"], strict=True)
    responses = [len(tokens) - prefix for tokens, prefix in lengths]
    if longer := sum(tokens > settings.max_new_tokens for tokens in responses):
        lines.append(
            f"{longer} of {len(rows)} references are longer than evaluate.max_new_tokens "
            f"({settings.max_new_tokens}), the longest has {max(responses)} tokens: such answers "
            "are cut"
        )
    tracking = config.tracking
    if tracking.registered_model and tracking.promote == "better" and not scored:
        lines.append(
            f"tracking.promote: without a scored row, no version of {tracking.registered_model} "
            "becomes champion automatically"
        )
    return lines


def log_remarks(lines: list[str]) -> None:
    """Log what was found, before the run trains."""
    for line in lines:
        logger.info(f"evaluate: {line}")

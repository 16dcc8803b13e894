"""What evaluation needs of model, data and recipe, looked at before the run trains."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.evaluation.held_out import open_validation, select_rows
from canvastune.evaluation.scoring import extract_answer

logger = logging.getLogger(__name__)


def check_generation_config(model: Path) -> list[str]:
    """Return a line for each part of a checkpoint's generation_config.json that is not used.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    if not _is_diffusion_gemma(model):  # preparation refuses another model
        return []
    # Takes seconds to import, and the step `train` needs only the rest of this module
    from canvastune.checkpoint.generation_config import read_generation_file

    return list(read_generation_file(model).remarks)


def _is_diffusion_gemma(model: Path) -> bool:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "diffusion_gemma"


def describe_scoring(config: RunConfig, dataset: Path) -> list[str]:
    """Say how many held-out rows exact match can score; nothing if it is switched off."""
    if config.evaluate.answer_pattern is None:
        return []
    pattern = re.compile(config.evaluate.answer_pattern)
    references = list(open_validation(dataset)["answer"])
    scored = sum(extract_answer(pattern, reference) is not None for reference in references)
    line = (
        f"evaluate.answer_pattern {pattern.pattern} matches {scored} of {len(references)} "
        "held-out references"
    )
    if not scored:
        line += (
            f" (one ends with {references[0][-60:]!r}): exact match will be left out. Set a "
            "pattern whose group 1 is the answer, or null if there is none"
        )
    elif scored < len(references):
        line += "; exact match will leave out the others"
    return [line]


def describe_answers(config: RunConfig, dataset: Path) -> list[str]:
    """Say where evaluation will do something else than its settings suggest, a line each."""
    settings, lines = config.evaluate, []
    rows = select_rows(dataset, settings.rows)
    if len(rows) < settings.rows:
        held_out = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
        lines.append(f"evaluate.rows is {settings.rows}, but {held_out} held out: all are answered")
    card = json.loads((dataset / "card.json").read_text(encoding="utf-8"))
    canvas = int(card["canvas_length"])
    longest = -(-settings.max_new_tokens // canvas) * canvas  # whole canvases are denoised
    prompt, positions = max(rows["prefix_length"]), card.get("positions")
    if positions is not None and prompt + longest > positions:  # older data does not have it
        lines.append(
            f"the longest prompt ({prompt} tokens) and evaluate.max_new_tokens exceed the "
            f"model's {positions} positions"
        )
    tracking = config.tracking
    if tracking.registered_model and tracking.promote == "better":
        pattern = settings.answer_pattern
        scored = pattern and any(extract_answer(re.compile(pattern), a) for a in rows["answer"])
        if not scored:
            lines.append(
                f"tracking.promote: without exact match no version of {tracking.registered_model} "
                "becomes champion by itself"
            )
    return lines


def log_remarks(lines: list[str]) -> None:
    """Log what was found, before the run trains."""
    for line in lines:
        logger.info(f"evaluate: {line}")

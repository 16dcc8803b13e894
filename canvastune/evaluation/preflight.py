"""What evaluation needs of model, data and recipe, looked at before the run trains."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import transformers
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
)

from canvastune.config import RunConfig
from canvastune.errors import UserError, one_line
from canvastune.evaluation.generation import open_validation, select_rows
from canvastune.evaluation.scoring import extract_answer

logger = logging.getLogger(__name__)

_GENERATION = "generation_config.json"


def check_generation_config(model: Path) -> list[str]:
    """Load a checkpoint's generation config as stock transformers will, after training.

    Returns:
        What its settings do to every answer, a line each; mostly none.

    Raises:
        UserError: stock transformers cannot load it, or `generate` does not return what evaluation
            reads.
    """
    file = model / _GENERATION
    if not file.is_file() or not _is_diffusion_gemma(model):  # preparation refuses another model
        return []
    hint = f"Remove or correct these settings in {_GENERATION}; DiffusionGemma has its own."
    try:
        found = DiffusionGemmaGenerationConfig.from_pretrained(model, local_files_only=True)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({one_line(error)})",
            hint="Use the directory of an unchanged checkpoint.",
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: transformers {transformers.__version__} cannot load it ({one_line(error)}), "
            "so no tuned model could be verified or evaluated",
            hint=hint,
        ) from None
    if not found.return_dict_in_generate:
        raise UserError(
            f"{file}: return_dict_in_generate is {found.return_dict_in_generate}, expected true: "
            "evaluation reads more than tokens",
            hint=hint,
        )
    remarks = []
    if found.max_length is not None:
        remarks.append(
            f"{file}: max_length is {found.max_length}: answers end there, prompt included, and a "
            f"longer prompt gets none. Remove it; evaluate.max_new_tokens limits answers"
        )
    if found.cache_implementation not in (None, "dynamic"):
        remarks.append(
            f"{file}: cache_implementation is {found.cache_implementation!r}: answers to prompts "
            "beyond the sliding window differ from those of a dynamic cache. Remove it"
        )
    return remarks


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
    longest = -(-settings.max_new_tokens // canvas) * canvas
    if longest != settings.max_new_tokens:
        lines.append(
            f"evaluate.max_new_tokens is {settings.max_new_tokens}, but the model writes whole "
            f"canvases of {canvas} tokens: answers have up to {longest}"
        )
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

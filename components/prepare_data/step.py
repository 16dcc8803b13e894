"""Prepare a recipe's data set, and copy its card to where Kubeflow shows it."""

from __future__ import annotations

import shutil
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.checkpoint.truncation import refuse_truncated
from canvastune.config import RunConfig
from canvastune.evaluation.preflight import (
    check_generation_config,
    describe_scoring,
    log_remarks,
)
from canvastune.preparation.prepare import prepare_data as prepare


def prepare_data(config: RunConfig, dataset: Path, card: Path) -> dict[str, int | str]:
    """Read, check, split and tokenize the data into `dataset`.

    What evaluation will read of model and data is looked at here, before the run trains.

    Args:
        dataset: a new folder; gets the train and validation split, card.json and card.html.
        card: gets a copy of card.html.

    Returns:
        The rows of each split and the hash of their content.

    Raises:
        UserError: as `canvastune.preparation.prepare.prepare_data`; a generation config that stock
            transformers cannot load; weights in a folder that are truncated.
    """
    model = resolve_model(config.model, weights=False)
    refuse_truncated(model)
    log_remarks(check_generation_config(model))
    counts = prepare(config, model, dataset)
    log_remarks(describe_scoring(config, dataset))
    shutil.copy(dataset / "card.html", card)
    return {key: counts[key] for key in ("train", "validation", "content_hash")}

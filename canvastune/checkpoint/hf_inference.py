"""Load a checkpoint into the stock transformers model, as any user does.

For generation and for the merge's proof.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.utils import logging

from canvastune.checkpoint.generation_config import read_generation_file
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.errors import UserError


def load_stock(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> DiffusionGemmaForBlockDiffusion:
    """Load a checkpoint for inference.

    Args:
        dtype: of the weights in memory; None: as stored.

    Raises:
        UserError: a checkpoint that is broken, or one that lacks a value the model needs.
    """
    CheckpointReader(folder)  # names a broken file, which transformers does not
    with _quiet():
        loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map=device,
            local_files_only=True,
            # Stock refuses to load a model for one unknown key of this file.
            generation_config=read_generation_file(folder).stock(),
            output_loading_info=True,
        )
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:
            first = sorted(str(key) for key in report[kind])[0]
            raise UserError(
                f"{folder}: {len(report[kind])} {kind.replace('_', ' ')}, the first is {first}",
                hint="Use a complete checkpoint.",
            )
    return model.eval()


def load_stock_with_adapter(
    base: Path, adapter: Path, device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """Load the stock model with an adapter, as stock PEFT does.

    Return the model itself, whose adapted layers are PEFT's.

    Args:
        dtype: see `load_stock`.
    """
    model: Any = load_stock(base, device, dtype)
    with _quiet():
        return PeftModel.from_pretrained(model, str(adapter)).base_model.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and the libraries' FutureWarnings about each other.

    A step logs its own progress.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""Answers of both models to held-out prompts, their scores, and their validation loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from canvastune import lazy_attributes

if TYPE_CHECKING:
    from canvastune.evaluation.run import evaluate

__all__ = ["evaluate"]
# It loads `torch` and `transformers`.
__getattr__ = lazy_attributes(__name__, evaluate="run")

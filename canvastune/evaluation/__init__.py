"""Answers of both models to held-out prompts, their scores, and their validation loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.evaluation.run import evaluate

__all__ = ["evaluate"]


def __getattr__(attribute: str) -> Any:
    """Import the function on first use: it loads `torch` and `transformers`."""
    if attribute == "evaluate":
        from canvastune.evaluation.run import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

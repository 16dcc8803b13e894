"""Train an adapter or a whole model, resumably, on one or many ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.training.run import train

__all__ = ["train"]


def __getattr__(attribute: str) -> Any:
    """Import the function on first use: it loads `torch` and `transformers`."""
    if attribute == "train":
        from canvastune.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

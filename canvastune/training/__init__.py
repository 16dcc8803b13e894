"""Train an adapter or a whole model, resumably, on one or many ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from canvastune import lazy_attributes

if TYPE_CHECKING:
    from canvastune.training.run import train

__all__ = ["train"]
# It loads `torch` and `transformers`.
__getattr__ = lazy_attributes(__name__, train="run")

"""Turn a dataset into checked, tokenized Arrow files and a data card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from canvastune import lazy_attributes

if TYPE_CHECKING:
    from canvastune.preparation.prepare import prepare_data

__all__ = ["PREPARATION_VERSION", "prepare_data"]

# Raise this when the same rows, tokenizer and settings would yield other tokens: data prepared by
# an earlier version is then prepared again, and an unfinished run that was trained on it is
# rejected. Import nothing heavy at the top of this file: the first step reads only the version.
PREPARATION_VERSION = 2

# It loads `datasets` and `transformers`.
__getattr__ = lazy_attributes(__name__, prepare_data="prepare")

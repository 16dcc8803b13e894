"""Turn a dataset into checked, tokenized Arrow files and a data card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.preparation.prepare import prepare_data

__all__ = ["PREPARATION_VERSION", "prepare_data"]

# Raise this when the same rows, tokenizer and settings would yield other tokens: data prepared by
# an earlier version is then prepared again, and an unfinished run that was trained on it is
# rejected. Import nothing heavy at the top of this file: the first step reads only the version.
PREPARATION_VERSION = 2


def __getattr__(attribute: str) -> Any:
    """Import the function on first use: it loads `datasets` and `transformers`."""
    if attribute == "prepare_data":
        from canvastune.preparation.prepare import prepare_data

        return prepare_data
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

"""Predict memory, time and communication of a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.planner.planner import make_plan

__all__ = ["make_plan"]


def __getattr__(attribute: str) -> Any:
    """Import the function on first use: it loads the Hub's client."""
    if attribute == "make_plan":
        from canvastune.planner.planner import make_plan

        return make_plan
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

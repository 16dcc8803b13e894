"""Predict memory, time and communication of a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from canvastune import lazy_attributes

if TYPE_CHECKING:
    from canvastune.planner.planner import make_plan

__all__ = ["make_plan"]
# It loads the Hub's client.
__getattr__ = lazy_attributes(__name__, make_plan="planner")

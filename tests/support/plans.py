"""Recipes for the released model, planned."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from canvastune.config import RunConfig, load_config
from canvastune.errors import UserError
from canvastune.planner.plan import Plan, refuse_if_too_big
from canvastune.planner.planner import SHIPPED_CONFIG, make_plan

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


@functools.cache
def released(name: str, *overrides: str, ranks: int = 8) -> Plan:
    """Plan a recipe, by default with each layer recomputed."""
    settings = ("train.activation_checkpointing=true", *overrides)
    return make_plan(recipe(name, *settings), SHIPPED_CONFIG, ranks)


def refusal(name: str, *overrides: str, ranks: int = 8) -> str:
    with pytest.raises(UserError) as error:
        refuse_if_too_big(released(name, *overrides, ranks=ranks))
    return f"{error.value} {error.value.hint}"

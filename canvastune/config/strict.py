"""A branch of a recipe's tree, as all of them are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """Unknown keys are refused; values are never coerced across kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic alone would read `true` as 1."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        given = value if isinstance(value, list | tuple) else [value]
        if {int, float} & kinds and bool not in kinds and any(isinstance(each, bool) for each in given):
            raise PydanticCustomError("number", "a number, not true or false")
        return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of a tree's leaves."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _kinds(annotation: Any) -> set[Any]:
    """A type, and those that it is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if get_args(annotation) else {annotation}

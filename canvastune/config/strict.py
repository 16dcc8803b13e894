"""What all sections of a recipe share: unknown keys are refused, and a value keeps its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

Value = TypeVar("Value")


@dataclass(frozen=True)
class AffectsWeights:
    """Field metadata: whether a setting decides a trained weight. A field without it does."""

    value: bool


# An unfinished run may resume with another value of such a field; of a section: with another value
# of any key in it.
ChangeableOnResume = Annotated[Value, AffectsWeights(False)]


def affects_weights(field: FieldInfo) -> bool:
    """Return whether another value of this field makes another run, by the field's metadata."""
    return AffectsWeights(False) not in field.metadata


class InvalidSetting(ValueError):
    """A rule between several keys is broken; the message names the keys, `hint` the remedy."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class StrictModel(BaseModel):
    """A section of the recipe: it refuses unknown keys and coerces no value into another kind."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number is expected: pydantic reads it as 1."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        given = value if isinstance(value, list | tuple) else [value]
        if {int, float} & kinds and bool not in kinds and any(isinstance(v, bool) for v in given):
            raise PydanticCustomError("number", "a number, not true or false")
        return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _kinds(annotation: Any) -> set[Any]:
    """Return a type and the types that it is composed of."""
    parts = get_args(annotation)
    return {annotation}.union(*map(_kinds, parts)) if parts else {annotation}

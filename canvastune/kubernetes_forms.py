"""How Kubernetes wants its names, labels, quantities and images written, so that its API server is not the first to refuse them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError


def written(pattern: str, expected: str) -> AfterValidator:
    """A check that the whole text has this form; `expected` says so in words."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise PydanticCustomError("form", expected)
        return text

    return AfterValidator(check)


_LABEL = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
Name = Annotated[str, written(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "a Kubernetes name: a-z, 0-9, '-' and '.', at most 253")]
LabelKey = Annotated[str, written(rf"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_LABEL}", "a Kubernetes label key such as nvidia.com/gpu.product")]
LabelValue = Annotated[str, written(f"({_LABEL})?", "a Kubernetes label value: at most 63 letters, digits, '-', '_' and '.'")]
Quantity = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value),  # as Kubernetes has it: 32 is "32"
    written(f"(?=.*[1-9]){_QUANTITY}", "a Kubernetes quantity above 0, such as 32, 500m or 512Gi"),
]
Variable = Annotated[str, written("[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable")]
Image = Annotated[str, written(r"[a-z0-9]\S*", "an image such as registry.example/canvastune/trainer:1.0, or one with @sha256:...")]
RESERVED = re.compile(r"PET_.*|MASTER_(ADDR|PORT)|RANK|WORLD_SIZE|NODE_RANK")  # given by the training operators
SECRET = re.compile(r"(.*_)?(TOKEN|PASSWORD|SECRET|KEY)")


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    number = re.match(r"[0-9.]+", quantity)
    assert number is not None
    unit = quantity[number.end() :]
    powers = {"": 1.0, "m": 1e-3, "k": 1e3} | {letter: 1000.0 ** (n + 2) for n, letter in enumerate("MGTP")}
    return float(number[0]) * (powers | {f"{letter}i": 1024.0 ** (n + 1) for n, letter in enumerate("KMGTP")})[unit]

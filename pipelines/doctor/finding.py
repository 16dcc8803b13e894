"""What a check of a machine or a cluster found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do about it ("" where nothing is to be done)."""

    name: str
    state: Literal["ok", "warning", "problem", "skipped"]
    found: str
    cure: str = ""


@dataclass(frozen=True)
class DoctorOptions:
    """What the person wants examined beyond the machine itself; None: not given."""

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    tracking_uri: str | None = None
    namespace: str | None = None
    host: str | None = None
    token_file: Path | None = None

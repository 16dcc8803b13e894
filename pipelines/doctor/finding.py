"""The options of `canvastune doctor`, and what one check found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WORKSPACE = Path("workspace")  # where a run without --workspace writes


@dataclass(frozen=True)
class Finding:
    """What one check found, and how to fix it ("" if there is nothing to fix)."""

    name: str
    state: Literal["ok", "warning", "problem", "skipped"]
    found: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorOptions:
    """What to check in addition to the machine itself; None: not given."""

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    tracking_uri: str | None = None
    namespace: str | None = None
    host: str | None = None
    token_file: Path | None = None
    workspace: Path = WORKSPACE

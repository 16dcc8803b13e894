"""Format numbers of bytes with the digits that tell them apart."""

from __future__ import annotations

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def format_bytes(count: float) -> str:
    """Return bytes with three digits: 52.0 GB, 14.2 MB, 303 GB, 0 B."""
    for unit, size in _UNITS:
        if count >= size:
            value = count / size
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{value:,.{digits}f} {unit}"
    return f"{count:.0f} B"

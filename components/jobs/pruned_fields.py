"""What of a manifest the API server did not store: it prunes what the installed CRD does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def pruned_fields(sent: Any, stored: Any, path: str = "") -> list[str]:
    """Return the paths of fields that were sent and are not in the stored object, outermost first.

    Added fields and changed values are no differences: defaults, quantities, what webhooks write.
    Nor are empty values, which webhooks leave out.
    """
    if sent in (None, False, 0, "", {}, []):
        return []
    if isinstance(sent, Mapping) and isinstance(stored, Mapping):
        children = [(f"{path}.{key}".lstrip("."), sent[key], stored.get(key)) for key in sent]
    elif isinstance(sent, list) and isinstance(stored, list):
        children = [
            (f"{path}[{number}]", element, _counterpart(stored, number, element))
            for number, element in enumerate(sent)
        ]
    else:
        return [] if stored is not None else [path]
    return [name for where, one, other in children for name in pruned_fields(one, other, where)]


def _counterpart(stored: list[Any], number: int, element: Any) -> Any:
    """Return the stored element: by its name, since webhooks insert some, or by its place."""
    if isinstance(element, Mapping) and "name" in element:
        named = (one for one in stored if isinstance(one, Mapping))
        return next((one for one in named if one.get("name") == element["name"]), None)
    return stored[number] if number < len(stored) else None

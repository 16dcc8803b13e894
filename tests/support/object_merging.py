"""How a Kubernetes API server changes an object: server-side apply, merge patch and strategic merge
patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ITEM_KEYS = {  # lists that are merged by item
    **dict.fromkeys(
        ("containers", "initContainers", "env", "volumes", "imagePullSecrets", "replicatedJobs"),
        ("name",),
    ),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port", "protocol"),
}


def apply(live: Any, before: Any, now: Any, field: str = "") -> Any:
    """Apply server-side: keep the new fields and other managers' fields, drop the manager's old
    ones.

    A null is no value: it clears nothing that the manager did not give before.
    """
    if (live or now) and all(isinstance(tree, Mapping | None) for tree in (live, before, now)):
        a, b, c = live or {}, before or {}, now or {}
        found = {key: apply(a.get(key), b.get(key), c.get(key), key) for key in {**a, **c}}
        kept = {key: value for key, value in found.items() if value is not None}
        return kept if kept or now is not None or before is None else None
    if field in _ITEM_KEYS and isinstance(live, list) and isinstance(now, list):
        a, b, c = (_by_item(items, field) for items in (live, before or [], now))
        return [
            apply(a.get(key), b.get(key), c.get(key))
            for key in {**a, **c}
            if key in c or key not in b
        ]
    return merge({}, now) if now is not None else live if before is None else None


def merge(live: Any, patch: Any, *, by_item: bool = False) -> Any:
    """Merge maps; null removes, all else replaces.

    Strategic merge adds list items and directives.
    """
    if not isinstance(patch, Mapping):
        return patch
    old = live if isinstance(live, Mapping) else {}
    kept = {key: value for key, value in old.items() if key in patch.get("$retainKeys", old)}
    for key, value in patch.items():
        if by_item and key in _ITEM_KEYS and value is not None:
            items = _by_item(kept.get(key, []), key)
            items |= {
                name: merge(items.get(name), change, by_item=True)
                for name, change in _by_item(value, key).items()
            }
            kept[key] = [item for item in items.values() if "$patch" not in item]
        elif not key.startswith("$") or key == "$patch":
            kept[key] = merge(kept.get(key), value, by_item=by_item)
    return {key: value for key, value in kept.items() if value is not None}


def _by_item(items: Any, field: str) -> dict[tuple[Any, ...], Any]:
    return {tuple(item.get(key) for key in _ITEM_KEYS[field]): item for item in items}

"""Settings that nothing reads, because another setting turns them off; and those that are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from canvastune.config.schema import RunConfig
from canvastune.config.strict import flatten


@dataclass(frozen=True)
class _Group:
    keys: tuple[str, ...]  # whole keys; one that ends with a period stands for all below it
    read: Callable[[RunConfig], bool]
    why: str  # they are not


def _judged_sources(config: RunConfig) -> set[str]:
    named = {source.source for source in config.data.validation_sources or config.data.sources}
    other = config.evaluate.forgetting.source
    return named if other is None else named | {other}


_GROUPS = (
    _Group(
        ("evaluate.judge_model.",),
        lambda config: "model" in config.evaluate.judge_names,
        "no judge is `model` (evaluate.judge, evaluate.judges)",
    ),
    _Group(
        ("evaluate.answer_pattern",),
        lambda config: not config.evaluate.judge or "pattern" in config.evaluate.judge_names,
        "no judge is `pattern` (evaluate.judge, evaluate.judges)",
    ),
    _Group(
        ("evaluate.judge",),
        lambda config: not _judged_sources(config) <= config.evaluate.judges.keys(),
        "evaluate.judges names those of every source",
    ),
    _Group(
        ("evaluate.forgetting.",),
        lambda config: config.evaluate.forgetting.source is not None,
        "evaluate.forgetting.source is not set",
    ),
    _Group(("lora.",), lambda config: config.train.method == "lora", "train.method is full"),
    _Group(
        ("optimizer.min_lr",),
        lambda config: config.optimizer.schedule != "constant",
        "optimizer.schedule is constant",
    ),
    _Group(
        ("data.validation_fraction",),
        lambda config: config.data.validation is None,
        "data.validation is set",
    ),
    _Group(
        ("tracking.promote",),
        lambda config: config.tracking.registered_model is not None,
        "tracking.registered_model is not set",
    ),
    _Group(
        ("tracking.hub_private_repo", "tracking.hub_content"),
        lambda config: config.tracking.hub_model_id is not None,
        "tracking.hub_model_id is not set",
    ),
)


def unread_settings(config: RunConfig) -> list[str]:
    """Return a line for each group of settings that differ from the default and are not read.

    They are no error: a recipe may be run again with `--set evaluate.judge=chrf`, and keeps what
    its other judge needs.
    """
    defaults, given = _defaults(), flatten(config.model_dump(mode="json"))
    changed = [key for key, value in given.items() if value != defaults.get(key)]
    lines = []
    for group in _GROUPS:
        keys = [key for key in changed if _is_in(group, key)]
        if keys and not group.read(config):
            verb = "is set, but not" if len(keys) == 1 else "are set, but not"
            lines.append(f"{', '.join(keys)} {verb} read: {group.why}")
    return lines


def informative_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that say something of a run, by dotted key: neither unset nor unread, and
    of the cluster its size and what differs from the default.
    """
    defaults, unread = _defaults(), [group for group in _GROUPS if not group.read(config)]
    return {
        key: value
        for key, value in flatten(config.model_dump(mode="json")).items()
        if value not in (None, [])
        and not any(_is_in(group, key) for group in unread)
        and (not key.startswith("cluster.") or key in _SIZE or value != defaults.get(key))
    }


_LEAST = {"name": "least", "data": {"source": "rows.jsonl"}}
_SIZE = ("cluster.backend", "cluster.nodes")


def _defaults() -> dict[str, Any]:
    return flatten(RunConfig.model_validate(_LEAST).model_dump(mode="json"))


def _is_in(group: _Group, key: str) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in group.keys)

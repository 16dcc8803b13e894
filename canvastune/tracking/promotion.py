"""Which version of a registered model is its champion: the one with the best exact match on the same held-out rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from canvastune.tracking.models import CHAMPION, with_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_VERDICT, _SCORE, _ROWS, _CLAIMED = (f"canvastune.{name}" for name in ("promotion", "exact_match", "evaluation", "claimed_at"))
_SIMULTANEOUS = 600  # seconds: claims to the title this near to each other may not have seen one another


@dataclass(frozen=True)
class Score:
    """How a version did in an evaluation."""

    before: float  # exact match of the base, 0 to 1
    after: float
    evaluation: str  # hash of what was asked and how: scores compare where these agree


def score_of(evaluation: Mapping[str, Any]) -> Score | None:
    """The score in evaluation.json; None if no row was scored, or if it does not say what was asked."""
    if not evaluation.get("scored") or "asked" not in evaluation:
        return None
    compared = [evaluation[name] for name in ("asked", "scored", "answer_pattern", "max_new_tokens", "max_denoising_steps")]
    digest = hashlib.sha256(json.dumps(compared).encode()).hexdigest()[:16]
    return Score(evaluation["exact_match_before"], evaluation["exact_match_after"], digest)


def promote(client: MlflowClient, name: str, version: ModelVersion, score: Score | None, when: str) -> str:
    """Give a version the alias `champion` if it deserves it; returns why it got it, or did not.

    A version is judged once: a repeated step changes nothing, and neither does it undo what a person has set since.

    Args:
        when: "better": than the champion or, where there is none, not worse than the base. "never": an alias is a person's to set.
    """
    if _VERDICT in version.tags:
        return str(version.tags[_VERDICT])
    if score is not None:
        client.set_model_version_tag(name, version.version, _SCORE, f"{score.after:.6g}")
        client.set_model_version_tag(name, version.version, _ROWS, score.evaluation)
    verdict = _judge(client, name, version, score, when)
    client.set_model_version_tag(name, version.version, _VERDICT, verdict)
    return verdict


def _judge(client: MlflowClient, name: str, version: ModelVersion, score: Score | None, when: str) -> str:
    if when == "never":
        return "not promoted: tracking.promote is never"
    if score is None:
        return "not promoted: no held-out row was scored"
    champion = with_alias(client, name, CHAMPION)
    if champion is not None and champion.version == version.version:
        reason = f"promoted to {CHAMPION}: exact match {score.after:.1%}"  # the step was repeated
    elif champion is None:
        if score.after < score.before:
            return f"not promoted: exact match {score.after:.1%} is below the base's {score.before:.1%}"
        reason = f"promoted to {CHAMPION}: the first one, exact match {score.after:.1%}, the base has {score.before:.1%}"
    else:
        if champion.tags.get(_ROWS) != score.evaluation:
            return (
                f"not promoted: version {champion.version}, the {CHAMPION}, was not evaluated on the same rows in the same way. "
                "If this one is better, set the alias by hand"
            )
        best = float(champion.tags[_SCORE])
        if _rounded(score.after) <= best:
            how = "is no better than" if _rounded(score.after) == best else "is below"
            return f"not promoted: exact match {score.after:.1%} {how} the {best:.1%} of version {champion.version}, the {CHAMPION}"
        reason = f"promoted to {CHAMPION}: exact match {score.after:.1%}, version {champion.version} before it has {best:.1%}"
    return _claim(client, name, version, score) or reason


def _claim(client: MlflowClient, name: str, version: ModelVersion, score: Score) -> str | None:
    """Set the alias; if another run does so at the same time, the better one has it in the end, whoever is the last to set it.

    Returns:
        Why another version has it now; None if this one has.
    """
    client.set_model_version_tag(name, version.version, _CLAIMED, f"{time.time():.0f}")  # before the alias, so that others see it
    client.set_registered_model_alias(name, CHAMPION, version.version)
    rivals = [
        other
        for other in client.search_model_versions(f"name = '{name}'")
        if time.time() - float(other.tags.get(_CLAIMED, 0)) < _SIMULTANEOUS and other.tags.get(_ROWS) == score.evaluation
    ]
    best = max(rivals, key=lambda other: (float(other.tags[_SCORE]), -int(other.version)))
    if best.version == version.version:
        return None
    client.set_registered_model_alias(name, CHAMPION, best.version)
    return (
        f"not promoted: version {best.version}, judged at the same time, has an exact match of {float(best.tags[_SCORE]):.1%}, "
        f"this one {score.after:.1%}"
    )


def _rounded(score: float) -> float:
    """As it stands in a version's tag."""
    return float(f"{score:.6g}")

"""How the data of a run differ from those of another: rows, lengths, tokens and sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canvastune.data.data_profile import DataProfile
from canvastune.report.summary import RunArtifacts, read_json

_SIDES = {"prompt": "prefix_tokens", "response": "response_tokens"}  # in the card
_SIMILAR = 1.25  # ratio of two lengths up to which they are called similar
_OTHER_WORDS = 0.2  # Jensen-Shannon divergence from which tokens are called different
_EARLIER = "prepared by an earlier version, which recorded no row hashes and token counts"


@dataclass(frozen=True)
class RowOverlap:
    """Rows of two prepared data sets, compared by hash."""

    shared: int
    only_here: int
    only_there: int
    held_out: int  # in this run
    trained_there: int  # held out in this run, and trained on in the other one
    trained_here: int  # held out in the other run, and trained on in this one
    same_split: bool

    @classmethod
    def of(cls, own: DataProfile, other: DataProfile) -> RowOverlap:
        """Count the rows that are in both, or in only one of them."""
        here, there = own.rows, other.rows
        shared = len(np.intersect1d(here, there, assume_unique=True))
        return cls(
            shared=shared,
            only_here=len(here) - shared,
            only_there=len(there) - shared,
            held_out=len(own.validation),
            trained_there=len(np.intersect1d(own.validation, other.train)),
            trained_here=len(np.intersect1d(other.validation, own.train)),
            same_split=np.array_equal(own.validation, other.validation),
        )


@dataclass(frozen=True)
class RunData:
    """What a comparison shows of one run's data."""

    verdict: str  # "" for the run that the others are compared with
    card: Mapping[str, Any] | None  # None: not found
    sources: str
    rows: RowOverlap | None = None  # None: not recorded by both runs
    divergence: Mapping[str, float] | None = None  # of prompts and responses, 0 to 1
    same_tokenizer: bool = True


@dataclass(frozen=True)
class _Data:
    card: Mapping[str, Any] | None
    profile: DataProfile | None
    tokenizer: str | None  # SHA-256

    @classmethod
    def read(cls, folder: Path | None) -> _Data:
        if folder is None:
            return cls(None, None, None)
        provenance = folder / "provenance.json"
        inputs = read_json(provenance).get("inputs", {}) if provenance.is_file() else {}
        profile = DataProfile.read(folder)
        return cls(read_json(folder / "card.json"), profile, inputs.get("tokenizer.json"))

    @property
    def sources(self) -> dict[str, str]:
        """Hash of the content of each source, by its name."""
        card = self.card or {}
        parts = card.get("sources", [card] if "source" in card else [])
        return {part["source"]: part.get("fingerprint", "") for part in parts}


def compare_data(run: RunArtifacts, others: Sequence[RunArtifacts]) -> list[RunData]:
    """Return the data of a run and then, with a verdict, those of each other run.

    Raises:
        UserError: a file of the prepared data cannot be read.
    """
    own = _Data.read(run.data)
    found = [RunData("", own.card, ", ".join(own.sources))]
    return found + [_compare(own, _Data.read(other.data), other.name) for other in others]


def jensen_shannon(own: np.ndarray, other: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of two token counts, in bits: 0 for equal shares, 1
    without a token in common (Lin, Divergence measures based on the Shannon entropy, 1991).
    """
    shares = np.zeros((2, max(len(own), len(other))))
    for row, counts in enumerate((own, other)):
        shares[row, : len(counts)] = counts / max(1, counts.sum())
    mean = shares.mean(axis=0)
    ratio = np.divide(shares, mean, out=np.ones_like(shares), where=shares > 0)
    return float(np.sum(shares * np.log2(ratio)) / 2)


def _compare(own: _Data, other: _Data, name: str) -> RunData:
    sources = ", ".join(
        f"{source} (other content)" if own.sources.get(source, content) != content else source
        for source, content in other.sources.items()
    )
    if own.card is None or other.card is None:
        whose = name if own.card is not None else "this run"
        return RunData(f"Not compared: no data card of {whose} was found.", other.card, sources)
    same_tokenizer = own.tokenizer == other.tokenizer
    rows, divergence = None, None
    if own.profile is not None and other.profile is not None:
        rows = RowOverlap.of(own.profile, other.profile)
        if same_tokenizer:
            divergence = {
                side: jensen_shannon(getattr(own.profile, side), getattr(other.profile, side))
                for side in _SIDES
            }
    content = own.card.get("content_hash")
    if content is not None and content == other.card.get("content_hash"):
        return RunData("Same data.", other.card, sources, rows, divergence)
    said = _describe_rows(rows, name) if rows else []
    if same_tokenizer:
        said += _describe_lengths(own.card, other.card) + _describe_tokens(divergence or {})
    else:
        said.append("lengths and tokens not compared, as the tokenizers differ")
    verdict = ", ".join(said)
    verdict = f"{verdict[:1].upper()}{verdict[1:]}."
    if rows is None:
        whose = "its data were" if own.profile is not None else "this run's data were"
        verdict += f" Rows are not compared: {whose} {_EARLIER}."
    elif rows.trained_there:
        share = f"{rows.trained_there:,} of {rows.held_out:,}"
        verdict += f" {name} was trained on {share} rows held out here."
    return RunData(verdict, other.card, sources, rows, divergence, same_tokenizer)


def _describe_rows(rows: RowOverlap, name: str) -> list[str]:
    if not rows.shared:
        return ["no row in common"]
    if not rows.only_here and not rows.only_there:
        return ["same rows, " + ("prepared" if rows.same_split else "split") + " differently"]
    said = []
    if count := rows.only_here:
        said.append(f"{count:,} of {rows.shared + count:,} rows {_are(count)} new")
    if count := rows.only_there:
        said.append(f"{count:,} of {name}'s {rows.shared + count:,} {_are(count)} missing")
    return said


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _describe_lengths(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    said = []
    for side, key in _SIDES.items():
        if not (isinstance(own.get(key), Mapping) and isinstance(other.get(key), Mapping)):
            return []
        for what, quantile in ((f"{side}s", "median"), (f"the longest {side}s", "p95")):
            ratio = own[key][quantile] / max(1, other[key][quantile])
            if not 1 / _SIMILAR < ratio < _SIMILAR:
                said.append(f"{what} are {_times(ratio)} as long")
                break
    return said or ["similar lengths"]


def _times(ratio: float) -> str:
    if 1.9 <= ratio <= 2.1:
        return "twice"
    return "half" if 0.47 <= ratio <= 0.53 else f"{ratio:.2g} times"


def _describe_tokens(divergence: Mapping[str, float]) -> list[str]:
    sides = [f"{side}s" for side, bits in divergence.items() if bits >= _OTHER_WORDS]
    return [f"other words in {' and '.join(sides)}"] if sides else []

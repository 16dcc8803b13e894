"""The account of a preparation: every row that was read is kept or dropped for a reason that is counted."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from typing import Any

from canvastune.config.schema import DataConfig
from canvastune.errors import UserError
from canvastune.io.hashing import hash_path
from canvastune.preparation.chat_format import Form, needed_columns
from canvastune.preparation.readers import Row, Source

logger = logging.getLogger(__name__)

BAD = "bad row"
DUPLICATE = "duplicate of an earlier row"
NO_ROOM = "prefix leaves no room for the response in seq_length"
BEYOND = "held out beyond validation_rows"

_LISTED = 50  # bad rows listed in the card
_NAMED = 5  # rows named in an error
_PROGRESS_SECONDS = 2.0
_BARS = 24  # of a histogram, about


class DatasetStats:
    """Counts rows as they pass, shows progress, and refuses what the config does not allow. Memory: a number per distinct length."""

    def __init__(self, config: DataConfig, source: Source, canvas_length: int) -> None:
        self.config = config
        self.form: Form | None = None  # set by the first row of a known form
        self.rows_read = 0
        self.kept = 0
        self.cut = 0
        self.dropped: Counter[str] = Counter()
        self._source = source
        self._canvas_length = canvas_length
        self._bad: list[Row] = []
        self._reasons: list[str] = []
        self._repeats: list[Row] = []
        self._longest_prefix: tuple[int, Row] | None = None
        self._prefixes: Counter[int] = Counter()
        self._responses: Counter[int] = Counter()
        self._lengths: Counter[int] = Counter()
        self._blocks: Counter[int] = Counter()
        # Files have a fingerprint of their own; rows that come from the Hub are hashed as they pass.
        self._digest = hashlib.sha256()
        self._started = self._shown = time.monotonic()

    def read(self, row: Row) -> None:
        """Count a row that was read, whatever becomes of it."""
        self.rows_read += 1
        if self._source.path is None:
            self._digest.update(json.dumps(row.value, sort_keys=True, default=str).encode() + b"\n")
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            limit = f" of at most {self.config.max_rows:,}" if self.config.max_rows else ""
            rate = self.rows_read / (now - self._started)
            logger.info(f"prepare_data: {self.rows_read:,} rows read{limit}, {self.kept:,} kept, {rate:,.0f} rows/s")

    def bad(self, row: Row, reason: str) -> None:
        """Count a row that cannot be trained on."""
        self.dropped[BAD] += 1
        if len(self._bad) < _LISTED:
            self._bad.append(row)
            self._reasons.append(reason)

    def duplicate(self, row: Row) -> None:
        """Count a row that repeats an earlier one."""
        self.dropped[DUPLICATE] += 1
        if len(self._repeats) < _NAMED:
            self._repeats.append(row)

    def no_room(self, row: Row, prefix: int) -> None:
        """Count a row whose prefix fills `seq_length`."""
        self.dropped[NO_ROOM] += 1
        if self._longest_prefix is None or prefix > self._longest_prefix[0]:
            self._longest_prefix = (prefix, row)

    def keep(self, prefix: int, response: int) -> None:
        """Count a row that is kept, by its tokens before the cut."""
        self._count(prefix, response, 1)

    def beyond(self, left_out: list[tuple[int, int]]) -> None:
        """Take back held-out rows that `validation_rows` leaves out, each by its prefix and response tokens before the cut."""
        self.dropped[BEYOND] += len(left_out)
        for prefix, response in left_out:
            self._count(prefix, response, -1)

    def _count(self, prefix: int, response: int, sign: int) -> None:
        trained = min(response, self.config.seq_length - prefix)
        self.kept += sign
        self.cut += sign * (trained < response)
        self._prefixes[prefix] += sign
        self._responses[response] += sign
        self._lengths[prefix + response] += sign
        self._blocks[-(-trained // self._canvas_length)] += sign

    def refuse(self) -> None:
        """Apply the thresholds, once every row was read.

        Raises:
            UserError: too many bad rows or duplicates (the first few are named), or nothing left.
        """
        label, read = self._source.label, self.rows_read
        if self.dropped[BAD] > self.config.max_bad_row_fraction * read:
            raise UserError(
                f"{label}: {self.dropped[BAD]:,} of {read:,} rows cannot be trained on ({self.dropped[BAD] / read:.1%}); "
                f"data.max_bad_row_fraction allows {self.config.max_bad_row_fraction:.1%}:\n{self._named()}\n"
                "Repair or remove these rows, or raise data.max_bad_row_fraction: bad rows are then left out and listed in the data card"
            )
        if self.dropped[DUPLICATE] > self.config.max_duplicate_fraction * read:
            named = "\n".join(f"  {row.file}: row {row.number}" for row in self._repeats)
            raise UserError(
                f"{label}: {self.dropped[DUPLICATE]:,} of {read:,} rows repeat an earlier one ({self.dropped[DUPLICATE] / read:.1%}); "
                f"data.max_duplicate_fraction allows {self.config.max_duplicate_fraction:.1%}. The first that do:\n{named}\n"
                "Was a file given twice? Remove the repeats, or raise data.max_duplicate_fraction: each conversation is then kept once"
            )
        if self.kept == 0:
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in self.dropped.items() if count)
            longest = self._longest_prefix
            hint = f"The longest prefix has {longest[0]} tokens: raise data.seq_length" if longest else "Give other data"
            raise UserError(f"{label}: none of the {read:,} rows is left to train on ({reasons}). {hint}")

    def card(self) -> dict[str, Any]:
        """The counted part of the data card."""
        return {
            "source": self._source.label,
            "format": self.form,
            "fingerprint": self._digest.hexdigest() if self._source.path is None else hash_path(self._source.path),
            "rows_read": self.rows_read,
            "kept": self.kept,
            "dropped": {reason: self.dropped[reason] for reason in (BAD, DUPLICATE, NO_ROOM, BEYOND) if self.dropped[reason]},
            "cut": self.cut,
            "bad": self.dropped[BAD],
            "bad_rows": [
                {"file": row.file, "row": row.number, "reason": reason} for row, reason in zip(self._bad, self._reasons, strict=True)
            ],
            "token_histogram": histogram(+self._lengths),
            "block_histogram": {str(blocks): count for blocks, count in sorted((+self._blocks).items())},
            "prefix_tokens": spread(+self._prefixes),
            "response_tokens": spread(+self._responses),
        }

    def _named(self) -> str:
        named = [f"  {row.file}: row {row.number}: {reason}" for row, reason in zip(self._bad, self._reasons, strict=True)][:_NAMED]
        if (more := self.dropped[BAD] - len(named)) > 0:
            named.append(f"  and {more:,} more")
        return "\n".join(named)


def unknown_form(row: Row, config: DataConfig) -> str:
    """Why a row is of no form that is known, and what to do."""
    if not isinstance(row.value, dict):
        found = type(row.value).__name__
        return (
            f"{row.file}: row {row.number}: expected an object, found {found}, and no row of a known form after it. "
            "Write an object with named columns per row"
        )
    found = ", ".join(map(str, row.value)) or "none"
    prompt, response = config.columns.prompt, config.columns.response
    if config.format == "auto":
        return (
            f"{row.file}: row {row.number}: no known form (columns found: {found}). Expected messages; or question and answer; or {prompt} "
            f"and {response}. Name your own with data.format=columns data.columns.prompt=... data.columns.response=..."
        )
    needed = needed_columns(config.format, config.columns)
    missing = ", ".join(key for key in needed if key not in row.value)
    remedy = "data.columns.prompt and data.columns.response" if config.format == "columns" else "data.format"
    return (
        f"{row.file}: row {row.number}: data.format is {config.format}: no column {missing} (columns found: {found}). Set {remedy} to match"
    )


def spread(lengths: Counter[int]) -> dict[str, float]:
    """Smallest, mean, median, 95th percentile and largest of counted lengths, and their sum."""
    total = lengths.total()
    summed = sum(length * count for length, count in lengths.items())
    ordered = sorted(lengths.items())

    def at(share: float) -> int:
        passed = 0
        for length, count in ordered:
            passed += count
            if passed >= share * total:
                return length
        return ordered[-1][0]

    return {
        "min": ordered[0][0],
        "mean": round(summed / total, 1),
        "median": at(0.5),
        "p95": at(0.95),
        "max": ordered[-1][0],
        "sum": summed,
    }


def histogram(lengths: Counter[int]) -> dict[str, list[int]]:
    """Counted lengths in bars of equal width: bar i counts `edges[i] <= length < edges[i + 1]`."""
    low, high = min(lengths), max(lengths)
    width = next(w for power in range(12) for w in (10**power, 2 * 10**power, 5 * 10**power) if w * _BARS >= high - low + 1)
    first = low // width * width
    edges = list(range(first, high + width + 1, width))
    if edges[-2] > high:
        edges.pop()
    counts = [0] * (len(edges) - 1)
    for length, count in lengths.items():
        counts[(length - first) // width] += count
    return {"edges": edges, "counts": counts}

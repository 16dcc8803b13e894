"""Counts of a preparation: every row is kept, or dropped for a reason that is counted."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from canvastune.config.data import DataConfig
from canvastune.errors import UserError
from canvastune.preparation.conversation import Conversation, InvalidRow, ParsedRow
from canvastune.preparation.readers import Row
from canvastune.preparation.row_formats import RowFormat

logger = logging.getLogger(__name__)

# The reasons as the card has them.
INVALID = "bad row"
DUPLICATE = "duplicate of an earlier row"
REPEATED = "turn that an earlier row learns"
HELD_OUT = "repeats a row of data.validation"
NO_ROOM = "prefix leaves no room for the response in seq_length"
BEYOND = "held out beyond validation_rows"
CALLS = "learned with tool calls"
NOT_LEARNED = "marked as not to be learned"
UNUSED_TURNS = "after the last answer"

_LISTED = 50  # invalid rows listed in the card
_NAMED = 5  # rows named in an error
_BARS = 24  # of a histogram, approximately


class DatasetStats:
    """Counts of rows and tokens. Memory: a number per distinct length."""

    def __init__(self, seq_length: int, canvas_length: int) -> None:
        self.row_format: RowFormat | None = None  # set by the first row of a known format
        self.rows_read = 0
        self.further_examples = 0  # beyond one per row, with data.learn=all
        self.kept = 0
        self.cut = 0
        self.dropped: Counter[str] = Counter()
        self.invalid_rows: list[tuple[Row, str]] = []  # the first ones, each with its reason
        self.unused: Counter[str] = Counter()  # rows with a value, by column or message key
        self.unseen_ignored: set[str] = set()  # names in data.ignore that no row has
        self.foreign: Counter[str] = Counter()  # examples with a control token of other models
        self.turns: Counter[str] = Counter()
        self._hints: Counter[str] = Counter()  # what to do about the invalid rows
        self.duplicates: list[Row] = []  # the first ones
        self.longest_prefix = 0  # tokens, of rows without room for a response
        self._seq_length = seq_length
        self._canvas_length = canvas_length
        self._prefixes: Counter[int] = Counter()
        self._responses: Counter[int] = Counter()
        self._lengths: Counter[int] = Counter()
        self._blocks: Counter[int] = Counter()

    def count_turns(self, parsed: ParsedRow, examples: Sequence[Conversation]) -> None:
        """Count a row's assistant turns, and what of the row is not used."""
        learned = len(examples)
        for example in examples:
            self.count_learned(example)
        last = parsed.answers[-1]
        answers = len(parsed.answers) + (parsed.messages[0]["role"] == "assistant")
        if answers > learned:
            self.turns["context"] += answers - learned
        left = len(parsed.messages) - 1 - last
        # Gemma's own form has them in the message of the call.
        left += len(parsed.messages[last].get("tool_responses", ()))
        if left:
            self.turns[UNUSED_TURNS] += left
        if parsed.unused:
            self.unused.update(parsed.unused)
        if learned:
            self.further_examples += learned - 1
        else:
            self.dropped[NOT_LEARNED] += 1

    def count_learned(self, example: Conversation, sign: int = 1) -> None:
        """Count the turn that an example learns; with -1, take it back: the example is dropped."""
        last = example.messages[-1]
        self.turns["learned"] += sign
        if "tool_calls" in last:
            self.turns[CALLS] += sign
        if "reasoning" in last:
            self.turns["learned with thinking"] += sign

    def drop_invalid(
        self, row: Row, reason: InvalidRow, example: Conversation | InvalidRow
    ) -> None:
        """Count a row that cannot be trained on; of one that was read, an example."""
        if isinstance(example, Conversation):
            self.count_learned(example, -1)
        self.dropped[INVALID] += 1
        self._hints[reason.hint] += 1
        if len(self.invalid_rows) < _LISTED:
            self.invalid_rows.append((row, str(reason)))

    @property
    def hint(self) -> str:
        """What most of the invalid rows need, or "" if nothing in common."""
        hint, count = self._hints.most_common(1)[0]
        return hint if 2 * count > self.dropped[INVALID] else ""

    def drop_duplicate(self, row: Row) -> None:
        """Count a row that repeats an earlier one."""
        self.dropped[DUPLICATE] += 1
        if len(self.duplicates) < _NAMED:
            self.duplicates.append(row)

    def drop_repeated(self, example: Conversation) -> None:
        """Count a turn that an earlier row, which begins alike, has and learns."""
        self.dropped[REPEATED] += 1
        self.count_learned(example, -1)

    def drop_held_out(self) -> None:
        """Count a training row that repeats a row of `data.validation`."""
        self.dropped[HELD_OUT] += 1

    def drop_long_prefix(self, prefix: int, example: Conversation) -> None:
        """Count an example whose prefix fills `seq_length`."""
        self.count_learned(example, -1)
        self.dropped[NO_ROOM] += 1
        self.longest_prefix = max(self.longest_prefix, prefix)

    def keep(self, prefix: int, response: int, foreign: Sequence[str] = ()) -> None:
        """Count a kept row: its tokens before the cut, and control tokens of other models in it."""
        self._count(prefix, response, 1)
        if foreign:
            self.foreign.update(foreign)

    def drop_beyond(self, left_out: list[tuple[int, int]]) -> None:
        """Move held-out rows beyond `validation_rows` from kept to dropped.

        Args:
            left_out: prefix and response tokens of each row, before the cut.
        """
        self.dropped[BEYOND] += len(left_out)
        for prefix, response in left_out:
            self._count(prefix, response, -1)

    def _count(self, prefix: int, response: int, sign: int) -> None:
        trained = min(response, self._seq_length - prefix)
        self.kept += sign
        self.cut += sign * (trained < response)
        self._prefixes[prefix] += sign
        self._responses[response] += sign
        self._lengths[prefix + response] += sign
        self._blocks[-(-trained // self._canvas_length)] += sign

    @classmethod
    def total(cls, parts: Sequence[DatasetStats]) -> DatasetStats:
        """Return the counts of several data sets together."""
        total = cls(parts[0]._seq_length, parts[0]._canvas_length)
        total.unseen_ignored = set.intersection(*(part.unseen_ignored for part in parts))
        for part in parts:
            total.rows_read += part.rows_read
            total.kept += part.kept
            total.cut += part.cut
            total.further_examples += part.further_examples
            total.longest_prefix = max(total.longest_prefix, part.longest_prefix)
            total.invalid_rows = (total.invalid_rows + part.invalid_rows)[:_LISTED]
            for name in (
                "dropped",
                "turns",
                "unused",
                "foreign",
                "_prefixes",
                "_responses",
                "_lengths",
                "_blocks",
            ):
                getattr(total, name).update(getattr(part, name))
        return total

    def remarks(self) -> list[str]:
        """Return what a user may not expect, a sentence each: examples that are too long, turns
        that are context only, columns that are not used.
        """
        said = []
        if too_long := self.dropped[NO_ROOM]:
            said.append(
                f"{too_long:,} of {self.rows_read + self.further_examples:,} examples are dropped:"
                f" their prefix, of up to {self.longest_prefix:,} tokens, fills data.seq_length"
                f" ({self._seq_length:,})"
            )
        if self.cut:
            said.append(
                f"{self.cut:,} of {self.kept:,} responses are cut, so that their end is not learned:"
                f" the longest example has {max(+self._lengths):,} tokens, data.seq_length is"
                f" {self._seq_length:,}"
            )
        if context := self.turns["context"]:
            said.append(
                f"{self.turns['learned']:,} assistant turns are learned, {context:,} are context"
                " only (data.learn)"
            )
        if after := self.turns[UNUSED_TURNS]:
            said.append(f"{after:,} turns after the last answer of their row are left out")
        if self.unseen_ignored:
            said.append(f"data.ignore: no row has {', '.join(sorted(self.unseen_ignored))}")
        if self.unused:
            names = ", ".join(
                f"{name} ({rows:,} rows)" for name, rows in sorted(self.unused.items())
            )
            said.append(f"not used: {names}; list the ones that you do not need in data.ignore")
        if self.foreign:
            names = ", ".join(
                f"{name} ({count:,} examples)" for name, count in sorted(self.foreign.items())
            )
            said.append(
                f"control tokens of other models, which are text to this one and learned as such:"
                f" {names}; remove them if the texts were rendered with another model's template"
            )
        return said

    def card(self) -> dict[str, Any]:
        """Return the counted part of the data card."""
        reasons = (INVALID, DUPLICATE, REPEATED, HELD_OUT, NOT_LEARNED, NO_ROOM, BEYOND)
        return {
            "rows_read": self.rows_read,
            "examples": self.rows_read + self.further_examples,
            "kept": self.kept,
            "dropped": {reason: self.dropped[reason] for reason in reasons if self.dropped[reason]},
            "cut": self.cut,
            "turns": {name: turns for name, turns in self.turns.items() if turns},
            "unused": dict(sorted(self.unused.items())),
            "foreign_control_tokens": dict(sorted(self.foreign.items())),
            "bad": self.dropped[INVALID],
            "too_long": self.dropped[NO_ROOM],
            "bad_rows": [
                {"file": row.file, "row": row.number, "reason": reason}
                for row, reason in self.invalid_rows
            ],
            "token_histogram": histogram(+self._lengths),
            "block_histogram": {
                str(blocks): count for blocks, count in sorted((+self._blocks).items())
            },
            "prefix_tokens": spread(+self._prefixes),
            "response_tokens": spread(+self._responses),
        }


def check_thresholds(stats: DatasetStats, config: DataConfig, label: str) -> None:
    """Refuse a data set with too many rows that are invalid, duplicates or too long, or with
    nothing left.

    Args:
        label: the data set's name, for messages.

    Raises:
        UserError: the first few of the rows are named.
    """
    read, invalid, repeated = stats.rows_read, stats.dropped[INVALID], stats.dropped[DUPLICATE]
    examples = read + stats.further_examples
    if invalid > config.max_bad_row_fraction * examples:
        what = "examples" if stats.further_examples else "rows"
        named = [
            f"  {row.file}: row {row.number}: {reason}"
            for row, reason in stats.invalid_rows[:_NAMED]
        ]
        if (more := invalid - len(named)) > 0:
            named.append(f"  and {more:,} more")
        rows = "\n".join(named)
        raise UserError(
            f"{label}: {invalid:,} of {examples:,} {what} cannot be trained on"
            f" ({invalid / examples:.1%}), "
            f"expected at most {config.max_bad_row_fraction:.1%} "
            f"(data.max_bad_row_fraction):\n{rows}",
            hint=stats.hint
            or (
                "Correct or remove these rows, or raise data.max_bad_row_fraction: invalid rows "
                "are then left out and listed in the data card."
            ),
        )
    if repeated > config.max_duplicate_fraction * read:
        rows = "\n".join(f"  {row.file}: row {row.number}" for row in stats.duplicates)
        raise UserError(
            f"{label}: {repeated:,} of {read:,} rows repeat an earlier one "
            f"({repeated / read:.1%}), "
            f"expected at most {config.max_duplicate_fraction:.1%} (data.max_duplicate_fraction). "
            f"The first ones:\n{rows}",
            hint=(
                "Check whether a file was listed twice. Remove the duplicates, or raise "
                "data.max_duplicate_fraction: each conversation is then kept once."
            ),
        )
    if stats.kept == 0:
        reasons = "; ".join(f"{count:,}: {why}" for why, count in stats.dropped.items() if count)
        raise UserError(
            f"{label}: none of the {read:,} rows is left to train on ({reasons})",
            hint=(
                f"The longest prefix has {stats.longest_prefix} tokens; raise data.seq_length."
                if stats.longest_prefix
                else "Use other data for one of data.source and data.validation."
                if stats.dropped[HELD_OUT]
                else "Set data.learn=all to learn the turns that are not marked, or data.ignore to the"
                " key of the marks to learn every turn alike."
                if stats.dropped[NOT_LEARNED]
                else "Use other data."
            ),
        )
    too_long = stats.dropped[NO_ROOM]
    if too_long > config.max_too_long_fraction * examples:
        raise UserError(
            f"{label}: the prefix of {too_long:,} of {examples:,} examples fills data.seq_length "
            f"({too_long / examples:.1%}), expected at most {config.max_too_long_fraction:.1%} "
            "(data.max_too_long_fraction)",
            hint=(
                f"The longest prefix has {stats.longest_prefix:,} tokens: raise data.seq_length (now "
                f"{config.seq_length:,}), or raise data.max_too_long_fraction to drop such examples."
            ),
        )


class ProgressLog:
    """Logs the counts at a fixed interval while rows are read."""

    def __init__(self, stats: Sequence[DatasetStats], limit: int | None, seconds: float) -> None:
        self._stats = stats  # of each data set
        self._limit = f" of at most {limit:,}" if limit else ""
        self._seconds = seconds
        self._started = self._shown = time.monotonic()

    def update(self) -> None:
        """Log the counts, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._shown >= self._seconds:
            self._shown = now
            read = sum(stats.rows_read for stats in self._stats)
            kept = sum(stats.kept for stats in self._stats)
            rate = read / (now - self._started)
            logger.info(
                f"prepare_data: {read:,} rows read{self._limit}, {kept:,} kept, {rate:,.0f} rows/s"
            )


def spread(lengths: Counter[int]) -> dict[str, float]:
    """Return min, mean, median, 95th percentile, max and sum of counted lengths."""
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
    """Bin lengths in bars of equal width: bar i counts `edges[i] <= length < edges[i + 1]`."""
    low, high = min(lengths), max(lengths)
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if width * _BARS >= high - low + 1)
    first = low // width * width
    edges = list(range(first, high + width + 1, width))
    if edges[-2] > high:
        edges.pop()
    counts = [0] * (len(edges) - 1)
    for length, count in lengths.items():
        counts[(length - first) // width] += count
    return {"edges": edges, "counts": counts}

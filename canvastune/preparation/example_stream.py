"""From the rows of all data sets to examples, in order: each row is one or several examples, a
repeat, or invalid for a reason.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Generator, Iterator, Sequence

from canvastune.config.data import DataConfig
from canvastune.errors import UserError
from canvastune.preparation.conversation import Conversation, InvalidRow
from canvastune.preparation.parts import Part
from canvastune.preparation.readers import Row
from canvastune.preparation.row_formats import RowReader, detect_format, unknown_format
from canvastune.preparation.stats import DatasetStats, ProgressLog

_UNDETECTED = 100  # rows searched for a known format


class _Seen:
    """What was read before, as digests: the rows, and the turns that they learn. With
    `data.learn: last`, a row is its only turn.
    """

    def __init__(self) -> None:
        self.rows: set[bytes] = set()
        self.turns: set[bytes] = set()

    def add_row(self, row: bytes | None, turn: bytes) -> bool:
        """Add a row, or if it has no id, look for its turn; return whether it was there before."""
        if row is None:
            return turn in self.turns
        known = row in self.rows
        self.rows.add(row)
        return known


def read_examples(
    parts: Sequence[Part], progress: ProgressLog, described: Collection[str] = ()
) -> Generator[tuple[Row, Conversation | InvalidRow], None, None]:
    """Turn each row of each data set into a conversation, or into the reason why it is not one;
    repeated ones are counted and left out.

    Args:
        described: as for `RowReader`.
    """
    held_out, trained = _Seen(), _Seen()
    for index, part in enumerate(parts):
        seen = held_out if part.held_out else trained
        with contextlib.closing(part.source.rows(source=index)) as rows:
            limit = None if part.held_out else part.config.max_rows
            counted = part.count(itertools.islice(rows, limit), progress)
            yield from _conversations(counted, part, seen, held_out, described)


def _conversations(
    rows: Iterator[Row], part: Part, seen: _Seen, held_out: _Seen, described: Collection[str]
) -> Iterator[tuple[Row, Conversation | InvalidRow]]:
    config, stats = part.config, part.stats
    waiting: list[Row] = []  # rows before the first one of a known format
    reader: RowReader | None = None
    for row in rows:
        if reader is None and isinstance(row.value, dict):
            with_value = [key for key, item in row.value.items() if item is not None]
            stats.row_format = detect_format(config, with_value) or detect_format(
                config, list(row.value)
            )
            if stats.row_format is not None:
                reader = RowReader(stats.row_format, config, config, described)
        if reader is None:
            waiting.append(row)
            if len(waiting) == _UNDETECTED:
                break
            continue
        for each in [*waiting, row]:
            for example in _examples(each, reader, stats, seen, held_out):
                yield each, example
        waiting.clear()
    for row in waiting:
        if row.problem is None:
            raise unknown_format(row.value, f"{row.file}: row {row.number}", config)
        yield row, InvalidRow(row.problem)
    if reader is not None:
        stats.unseen_ignored = reader.unseen_ignored
        _refuse_unseen(reader, config)


def _examples(
    row: Row, reader: RowReader, stats: DatasetStats, seen: _Seen, held_out: _Seen
) -> list[Conversation | InvalidRow]:
    """Return a row's examples, or why it has none; none at all if it repeats another row or is not
    to be learned, which is counted.
    """
    try:
        if row.problem is not None:
            raise InvalidRow(row.problem)
        parsed, examples = reader.read(row.value)
    except InvalidRow as reason:
        return [reason]
    repeated: list[Conversation] = []
    if examples:
        digests = [bytes.fromhex(example.id)[:16] for example in examples]
        # Each turn that is learned: one may be the last turn of a row on the other side.
        if seen is not held_out and not held_out.turns.isdisjoint(digests):
            stats.drop_held_out()  # the model would be judged on what it learned
            return []
        row_id = examples[-1].row_id
        if seen.add_row(bytes.fromhex(row_id)[:16] if row_id else None, digests[-1]):
            stats.drop_duplicate(row)
            return []
        # A row may begin as another one does. A turn that both learn would be learned twice, or be
        # on both sides of the split.
        if not seen.turns.isdisjoint(digests):
            repeated = [
                example
                for example, digest in zip(examples, digests, strict=True)
                if digest in seen.turns
            ]
        seen.turns.update(digests)
    stats.count_turns(parsed, examples)
    if not repeated:
        return list(examples)
    for example in repeated:
        stats.drop_repeated(example)
    return [example for example in examples if not any(example is each for each in repeated)]


def _refuse_unseen(reader: RowReader, config: DataConfig) -> None:
    """Refuse a column that the recipe names and no row has: a typing error would lose it."""
    for column, name in reader.unseen.items():
        raise UserError(
            f"data.columns.{name}: no row of {config.source} has a column {column!r}",
            hint=f"Correct the name, or leave data.columns.{name} out.",
        )

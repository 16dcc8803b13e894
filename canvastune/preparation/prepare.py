"""The step `prepare_data`: a user's rows become tokenized train and validation splits, with a card
that counts every row.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import MemoryMappedTable
from transformers import PreTrainedTokenizerBase

from canvastune.config import RunConfig
from canvastune.config.schema import DataConfig
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from canvastune.io.hashing import hash_path
from canvastune.io.provenance import local_inputs, write_provenance
from canvastune.preparation.card import write_card
from canvastune.preparation.chat_template import ChatEncoder, EncodedConversation
from canvastune.preparation.conversation import Conversation, InvalidRow
from canvastune.preparation.parts import Part, describe_parts, log_parts, write_mixture
from canvastune.preparation.readers import Row
from canvastune.preparation.row_formats import RowReader, detect_format, unknown_format
from canvastune.preparation.sources import open_sources
from canvastune.preparation.stats import CALLS, DatasetStats, ProgressLog, check_thresholds
from canvastune.preparation.tokenize_pool import Batch, EncoderPool, encode, usable_cpus
from canvastune.preparation.tokenizer import check_end_of_call, check_end_of_turn, load_tokenizer

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("prefix_length", pa.int32()),
        ("complete", pa.bool_()),
        ("id", pa.string()),
        ("origin", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
    ]
)
_HASHED_ROWS = 512  # rows hashed at a time
_UNDETECTED = 100  # rows searched for a known format
_SAMPLES = 3
_to_json = json.JSONEncoder(
    ensure_ascii=False
).encode  # json.dumps would create an encoder for every row


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


@dataclass(frozen=True)
class Throughput:
    """Sizes and intervals of a preparation; the prepared data does not depend on them."""

    batch_rows: int = 512  # conversations rendered and tokenized at a time
    batch_characters: int = 4 * 2**20  # fewer conversations if they are long
    local_batches: int = (
        2  # encoded in this process before others are started, which takes a second
    )
    progress_seconds: float = 2.0
    pool: Callable[[ChatEncoder, int], EncoderPool] = EncoderPool


def prepare_data(
    config: RunConfig,
    model: Path,
    out: Path,
    processes: int | None = None,
    throughput: Throughput = Throughput(),
) -> dict[str, Any]:
    """Write the prepared data set into `out` and return its card.

    `out` gets `train/` and `validation/` (`datasets.Dataset.save_to_disk`), `card.json`,
    `card.html`, `config.yaml` and `provenance.json`; it appears complete or not at all. Memory does
    not grow with the text: a few hundred rows at a time, and about 100 bytes a row to find
    duplicates.

    Args:
        model: the checkpoint's directory; its config, generation config and tokenizer are read, its
            weights are not.
        processes: that render and tokenize, including this one, once a few thousand rows are read;
            the result does not depend on it. Default: one per CPU, up to 8.

    Raises:
        UserError: data that cannot be read, too many invalid rows or duplicates, nothing left to
            train on or to validate with, a tokenizer that does not belong to the model, an `out`
            that is not empty.
    """
    started = time.monotonic()
    with atomic_directory(out) as folder:
        loaded = load_tokenizer(model)
        encoder = ChatEncoder(loaded.tokenizer, str(model))
        check_end_of_turn(model, encoder.closing, encoder.closing_ids)
        parts = [
            Part(opened, DatasetStats(config.data.seq_length, loaded.canvas_length))
            for opened in open_sources(config.data)
        ]
        progress = ProgressLog(
            [part.stats for part in parts],
            config.data.max_rows if len(parts) == 1 else None,
            throughput.progress_seconds,
        )
        samples: list[dict[str, Any]] = []
        train = _Split(folder / "train", throughput)
        validation = _Split(folder / "validation", throughput)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_frozen_garbage())
            found = stack.enter_context(contextlib.closing(_read_all(parts, progress)))
            batches = _batches(found, throughput)
            count = processes or usable_cpus()
            encoding = stack.enter_context(
                contextlib.closing(
                    encode(
                        batches,
                        encoder,
                        count,
                        local_batches=throughput.local_batches,
                        pool=throughput.pool,
                    )
                )
            )
            for batch, answers in encoding:
                tokens = iter(answers)
                for row, conversation in batch:
                    part = parts[row.source]
                    stats = part.stats
                    encoded = (
                        next(tokens) if isinstance(conversation, Conversation) else conversation
                    )
                    if isinstance(encoded, InvalidRow):
                        stats.drop_invalid(row, encoded, conversation)
                        continue
                    assert isinstance(conversation, Conversation)
                    example = _example(row, conversation, encoded, config.data.seq_length)
                    if example is None:
                        stats.drop_long_prefix(encoded.prefix_length, conversation)
                        continue
                    response = len(encoded.tokens) - encoded.prefix_length
                    stats.keep(encoded.prefix_length, response)
                    if stats.kept <= _SAMPLES and not part.held_out:
                        samples.append(_sample(example, loaded.tokenizer))
                    held_out = part.held_out or (
                        config.data.validation is None
                        and _split_position(conversation.group) < config.data.validation_fraction
                    )
                    (validation if held_out else train).add(
                        example, response, conversation.group, row.source
                    )
        for part in parts:
            check_thresholds(part.stats, part.config, part.source.label)
        _refuse_empty(train, validation, parts, config.data)
        for index, left_out in validation.keep_smallest_ids(config.data.validation_rows).items():
            parts[index].stats.drop_beyond(left_out)
        splits = {"train": train.save(), "validation": validation.save()}
        rows = (train.rows_by_source(), validation.rows_by_source())
        write_mixture(parts, rows[0], folder / "train")
        card: dict[str, Any] = {
            **describe_parts(parts, *rows),
            "train": len(splits["train"]),
            "validation": len(splits["validation"]),
            "seq_length": config.data.seq_length,
            "canvas_length": loaded.canvas_length,
            "tokenizer": type(loaded.tokenizer).__name__,
            "vocab_size": loaded.vocab_size,
            "samples": samples,
            "content_hash": _content_hash(splits),
            "seconds": round(time.monotonic() - started, 2),
        }
        log_parts(parts, *rows)
        write_card(card, folder)
        read = {"config.json": model / "config.json", "tokenizer.json": model / "tokenizer.json"}
        write_provenance(folder, "prepare_data", config, read | local_inputs(config.data))
    counts = DatasetStats.total([part.stats for part in parts])
    closing = encoder.call_closing_id if counts.turns[CALLS] else None
    ends = check_end_of_call(model, loaded.tokenizer, closing)
    _log_summary(card, [*counts.remarks(), *ends])
    return card


def _read_all(
    parts: Sequence[Part], progress: ProgressLog
) -> Generator[tuple[Row, Conversation | InvalidRow], None, None]:
    """Turn each row of each data set into a conversation, or into the reason why it is not one;
    repeated ones are counted and left out.
    """
    held_out, trained = _Seen(), _Seen()
    for index, part in enumerate(parts):
        seen = held_out if part.held_out else trained
        with contextlib.closing(part.source.rows(source=index)) as rows:
            limit = None if part.held_out else part.config.max_rows
            counted = part.count(itertools.islice(rows, limit), progress)
            yield from _conversations(counted, part, seen, held_out)


def _conversations(
    rows: Iterator[Row], part: Part, seen: _Seen, held_out: _Seen
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
                reader = RowReader(stats.row_format, config, config)
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
        repeated = [
            example
            for example, digest in zip(examples, digests, strict=True)
            if digest in seen.turns
        ]
        seen.turns.update(digests)
    stats.count_turns(parsed, examples)
    for example in repeated:
        stats.drop_repeated(example)
    return [example for example in examples if not any(example is each for each in repeated)]


def _log_summary(card: dict[str, Any], remarks: list[str]) -> None:
    for remark in remarks:
        logger.info(f"prepare_data: {remark}")
    if card["seconds"] > 2:
        total = f"{card['rows_read']:,} rows read, {card['kept']:,} kept"
        logger.info(
            f"prepare_data: {total} ({card['train']:,} train, {card['validation']:,} validation) in"
            f" {card['seconds']} s"
        )


def _refuse_unseen(reader: RowReader, config: DataConfig) -> None:
    """Refuse a column that the recipe names and no row has: a typing error would lose it."""
    for column, name in reader.unseen.items():
        raise UserError(
            f"data.columns.{name}: no row of {config.source} has a column {column!r}",
            hint=f"Correct the name, or leave data.columns.{name} out.",
        )


def _batches(
    found: Iterator[tuple[Row, Conversation | InvalidRow]], limits: Throughput
) -> Iterator[Batch]:
    """Group conversations for one call of the tokenizer, bounded in rows and in characters."""
    batch: Batch = []
    characters = 0
    for row, conversation in found:
        batch.append((row, conversation))
        if isinstance(conversation, Conversation):
            characters += conversation.characters
        if len(batch) == limits.batch_rows or characters > limits.batch_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _example(
    row: Row, conversation: Conversation, encoded: EncodedConversation, seq_length: int
) -> dict[str, Any] | None:
    """Return the row of the prepared data set, cut to `seq_length` tokens; None if no response
    token would be left.
    """
    if encoded.prefix_length >= seq_length:
        return None
    return {
        "input_ids": encoded.tokens[:seq_length],
        "prefix_length": encoded.prefix_length,
        "complete": len(encoded.tokens) <= seq_length,
        "id": conversation.id,
        "origin": row.origin if conversation.turn is None else f"{row.origin}#{conversation.turn}",
        "prompt": _to_json(conversation.history),
        "answer": conversation.answer if encoded.answer is None else encoded.answer,
    }


def _split_position(id: str) -> float:
    """Map a conversation's id to [0, 1): uniform, and independent of the rest of the data set."""
    return int(id[:13], 16) / 16**13


def _sample(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    split = example["prefix_length"]
    return {
        "origin": example["origin"],
        "prefix": tokenizer.decode(example["input_ids"][:split].tolist()),
        "response": tokenizer.decode(example["input_ids"][split:].tolist()),
        "tokens": len(example["input_ids"]),
        "complete": example["complete"],
    }


def _refuse_empty(
    train: _Split, validation: _Split, parts: Sequence[Part], config: DataConfig
) -> None:
    rows, held_out = train.rows_by_source(), validation.rows_by_source()
    for index, part in enumerate(parts):
        if not part.held_out and rows[index] == 0:
            raise UserError(
                f"{part.source.label}: all of the {held_out[index]} rows kept are in the validation"
                " split, expected at least one to train on",
                hint=(
                    "Use more rows, or lower data.validation_fraction (now"
                    f" {config.validation_fraction:g})."
                ),
            )
    if validation.count == 0:
        enough = math.ceil(train.lowest * 10_000 + 1) / 10_000
        raise UserError(
            f"{config.label}: none of the {train.count} rows kept is in the validation split,"
            " expected at least one",
            hint=(
                "Use more rows, or raise data.validation_fraction (now"
                f" {config.validation_fraction:g}) to {enough:g}."
            ),
        )


def _content_hash(splits: dict[str, datasets.Dataset]) -> str:
    """Return the SHA-256 of the rows in order: equal for equal rows, tokenizer and cut, on any
    machine.
    """
    digest = hashlib.sha256()
    for name, dataset in splits.items():
        columns = {
            column: hashlib.sha256() for column in ("id", "length", "tokens", "prefix", "complete")
        }  # separate, so that batches do not matter
        for table in dataset.with_format("arrow").iter(batch_size=_HASHED_ROWS):
            columns["id"].update("".join(table["id"].to_pylist()).encode())
            columns["length"].update(pc.list_value_length(table["input_ids"]).to_numpy().tobytes())
            columns["tokens"].update(pc.list_flatten(table["input_ids"]).to_numpy().tobytes())
            columns["prefix"].update(table["prefix_length"].to_numpy().tobytes())
            columns["complete"].update(bytes(table["complete"].to_pylist()))
        digest.update(
            f"{name} {len(dataset)} {' '.join(column.hexdigest() for column in columns.values())}\n".encode()
        )
    return digest.hexdigest()


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Freeze existing objects: full collections every few thousand rows cost 10% of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the data set library's progress bars: writing is too short for one."""
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


class _Split:
    """One split: written batch by batch to an Arrow stream, then saved in the layout of
    `Dataset.save_to_disk`.
    """

    def __init__(self, folder: Path, limits: Throughput) -> None:
        self.lowest = 1.0  # smallest split position of an id
        self._limits = limits
        self._folder = folder
        self._file = folder.with_suffix(".arrow")
        self._writer = pa.ipc.new_stream(str(self._file), _SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0  # of these rows
        self._lengths = (array("i"), array("i"))  # of every row, before the cut: prefix, response
        self._sources = array("H")  # of every row
        self._chosen: list[int] | None = None

    @property
    def count(self) -> int:
        """Rows added."""
        return len(self._lengths[0])

    def rows_by_source(self) -> Counter[int]:
        """Count the rows that are kept, by the index of their data set."""
        chosen = range(self.count) if self._chosen is None else self._chosen
        return Counter(self._sources[at] for at in chosen)

    def add(self, example: dict[str, Any], response: int, group: str, source: int) -> None:
        """Add a row.

        Args:
            response: the number of its response tokens before the cut.
            group: the id that decides on the split.
            source: index of its data set.
        """
        self._rows.append(example)
        self._tokens += len(example["input_ids"])
        self._lengths[0].append(example["prefix_length"])
        self._lengths[1].append(response)
        self._sources.append(source)
        self.lowest = min(self.lowest, _split_position(group))
        if (
            len(self._rows) == self._limits.batch_rows
            or self._tokens > self._limits.batch_characters
        ):
            self._flush()

    def keep_smallest_ids(self, limit: int | None) -> dict[int, list[tuple[int, int]]]:
        """Keep the `limit` rows with the smallest ids, in any order of arrival; return prefix and
        response of the others, by the index of their data set.
        """
        left_out: dict[int, list[tuple[int, int]]] = {}
        if limit is None or self.count <= limit:
            return left_out
        with pa.memory_map(str(self._close())) as stream:
            ids = pa.ipc.open_stream(stream).read_all()["id"].to_pylist()
        ranked = sorted(range(self.count), key=ids.__getitem__)
        self._chosen = sorted(ranked[:limit])
        for at in ranked[limit:]:
            lengths = (self._lengths[0][at], self._lengths[1][at])
            left_out.setdefault(self._sources[at], []).append(lengths)
        return left_out

    def save(self) -> datasets.Dataset:
        """Write the split's directory and return the data set, memory-mapped from it."""
        file = self._close()
        # The library's own fingerprint depends on the path and the time: equal rows must be equal
        # files.
        dataset = datasets.Dataset(
            MemoryMappedTable.from_file(str(file)), fingerprint=hash_path(file)[:16]
        )
        if self._chosen is not None:
            dataset = dataset.select(self._chosen, keep_in_memory=True)
        with _no_bars():
            dataset.save_to_disk(str(self._folder))
        file.unlink()
        return datasets.load_from_disk(str(self._folder))

    def _close(self) -> Path:
        self._flush()
        self._writer.close()
        return self._file

    def _flush(self) -> None:
        if self._rows:
            tokens = array("i")
            for row in self._rows:
                tokens += row["input_ids"]
            ends = itertools.accumulate((len(row["input_ids"]) for row in self._rows), initial=0)
            flat = pa.Array.from_buffers(pa.int32(), len(tokens), [None, pa.py_buffer(tokens)])
            columns = [pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)]
            columns += [
                pa.array([row[field.name] for row in self._rows], field.type)
                for field in list(_SCHEMA)[1:]
            ]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
            self._rows, self._tokens = [], 0

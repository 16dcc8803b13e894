"""The step `prepare_data`: a user's rows become tokenized train and validation splits, with a card
that counts every row.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig
from canvastune.config.data import DataConfig
from canvastune.data.data_profile import DataProfile
from canvastune.data.files import FORGETTING
from canvastune.data.row_columns import RowColumns
from canvastune.errors import UserError
from canvastune.io.atomic import atomic_directory
from canvastune.io.provenance import local_inputs, write_provenance
from canvastune.preparation.card import write_card
from canvastune.preparation.chat_template import ChatEncoder, EncodedConversation
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.conversation import Conversation, InvalidRow
from canvastune.preparation.example_stream import read_examples
from canvastune.preparation.near_duplicates import describe, near_duplicates
from canvastune.preparation.parts import Part, describe_parts, log_parts, write_mixture
from canvastune.preparation.readers import Row
from canvastune.preparation.sources import OpenedSource, open_source, open_sources
from canvastune.preparation.split_writer import SplitWriter, content_hash, split_position
from canvastune.preparation.stats import CALLS, DatasetStats, ProgressLog, check_thresholds
from canvastune.preparation.tokenize_pool import Batch, EncoderPool, encode, usable_cpus
from canvastune.preparation.tokenizer import check_end_of_call, check_end_of_turn, load_tokenizer

logger = logging.getLogger(__name__)

_SAMPLES = 3
# Suggested where no row is held out: so many rows, but at most this share of all.
_USEFUL_ROWS, _LARGEST_SHARE = 16, 0.3
_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder each time


@dataclass(frozen=True)
class Throughput:
    """Sizes and intervals of a preparation; the prepared data does not depend on them."""

    batch_rows: int = 512  # conversations rendered and tokenized at a time
    batch_characters: int = 4 * 2**20  # fewer conversations if they are long
    # encoded in this process before others are started, which takes a second
    local_batches: int = 2
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
    `card.html`, `profile.npz`, `config.yaml` and `provenance.json`; it appears complete or not at all. Memory does
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
    started, columns = time.monotonic(), RowColumns(config.evaluate.slices)
    with atomic_directory(out) as folder:
        loaded = load_tokenizer(model)
        encoder = ChatEncoder(loaded.tokenizer, str(model))
        check_end_of_turn(model, encoder.closing, encoder.closing_ids)
        parts = [
            Part(opened, DatasetStats(config.data.seq_length, loaded.canvas_length))
            for opened in open_sources(config.data)
        ]
        forgetting = _open_forgetting(config)
        samples: list[dict[str, Any]] = []
        fraction = config.data.validation_fraction if config.data.validation is None else 0.0
        train, validation = (_writer(folder / name, throughput) for name in ("train", "validation"))
        with contextlib.closing(
            _kept_examples(parts, encoder, config, throughput, processes)
        ) as kept:
            for row, conversation, example, response in kept:
                part = parts[row.source]
                if part.stats.kept <= _SAMPLES and not part.held_out:
                    samples.append(_sample(example, loaded.tokenizer))
                position = split_position(conversation.group)
                split = train
                if part.held_out or position < fraction:
                    split = validation
                    columns.add(example["id"], row.value, f"{row.file}: row {row.number}")
                split.add(example, response, position, row.source)
        _check_rows(train, validation, parts, config.data)
        for index, beyond in validation.keep_sample(config.data.validation_rows).items():
            parts[index].stats.drop_beyond(beyond)
        splits = {"train": train.save(), "validation": validation.save()}
        rows = (train.rows_by_source(), validation.rows_by_source())
        write_mixture(
            parts,
            rows[0],
            zip(splits["validation"]["id"], validation.sources(), strict=True),
            folder,
        )
        columns.write(splits["validation"]["id"], folder / "validation")
        DataProfile.of(splits).write(folder)
        card: dict[str, Any] = {
            **describe_parts(parts, *rows),
            "train": len(splits["train"]),
            "validation": len(splits["validation"]),
            "seq_length": config.data.seq_length,
            "canvas_length": loaded.canvas_length,
            "positions": loaded.positions,
            "tokenizer": loaded.tokenizer.class_name,
            "vocab_size": loaded.vocab_size,
            "samples": samples,
            "near_duplicates": near_duplicates(
                splits["train"], splits["validation"], throughput.batch_rows
            ),
            "content_hash": content_hash(splits),
            "seconds": round(time.monotonic() - started, 2),
        }
        if forgetting is not None:
            part = Part(forgetting, DatasetStats(config.data.seq_length, loaded.canvas_length))
            _write_forgetting(config, part, encoder, folder, throughput)
        log_parts(parts, *rows)
        write_card(card, folder)
        read = {name: model / name for name in ("config.json", "tokenizer.json")}
        write_provenance(folder, "prepare_data", config, read | local_inputs(config.source_keys))
    closing = encoder.call_closing_id if card["turns"].get(CALLS) else None
    ends = check_end_of_call(model, loaded.tokenizer, closing)
    remarks = DatasetStats.total([part.stats for part in parts]).remarks()
    _log_summary(card, [*remarks, *ends])
    return card


def _kept_examples(
    parts: Sequence[Part],
    encoder: ChatEncoder,
    config: RunConfig,
    throughput: Throughput,
    processes: int | None,
) -> Generator[tuple[Row, Conversation, dict[str, Any], int], None, None]:
    """Read and encode all rows; yield what is kept of them, and count it and the others.

    Yields:
        the row, its conversation, the prepared row, its response tokens before the cut.
    """
    progress = ProgressLog(
        [part.stats for part in parts],
        config.data.max_rows if len(parts) == 1 else None,
        throughput.progress_seconds,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_frozen_garbage())
        found = stack.enter_context(
            contextlib.closing(read_examples(parts, progress, config.evaluate.slices))
        )
        encoding = stack.enter_context(
            contextlib.closing(
                encode(
                    _batches(found, throughput),
                    encoder,
                    processes or usable_cpus(),
                    local_batches=throughput.local_batches,
                    pool=throughput.pool,
                )
            )
        )
        for batch, answers in encoding:
            tokens = iter(answers)
            for row, conversation in batch:
                stats = parts[row.source].stats
                encoded = next(tokens) if isinstance(conversation, Conversation) else conversation
                if isinstance(encoded, InvalidRow):
                    stats.drop_invalid(row, encoded, conversation)
                    continue
                assert isinstance(conversation, Conversation)
                example = _example(row, conversation, encoded, config.data.seq_length)
                if example is None:
                    stats.drop_long_prefix(encoded.prefix_length, conversation)
                    continue
                response = len(encoded.tokens) - encoded.prefix_length
                stats.keep(encoded.prefix_length, response, encoded.foreign)
                yield row, conversation, example, response


def _open_forgetting(config: RunConfig) -> OpenedSource | None:
    """Open the data set of `evaluate.forgetting`, if there is one. Raises: UserError."""
    settings = config.evaluate.forgetting
    if settings.source is None:
        return None
    opened = open_source(settings, "evaluate.forgetting")
    return OpenedSource(opened, config.data.only(settings), 0.0)


def _write_forgetting(
    config: RunConfig, part: Part, encoder: ChatEncoder, folder: Path, throughput: Throughput
) -> None:
    """Write the rows of `evaluate.forgetting` as a prepared data set of only a validation split.

    Raises:
        UserError: as `prepare_data`.
    """
    (folder / FORGETTING).mkdir()
    writer = _writer(folder / FORGETTING / "validation", throughput)
    with contextlib.closing(_kept_examples([part], encoder, config, throughput, 1)) as kept:
        for _, _, example, response in kept:
            writer.add(example, response, 0.0, 0)
    check_thresholds(part.stats, part.config, part.source.label)
    writer.keep_sample(config.evaluate.forgetting.rows)
    kept_rows = len(writer.save())
    logger.info(
        f"prepare_data: evaluate.forgetting: {kept_rows:,} of {part.stats.rows_read:,} rows of "
        f"{part.source.label} are answered and not trained on"
    )


def _writer(folder: Path, throughput: Throughput) -> SplitWriter:
    rows, tokens = throughput.batch_rows, throughput.batch_characters
    return SplitWriter(folder, batch_rows=rows, batch_tokens=tokens)


def _log_summary(card: dict[str, Any], remarks: list[str]) -> None:
    for remark in [*remarks, *describe(card["near_duplicates"])]:
        logger.info(f"prepare_data: {remark}")
    if card["seconds"] > 2:
        total = f"{card['rows_read']:,} rows read, {card['kept']:,} examples kept"
        logger.info(
            f"prepare_data: {total} ({card['train']:,} train, {card['validation']:,} validation) in"
            f" {card['seconds']} s"
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
    """Return the prepared row, cut to `seq_length` tokens; None if no response token is left."""
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


def _sample(example: dict[str, Any], tokenizer: ChatTokenizer) -> dict[str, Any]:
    split = example["prefix_length"]
    return {
        "origin": example["origin"],
        "prefix": tokenizer.decode(example["input_ids"][:split].tolist()),
        "response": tokenizer.decode(example["input_ids"][split:].tolist()),
        "tokens": len(example["input_ids"]),
        "complete": example["complete"],
    }


def _check_rows(
    train: SplitWriter, validation: SplitWriter, parts: Sequence[Part], config: DataConfig
) -> None:
    """Refuse too many invalid or repeated rows, and a split without rows."""
    for part in parts:
        check_thresholds(part.stats, part.config, part.source.label)
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
        least = math.ceil(train.lowest * 10_000 + 1) / 10_000  # of one row
        enough = max(least, round(min(_LARGEST_SHARE, _USEFUL_ROWS / train.count), 2))
        raise UserError(
            f"{config.label}: none of the {train.count} rows kept is in the validation split,"
            " expected at least one",
            hint=(
                "Use more rows, or raise data.validation_fraction (now"
                f" {config.validation_fraction:g}) to {enough:g}."
            ),
        )


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Freeze existing objects: full collections every few thousand rows cost 10% of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

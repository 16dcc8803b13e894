"""The data sets that a preparation reads, and what became of the rows of each."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from canvastune.data.mixture import Mixture, Share
from canvastune.data.row_sources import write_sources
from canvastune.io.hashing import hash_path
from canvastune.preparation.readers import Row
from canvastune.preparation.sources import OpenedSource
from canvastune.preparation.stats import DatasetStats, ProgressLog

logger = logging.getLogger(__name__)


class Part:
    """One data set: its settings as the only source, and the counts of its rows."""

    def __init__(self, opened: OpenedSource, stats: DatasetStats) -> None:
        self.source = opened.source
        self.config = opened.config
        self.weight = opened.weight
        self.held_out = opened.held_out
        self.stats = stats
        self._content = hashlib.sha256()

    def count(self, rows: Iterable[Row], progress: ProgressLog) -> Iterator[Row]:
        """Pass rows through while they are counted; rows of the Hub, which have no file here, are
        hashed too.
        """
        for row in rows:
            self.stats.rows_read += 1
            if self.source.path is None:
                text = json.dumps(row.value, sort_keys=True, default=str)
                self._content.update(text.encode() + b"\n")
            progress.update()
            yield row

    @property
    def recipe_name(self) -> str:
        """The `source` by which the recipe names it."""
        assert self.config.source is not None
        return self.config.source

    @property
    def fingerprint(self) -> str:
        """Hash of the content; of a data set of the Hub, of the rows that were read."""
        if self.source.path is None:
            return self._content.hexdigest()
        return hash_path(self.source.path)


def describe_parts(
    parts: Sequence[Part], train: Counter[int], validation: Counter[int]
) -> dict[str, Any]:
    """Return the part of the data card that names the sources and counts all rows.

    Args:
        train, validation: rows of each split, by the index of the data set.
    """
    total = parts[0].stats
    if len(parts) == 1:
        (part,) = parts
        return {
            "source": part.source.label,
            "format": total.row_format,
            "fingerprint": part.fingerprint,
            **total.card(),
        }
    total = DatasetStats.total([part.stats for part in parts])
    weights = sum(part.weight for part in parts if not part.held_out)
    sources: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        stats = part.stats
        sources.append(
            {
                "source": part.source.label,
                "held_out": part.held_out,
                "weight": None if part.held_out else part.weight,
                "share": 0.0 if part.held_out else round(part.weight / weights, 6),
                "format": stats.row_format,
                "fingerprint": part.fingerprint,
                "rows_read": stats.rows_read,
                "kept": stats.kept,
                "dropped": {reason: count for reason, count in stats.dropped.items() if count},
                "train": train[index],
                "validation": validation[index],
            }
        )
    known = "\n".join(source["fingerprint"] for source in sources)
    return {
        "source": " + ".join(part.source.label for part in parts if not part.held_out),
        "format": ", ".join(dict.fromkeys(str(source["format"]) for source in sources)),
        "fingerprint": hashlib.sha256(known.encode()).hexdigest(),
        **total.card(),
        "sources": sources,
    }


def write_mixture(
    parts: Sequence[Part], train: Counter[int], held_out: Iterable[tuple[str, int]], folder: Path
) -> None:
    """Write, if there are several data sets, what the trainer and the evaluation need to know of
    them: the shares that training rows are interleaved by, and where each held-out row is from.

    Args:
        train: rows of the training split, by the index of the data set.
        held_out: id of each held-out row, and the index of its data set.
        folder: of the prepared data set.
    """
    shares = tuple(
        Share(part.weight, train[index]) for index, part in enumerate(parts) if not part.held_out
    )
    if len(shares) > 1:
        Mixture(shares).write(folder / "train")
        names = [part.recipe_name for part in parts]
        write_sources({id: names[index] for id, index in held_out}, folder / "validation")


def log_parts(parts: Sequence[Part], train: Counter[int], validation: Counter[int]) -> None:
    """Log one line per data set, if there are several."""
    if len(parts) == 1:
        return
    weights = sum(part.weight for part in parts if not part.held_out)
    for index, part in enumerate(parts):
        stats = part.stats
        use = (
            f"all held out, {validation[index]:,} used; data.validation_fraction does not apply"
            if part.held_out
            else f"{train[index]:,} train, {validation[index]:,} validation,"
            f" {part.weight / weights:.1%} of the training examples"
        )
        dropped = "".join(f", {reason}: {n:,}" for reason, n in stats.dropped.items() if n)
        logger.info(
            f"prepare_data: {part.source.label}: {stats.rows_read:,} rows read, {stats.kept:,} kept"
            f" ({use}){dropped}"
        )

"""Evaluate a finished run again: its answers by other judges, or its models with other settings."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig, loads
from canvastune.config.unread import unread_settings
from canvastune.data.row_columns import read_columns
from canvastune.errors import UserError
from canvastune.evaluation.again import changes_answers, judge_again
from canvastune.evaluation.figures import describe_slices, summarize
from canvastune.report.summary import RunArtifacts, read_json
from components.run_artifacts import find_run, tuned_model
from components.run_directory import BASE_RESULTS

logger = logging.getLogger(__name__)


def evaluate_again(folder: Path, settings: Sequence[str], out: Path | None = None) -> Path:
    """Write another evaluation of a run; return its folder.

    If only judges change, the answers that the run has are judged again. Other settings have both
    models answer again, except the base where it was asked the same before.

    Args:
        settings: lines of `key=value`.
        out: a new folder; None: `evaluation-2` in the run's, or the next number.

    Raises:
        UserError: no finished run, a setting that is not of evaluate, and as `evaluate`.
    """
    run, config = _read(folder, settings)
    out, kept = out or _next(folder), folder.absolute().parent / BASE_RESULTS
    if not changes_answers(run.config, config) and run.evaluation is not None:
        columns = None
        if config.evaluate.slices != run.config.evaluate.slices:
            with _prepared(run, config) as dataset:
                columns = read_columns(dataset / "validation", config.evaluate.slices)
        canvas = int(_card(run)["canvas_length"])
        result = judge_again(config, run.evaluation, out, canvas, columns, kept)
        for line in [*describe_slices(result), summarize(result)]:
            logger.info(f"evaluate: {line}")
        return out
    # Here, as these take seconds to import.
    from components.evaluate.step import evaluate_here

    tuned = tuned_model(folder)
    with _prepared(run, config) as dataset:
        evaluate_here(config, dataset, tuned, out, kept)
    return out


def sweep_again(folder: Path, settings: Sequence[str], out: Path | None = None) -> str:
    """Answer with a few settings of the sampler; return a table and where the files are.

    Raises:
        UserError: as `evaluate_again`.
    """
    from canvastune.evaluation.sweep import read_sweep, sweep_table
    from components.evaluate.step import sweep_here

    run, config = _read(folder, settings)
    changes_answers(run.config, config)  # refuses other settings than evaluate.*
    out, tuned = out or folder / "sweep", tuned_model(folder)
    with _prepared(run, config) as dataset:
        sweep_here(config, dataset, tuned, out)
    label, points = read_sweep(out)
    return f"{sweep_table(points, label)}\n{out / 'sweep.svg'}"


def _read(folder: Path, settings: Sequence[str]) -> tuple[RunArtifacts, RunConfig]:
    run = find_run(folder)
    config = loads(run.config.model_dump_json(), overrides=list(settings))
    known = unread_settings(run.config)  # said when the run started
    for line in unread_settings(config):
        if line not in known:
            logger.warning(f"evaluate: {line}")
    return run, config


def _next(folder: Path) -> Path:
    names = (folder / f"evaluation-{number}" for number in itertools.count(2))
    return next(path for path in names if not path.exists())


def _card(run: RunArtifacts) -> dict[str, Any]:
    if run.data is None:
        raise UserError(
            f"{run.name}: no data card found",
            hint="Use the folder of a pipeline run that has finished.",
        )
    return read_json(run.data / "card.json")


@contextlib.contextmanager
def _prepared(run: RunArtifacts, config: RunConfig) -> Iterator[Path]:
    """Prepare the run's data again: the run keeps only the card of them.

    Raises:
        UserError: the data are not what the run was trained and evaluated on.
    """
    from canvastune.checkpoint.hub import resolve_model
    from canvastune.preparation.prepare import prepare_data

    known = _card(run).get("content_hash")
    with tempfile.TemporaryDirectory(prefix="canvastune-evaluate-") as scratch:
        dataset = Path(scratch) / "data"
        card = prepare_data(config, resolve_model(config.model, weights=False), dataset)
        if card["content_hash"] != known:
            raise UserError(
                f"{config.data.label}: other rows or tokens than the run was evaluated on",
                hint="Bring back the data and tokenizer of the run, or judge its answers only.",
            )
        yield dataset

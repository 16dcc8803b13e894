"""Try what evaluation will do with a recipe's model and data, on the first rows of the data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.checkpoint.hub_push import check_push as ask_hub
from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.evaluation.model_judge import check_judge as ask_judge
from canvastune.evaluation.preflight import (
    NOT_SCORED,
    check_generation_config,
    describe_answers,
    describe_scoring,
)
from canvastune.preparation.prepare import prepare_data
from pipelines.doctor.finding import Finding

_ROWS = 200
_HELD_OUT = 0.5  # of them, as references to try the answer pattern on


def check_evaluation(config: RunConfig) -> Iterator[Finding]:
    """Prepare the first rows, and say what evaluation will and will not report of them.

    Only with a model and data on this machine: nothing is downloaded.
    """
    sources = [source.source for source in config.data.source_keys.values()]
    places = [config.model.id, *sources]
    if missing := [place for place in places if not Path(place).expanduser().exists()]:
        found = f"{missing[0]} is not on this machine; the step prepare_data checks it"
        yield Finding("evaluation", "skipped", found)
        return
    model = resolve_model(config.model, weights=False)
    for remark in check_generation_config(model):
        yield Finding("evaluation", "warning", remark, "correct the file, as the message says")
    limits = {"max_rows": _ROWS, "validation_fraction": _HELD_OUT, "validation_rows": None}
    sample = config.model_copy(update={"data": config.data.model_copy(update=limits)})
    with tempfile.TemporaryDirectory(prefix="canvastune-doctor-") as scratch:
        dataset = Path(scratch) / "data"
        try:
            card = prepare_data(sample, model, dataset, processes=1)
        except UserError as error:
            found = f"of the first {_ROWS} rows: {error}"
            yield Finding("evaluation", "warning", found, error.hint or "see the message")
            return
        whole, of = card["rows_read"] < _ROWS, f"of the first {_ROWS} rows: "
        if whole:  # split as the run will
            dataset, of = Path(scratch) / "whole", ""
            try:
                prepare_data(config, model, dataset, processes=1)
            except UserError as error:
                yield Finding("data", "problem", str(error), error.hint or "see the message")
                return
        for remark in describe_scoring(config, dataset):
            found = f"{of}{remark}"
            if NOT_SCORED in remark:
                fix = "set evaluate.judge to one that fits the references, such as chrf"
                yield Finding("evaluation", "warning", found, fix)
            else:
                yield Finding("evaluation", "ok", found)
        for remark in describe_answers(config, dataset, sample=not whole):
            yield Finding("evaluation", "warning", remark)


def check_judge(config: RunConfig, submitted: bool) -> Iterator[Finding]:
    """Ask the judging model once, if the recipe has one. `submitted`: as for `check_push`."""
    if "model" not in config.evaluate.judge_names:
        return
    settings = config.evaluate.judge_model
    if submitted:
        found = f"{settings.address} is called from the cluster when the run starts"
        yield Finding("judge", "skipped", found)
    elif remark := ask_judge(settings):
        yield Finding("judge", "warning", remark, "start the model, or correct what the line names")
    else:
        yield Finding("judge", "ok", f"{settings.model} at {settings.address} judges")


def check_push(config: RunConfig, submitted: bool) -> Iterator[Finding]:
    """Ask the Hub whether the tuned model may be pushed there, if the recipe names a repository.

    Args:
        submitted: the run is for a cluster, whose token is not that of this machine.
    """
    repository = config.tracking.hub_model_id
    if repository is None:
        return
    if submitted:
        found = f"{repository}: the cluster's HF_TOKEN is checked when the run starts"
        yield Finding("hub", "skipped", found)
    elif ask_hub(repository):
        yield Finding("hub", "ok", f"HF_TOKEN may push to {repository}")
    else:
        fix = "check the network and HF_ENDPOINT"
        yield Finding("hub", "warning", f"{repository}: the Hub does not respond", fix)

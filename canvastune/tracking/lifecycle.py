"""The records of a pipeline run and of its steps in MLflow: begun, ended, and sent later where MLflow was away."""

from __future__ import annotations

import contextlib
import getpass
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from canvastune import __version__
from canvastune.config import RunConfig
from canvastune.tracking import descriptions
from canvastune.tracking.client import connect
from canvastune.tracking.contents import StepRun
from canvastune.tracking.outbox import STEPS, Outbox, Step
from canvastune.tracking.run_lookup import PIPELINE_RUN, PipelineRun, RunIds
from canvastune.tracking.sending import FindRun
from canvastune.tracking.telling import Teller


def start(run: PipelineRun, tags: Mapping[str, str] | None = None) -> str:
    """Open a pipeline run's record: description, tags, the flattened config as parameters, the config as a file.

    Args:
        tags: what else the run is to be found by, such as its address in Kubeflow.

    Returns:
        Id of its run in MLflow, which may be one that Kubeflow's plugin or an earlier step made; "" if MLflow is away, after
        a warning that says why: what it should know waits in the run's folder.
    """
    record, outbox = _open(run, "resolve")
    outbox.flush()
    config, key = run.config, f"{run.folder.name}/{run.job}"
    about = {PIPELINE_RUN: key, **_about(config), **(tags or {}), descriptions.NOTE: descriptions.begun(config, run.folder)}
    record.tell("tags", about, whole=True)
    tree = config.model_dump(mode="json")
    record.tell("text", {"name": "config.yaml", "text": yaml.safe_dump(tree, sort_keys=False)}, whole=True)
    record.tell("parameters", tree, whole=True)
    return record.pipeline_run_id or ""


@contextlib.contextmanager
def step_run(run: PipelineRun | None, step: Step) -> Iterator[StepRun]:
    """The nested run of a step, which ends FINISHED, or FAILED with the error as a tag if the block raises.

    A step that is tried again goes on in the run of its first attempt. Without a pipeline run, or with MLflow away, the
    block runs all the same.
    """
    if run is None:
        yield StepRun()
        return
    record, outbox = _open(run, step)
    outbox.away = step == "report" and _flush_all(run)  # it speaks of what the steps before it have told
    if not outbox.away:
        outbox.flush()
    record.tell("start", {})
    try:
        yield record
    except BaseException as error:
        record.tags({"canvastune.error": f"{type(error).__name__}: {error}"[:5000]})
        record.tell("end", {"status": "FAILED" if isinstance(error, Exception) else "KILLED"})
        raise
    else:
        record.tell("end", {"status": "FINISHED"})
    finally:
        if step == "report":
            _flush_all(run)
        else:
            outbox.flush()


def finish(run: PipelineRun, *, failed: bool) -> None:
    """End the pipeline run's record, and whatever step of it still counts as running; send what still waits of all steps."""
    record, outbox = _open(run, "finish")
    outbox.away = _flush_all(run)
    record.tell("finish", {"status": "FAILED" if failed else "FINISHED"}, whole=True)


def sync(run: PipelineRun) -> list[str]:
    """Send what waits in a run's folder; returns a reason for each step of which something still waits."""
    return [reason for step in STEPS if (reason := _open(run, step, own=False)[1].flush())]


def log_data(run: PipelineRun | None, dataset: Path) -> None:
    """Give the pipeline run its prepare_data run: a cached preparation never ran in this pipeline run."""
    with step_run(run, "prepare_data") as record:
        card = json.loads((dataset / "card.json").read_text(encoding="utf-8"))
        named = ("source", "format", "fingerprint", "content_hash", "seq_length", "canvas_length", "tokenizer", "vocab_size")
        record.parameters({name: card[name] for name in named if name in card})
        counts = {name: card[name] for name in ("rows_read", "kept", "train", "validation", "cut", "seconds") if name in card}
        counts |= {f"dropped/{reason}": count for reason, count in card.get("dropped", {}).items()}
        record.metrics({f"data/{name}": count for name, count in counts.items()})
        record.dataset(dataset, "training", whole=True)
        record.dataset(dataset, "training")
        record.outputs(dataset)
        train, held_out = (f"{card[split]:,}" for split in ("train", "validation"))
        record.note(f"{card['kept']:,} examples of {card['rows_read']:,} rows: {train} to train on, {held_out} held out.")


def training_run(run: PipelineRun) -> FindRun:
    """What finds the run of the step `train`, for the trainer's own process: MLflow was away when the step began."""
    return RunIds(connect(run.uri), run).later("train")


def _open(run: PipelineRun, step: Step, own: bool = True) -> tuple[StepRun, Outbox]:
    server = connect(run.uri)
    ids = RunIds(server, run, step if own else None)
    outbox = Outbox(run.folder / "unsent", step, server, Teller(ids))
    return StepRun(step, ids, outbox), outbox


def _flush_all(run: PipelineRun) -> bool:
    """Send what waits of every step; whether MLflow is away."""
    boxes = [_open(run, step, own=False)[1] for step in STEPS]
    for box in boxes:
        box.flush()
    return any(box.away for box in boxes)


def _about(config: RunConfig) -> dict[str, str]:
    """Tags that runs are filtered by."""
    tags = {
        "canvastune.version": __version__,
        "canvastune.recipe": config.name,
        "canvastune.method": config.train.method,
        "canvastune.model": config.model.id,
        "canvastune.model_revision": config.model.revision or "unspecified",
        "canvastune.data": config.data.source,
        "canvastune.backend": config.cluster.backend,
        "canvastune.distributed.sync": str(config.world_size),
        "mlflow.source.name": f"canvastune {config.name}",
        "mlflow.source.type": "PROJECT",
    }
    if config.cluster.backend != "local":
        tags["canvastune.trainer_image"] = config.cluster.image
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _git_commit() -> str | None:
    """Commit of the checkout that this package lies in; None if it is installed elsewhere."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
